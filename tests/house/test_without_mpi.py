"""Commands that read what runs left behind, on a machine without mpi4py; and the version, which all of them say."""

import ast
import json
import shutil
import sys
from pathlib import Path

import h5py
import pytest
import yaml
from processes import needs_mpirun, start
from scaling_runs import write_run

import apts_mpi
from apts_mpi.compare.__main__ import parse
from apts_mpi.compare.runs import Plan
from apts_mpi.train.__main__ import main as train

# Carries out commands one after the other: each imports torch, which takes longer than all else.
DRIVER = """
import json
import runpy
import sys

results = {}
for name, arguments in json.loads(sys.argv[1]).items():
    module = name.split()[0]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(f"apts_mpi.{module}", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    results[name] = status
print("statuses:", json.dumps(results))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a finished run."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    train(["--problem=digits", "--train-samples=200", "--epochs=2", "--batch-size=100", f"--run-dir={path}"])
    return path


def finished_comparison(run, directory):
    """The options of a comparison whose runs have all the records of one that took place."""
    arguments = ["digits", "--seeds=1", "--epochs=2", "--ranks=2", "--out", str(directory)]
    for planned in Plan("digits", parse(arguments)).runs:
        shutil.copytree(run, planned.path, ignore=shutil.ignore_patterns("checkpoints"))
        (planned.path / "config.yaml").write_text(planned.config)
        summary = json.loads((run / "summary.json").read_text())
        (planned.path / "summary.json").write_text(json.dumps(summary | {"ranks": planned.ranks}))
    return arguments


def without_mpi(directory, commands):
    """Carry out commands where mpi4py cannot be imported, nor a launcher be found; their statuses and the job."""
    (directory / "hidden" / "mpi4py").mkdir(parents=True)
    (directory / "hidden" / "mpi4py" / "__init__.py").write_text("raise ImportError('there is no MPI library')")
    (directory / "hidden" / "driver.py").write_text(DRIVER)
    root = Path(apts_mpi.__file__).parents[1]
    job = start(
        directory, None, [json.dumps(commands)], "driver", PYTHONPATH=f"{directory}/hidden:{root}", PATH="/nowhere"
    )
    assert job.returncode == 0, job.stderr
    printed, _, statuses = job.stdout.rpartition("statuses:")
    return json.loads(statuses), printed, job.stderr


@pytest.mark.skipif(h5py.get_config().mpi, reason="h5py itself imports mpi4py")
@pytest.mark.processes
def test_what_is_finished_is_read_without_mpi(run, tmp_path):
    studies = [write_run(tmp_path / f"r{ranks}", ranks, 1.0 / ranks) for ranks in (1, 2, 4)]
    checkpoint = str(run / "checkpoints")
    commands = {
        "plot": [str(run), "--out", str(tmp_path / "plot")],
        "compare": finished_comparison(run, tmp_path / "comparisons"),
        "scaling report": ["report", *studies, f"--plot={tmp_path / 'report'}"],
        "scaling report hdf5": ["report", *studies, f"--hdf5={tmp_path / 'new.h5'}"],
        "scaling predict": ["predict", str(studies_file(studies, tmp_path))],
        "checkpoint info": ["info", checkpoint],
        "checkpoint verify": ["verify", checkpoint],
        "checkpoint diff": ["diff", checkpoint, checkpoint],
        "checkpoint to-torch": ["to-torch", checkpoint, str(tmp_path / "network.pt")],
    }
    statuses, printed, errors = without_mpi(tmp_path, commands)
    # Where the file is new, reduced models are timed, for which the solver is needed.
    assert statuses == dict.fromkeys(commands, 0) | {"scaling report hdf5": 2}, errors
    assert "hdf5: to put runs into a file needs mpi4py" in errors
    files = ("plot.png", "plot.svg", "report.svg", "network.pt", "comparisons/digits/table.md")
    assert all((tmp_path / file).stat().st_size > 0 for file in (*files, "comparisons/digits/loss.svg"))
    assert "strong, replicated" in printed and "parameters/0.weight" in printed and ": ok" in printed


def studies_file(runs, tmp_path):
    """A file with the studies, that is made where there is MPI."""
    from apts_mpi.scaling.adding import add_runs
    from apts_mpi.scaling.report import read_sources

    for path in runs:
        options = yaml.safe_load((Path(path) / "config.yaml").read_text())
        assert options["layout"] == "replicated"
    file = tmp_path / "studies.h5"
    add_runs(file, read_sources(list(map(Path, runs)))[0])
    return file


COMMANDS = ("train", "plot", "compare", "scaling", "bench", "doctor", "checkpoint")


@pytest.mark.skipif(h5py.get_config().mpi, reason="h5py itself imports mpi4py")
@pytest.mark.processes
def test_version_and_help_without_mpi(tmp_path):
    reading = ("plot", "compare", "scaling", "checkpoint", "bench", "doctor")
    commands = {name: ["--version"] for name in COMMANDS} | {f"{name} help": ["--help"] for name in reading}
    statuses, printed, errors = without_mpi(tmp_path, commands)
    assert statuses == dict.fromkeys(commands, 0), errors
    assert printed.count(f"apts_mpi {apts_mpi.__version__}\n") == len(COMMANDS)
    assert printed.count("usage: ") == len(reading)


@pytest.mark.processes
@needs_mpirun
def test_a_job_says_its_version_once(tmp_path):
    for name in ("train", "bench"):
        job = start(tmp_path, 2, ["--version"], f"apts_mpi.{name}")
        assert (job.returncode, job.stdout) == (0, f"apts_mpi {apts_mpi.__version__}\n"), job.stderr


def test_type_checkers_see_the_names_that_are_imported_when_asked_for():
    tree = ast.parse(Path(apts_mpi.__file__).read_text())
    seen = {
        name.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names
    }
    assert set(apts_mpi.__all__) == set(seen) - {"TYPE_CHECKING"}
    for name in apts_mpi.__all__:
        assert getattr(apts_mpi, name) is getattr(sys.modules[seen[name]], name)
    assert set(apts_mpi.__all__) <= set(dir(apts_mpi))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        apts_mpi.nonsense  # noqa: B018
