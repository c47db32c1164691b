"""Scaling studies: reports of records whose figures are known, the file that keeps them, and a real study."""

import json
import re
import resource

import h5py
import pytest
import yaml
from hidden import hide_matplotlib
from processes import needs_mpirun
from scaling_runs import EVENT, write_run

from apts_mpi.scaling import runs as scaling_runs
from apts_mpi.scaling.__main__ import main
from apts_mpi.scaling.measured import read_measured_run
from apts_mpi.scaling.studies import read_studies


def call(*arguments, command="report"):
    with pytest.raises(SystemExit) as end:
        main([command, *arguments])
    return end.value.code


def sizes(tmp_path, *runs):
    assert call(*runs, f"--json={tmp_path}/report.json") == 0
    return json.loads((tmp_path / "report.json").read_text())["sizes"]


def test_strong(tmp_path):
    """Half the time at four ranks is a speed-up of two and an efficiency of a half; the first iteration is left out."""
    two, one = write_run(tmp_path / "b", 4, 0.25), write_run(tmp_path / "a", 1, 0.5)
    first, second = sizes(tmp_path, two, one)
    assert (first["ranks"], first["speed_up"], first["efficiency"]) == (1, 1.0, 1.0)
    assert (second["ranks"], second["speed_up"], second["efficiency"]) == (4, 2.0, 0.5)
    assert second["seconds"] == 0.25 and second["communication"] == 0.25


def test_weak(tmp_path):
    """Twice the samples on twice the ranks in 1.25 of the time: an efficiency of 0.8."""
    runs = write_run(tmp_path / "a", 2, 1.0, 200), write_run(tmp_path / "b", 4, 1.25, 400)
    second = sizes(tmp_path, *runs)[1]
    assert (second["speed_up"], second["efficiency"]) == (1.6, 0.8)


def test_repeated_runs_count_once(tmp_path):
    """The median one."""
    runs = [write_run(tmp_path / str(number), 2, seconds) for number, seconds in enumerate((3.0, 1.0, 2.0))]
    assert [size["seconds"] for size in sizes(tmp_path, *runs)] == [2.0]


def test_unfinished_run_is_named(tmp_path, capsys):
    assert call(write_run(tmp_path / "a", 1, 1.0), f"{tmp_path}/gone") == 1
    assert f"{tmp_path}/gone has no summary.json" in capsys.readouterr().out


def test_runs_that_do_not_belong_together(tmp_path, capsys):
    one = write_run(tmp_path / "a", 1, 1.0)
    assert call(one, write_run(tmp_path / "b", 2, 1.0, problem="burgers")) == 2
    assert "differ in problem: ['burgers', 'digits']" in capsys.readouterr().err
    assert call(one, write_run(tmp_path / "c", 1, 1.0, 50)) == 2
    assert "differ in batch_size" in capsys.readouterr().err
    assert call(f"{tmp_path}/gone") == 2
    assert "none came to its end" in capsys.readouterr().err


def test_shares_and_plots(tmp_path, capsys):
    """The share of each event is in the tables, in the JSON and in the picture."""
    runs = [write_run(tmp_path / f"r{ranks}", ranks, 1.0 / ranks) for ranks in (1, 2, 4)]
    first = sizes(tmp_path, *runs, f"--plot={tmp_path / 'picture'}")[0]
    assert first["shares"] == {"judge": 0.25, "wait": 0.75}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["│", "wait", *["│", "75.0%"] * 3, "│"] in lines
    words = set(re.findall(r"<!-- (.*?) -->", (tmp_path / "picture.svg").read_text(encoding="utf-8")))
    assert {"speed-up", "efficiency", "ideal", "strong, replicated", "judge", "wait", "ranks"} <= words
    assert (tmp_path / "picture.png").stat().st_size > 0


def test_the_file_reports_what_the_directories_report(tmp_path):
    """Directories go into a file, once each, beside those of another study."""
    file = str(tmp_path / "studies.h5")
    strong = [write_run(tmp_path / f"s{ranks}", ranks, 1.0 / ranks) for ranks in (1, 2)]
    weak = [write_run(tmp_path / f"w{ranks}", ranks, 1.0, 100 * ranks) for ranks in (1, 2)]
    for runs in (strong, weak, strong):
        assert call(*runs, "--hdf5", file, f"--json={tmp_path}/{runs[0][-2]}.json") == 0
    assert call(file, f"--json={tmp_path}/all.json") == 0
    studies = json.loads((tmp_path / "all.json").read_text())["studies"]
    assert list(studies) == ["strong, replicated", "weak, replicated"]
    for name, table in studies.items():
        assert table == json.loads((tmp_path / f"{name[0]}.json").read_text())["sizes"]
    stored = read_studies(tmp_path / "studies.h5")
    assert len(stored.runs) == 4 and all(time > 0.0 for time in stored.reduced_model.values())
    directory = read_measured_run(tmp_path / "s1")
    assert (stored.runs[0].summary, stored.runs[0].seconds) == (directory.summary, directory.seconds)
    assert "run_dir" not in stored.runs[0].options


def test_a_file_that_is_none(tmp_path, capsys):
    """Each is told, with status 2, and is afterwards as before."""
    run = write_run(tmp_path / "a", 1, 1.0)
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["values"] = [1.0]
    with h5py.File(tmp_path / "newer.h5", "w") as file:
        file.attrs.update({"format": "apts_mpi scaling studies", "version": 99})
    for name, message in (
        ("text.h5", "cannot be read as an HDF5 file of scaling studies"),
        ("foreign.h5", "is an HDF5 file of something else"),
        ("newer.h5", "is of version 99, not 1"),
    ):
        content = (tmp_path / name).read_bytes()
        for arguments in ((str(tmp_path / name),), (run, "--hdf5", str(tmp_path / name))):
            assert call(*arguments) == 2
            assert message in capsys.readouterr().err
        assert call(str(tmp_path / name), command="predict") == 2
        assert message in capsys.readouterr().err
        assert (tmp_path / name).read_bytes() == content
    assert call(str(tmp_path / "gone.h5"), command="predict") == 2
    assert "gone.h5 cannot be read" in capsys.readouterr().err


def test_what_remains_of_a_weak_study(tmp_path, capsys):
    """One size of it, or several with one batch, does not tell its kind; whoever submitted it knows."""
    runs = write_run(tmp_path / "a", 1, 1.0), write_run(tmp_path / "gone-not", 2, 1.0, 200)
    assert call(runs[0], f"{tmp_path}/gone", "--kind=weak", f"--json={tmp_path}/out.json") == 1
    assert list(json.loads((tmp_path / "out.json").read_text())["studies"]) == ["weak, replicated"]
    assert call(*runs, "--kind=strong") == 2
    assert "kind: 'strong', but the runs differ in batch_size: [100, 200]" in capsys.readouterr().err
    assert call(runs[0], f"--hdf5={tmp_path}/studies.h5") == 0
    assert call(f"{tmp_path}/studies.h5", "--kind=weak") == 2
    assert "studies.h5 has it; leave it out" in capsys.readouterr().err


def test_resumed_run(tmp_path, capsys):
    """Its events are of the last part alone."""
    events = {"judge": EVENT | {"calls": 2, "seconds_max": 1.0, "share": 1.0}}
    path = write_run(tmp_path / "a", 1, 1.0, events=events)
    assert call(path) == 2
    assert "was resumed: its events are of 2 of its 4 iterations" in capsys.readouterr().err
    assert call(write_run(tmp_path / "b", 1, 1.0, events=events, optimizer="adam")) == 0
    options = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    (tmp_path / "a" / "config.yaml").write_text(yaml.safe_dump(options | {"global_step": {"model": "lsr1"}}))
    assert call(path) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "has no problem, optimizer, parameters, ranks"),
        ("[1]", "cannot be read as a run"),
        ("null", "cannot be read as a run"),
        ('{"events": {"wait": {}}}', "cannot be read as a run (KeyError('judge'))"),
        ('{"events": 1}', "cannot be read as a run"),
    ],
)
def test_summary_that_cannot_be_used(tmp_path, capsys, content, message):
    path = tmp_path / "a"
    write_run(path, 1, 1.0)
    given = json.loads(content)
    if given and isinstance(given, dict):
        given = json.loads((path / "summary.json").read_text()) | given
    (path / "summary.json").write_text(json.dumps(given))
    assert call(str(path)) == 2
    assert message in capsys.readouterr().err


def test_full_disk(tmp_path, capsys):
    """The error is told, the file is as before, and nothing is left beside it."""
    run, file = write_run(tmp_path / "a", 1, 1.0), tmp_path / "files" / "studies.h5"
    file.parent.mkdir()
    assert call(run, "--hdf5", str(file)) == 0
    content = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    other = write_run(tmp_path / "b", 2, 1.0)
    # A limit on the length of files fails where a full disk does: while writing.
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
    try:
        status = call(other, "--hdf5", str(file))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2 and "studies.h5 cannot be written" in capsys.readouterr().err
    assert file.read_bytes() == content and list(file.parent.iterdir()) == [file]


def test_plots_without_matplotlib(tmp_path, capsys, monkeypatch):
    hide_matplotlib(monkeypatch)
    assert call(write_run(tmp_path / "a", 1, 1.0), f"--plot={tmp_path / 'picture'}") == 2
    assert "the plots need matplotlib, which is not installed" in capsys.readouterr().err


def test_records_that_cannot_be_used(tmp_path, capsys):
    one = write_run(tmp_path / "one", 1, 1.0)
    assert call(write_run(tmp_path / "old", 1, 1.0, events=None)) == 2
    assert "old has no events in its summary.json; run it again" in capsys.readouterr().err
    other = tmp_path / "other"
    write_run(other, 2, 1.0)
    options = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(options | {"dtype": "float64"}))
    assert call(one, str(other)) == 2
    assert "the runs differ in dtype: float32 and float64" in capsys.readouterr().err
    (other / "config.yaml").unlink()
    assert call(str(other)) == 2
    assert "cannot be read as a run" in capsys.readouterr().err
    assert call(one, "--hdf5", str(tmp_path / "nowhere" / "file.h5")) == 2
    assert "file.h5 cannot be written" in capsys.readouterr().err
    file = str(tmp_path / "studies.h5")
    assert call(one, "--hdf5", file) == 0
    assert call(file, one) == 2
    assert "give one file alone" in capsys.readouterr().err
    assert call(write_run(tmp_path / "third", 2, 1.0, problem="burgers"), "--hdf5", file) == 2
    assert "differ in problem: ['burgers', 'digits']" in capsys.readouterr().err
    assert len(read_studies(tmp_path / "studies.h5").runs) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("strong FILE --ranks 0", "--ranks: '0' is not allowed"),
        ("strong FILE --ranks 1 --repeats 0", "--repeats: '0' is not allowed"),
        ("strong FILE --ranks 1 --samples-per-rank 5", "samples_per_rank: 5 "),
        ("weak FILE --ranks 1", "samples_per_rank: None"),
        ("strong FILE --ranks 1 -- --run-dir=here", "--run_dir=here: the study sets this option itself"),
        ("strong FILE --ranks 1 -- --nonsense=1", "nonsense"),
    ],
)
def test_studies_that_cannot_be_run(tmp_path, capsys, arguments, message):
    file = tmp_path / "studies.h5"
    assert call(*arguments.replace("FILE", str(file)).split(), command="run") == 2
    assert message in capsys.readouterr().err
    assert not file.exists()


@needs_mpirun
def test_the_file_is_checked_before_the_first_run(tmp_path, capsys, monkeypatch):
    """Runs take hours; one that cannot be kept is not begun."""

    def no_run(*_):
        raise AssertionError("a run was begun")

    monkeypatch.setattr(scaling_runs, "measure", no_run)

    def refused(file, *arguments):
        assert call("strong", str(file), "--ranks", "1", "--", *arguments, command="run") == 2
        return capsys.readouterr().err

    assert "studies.h5 cannot be written" in refused(tmp_path / "nowhere" / "studies.h5", "--problem=digits")
    (tmp_path / "text.h5").write_text("no HDF5")
    assert "cannot be read as an HDF5 file" in refused(tmp_path / "text.h5", "--problem=digits")
    run, file = tmp_path / "run", tmp_path / "studies.h5"
    write_run(run, 1, 1.0)
    options = yaml.safe_load((run / "config.yaml").read_text()) | {"problem": "digits", "optimizer": "apts"}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    assert call(str(run), "--hdf5", str(file)) == 0
    assert "problem: 'burgers' is not that of the runs in" in refused(file, "--problem=burgers")
    assert "optimizer: 'adam' is not that of the runs in" in refused(file, "--problem=digits", "--optimizer=adam")


SMALL = ["--problem=digits", "--device=cpu", "--train-samples=200", "--max-iterations=3", "--checkpoint-every=null"]


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
def test_a_real_study(tmp_path, monkeypatch, capsys):
    """Sizes are measured once; then one that fails is told, and what was measured stays."""

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        shards = "--schwarz.local-data=shard"  # of one sample at least
        status = call(*arguments, "--", *SMALL, "--subdomains=2", shards, command="run")
        return status, *capsys.readouterr()

    status, output, errors = run("strong", "studies.h5", "--ranks", "1")
    assert status == 0, errors
    assert "strong, 1 rank(s)" in output
    status, output, errors = run("strong", "studies.h5", "--ranks", "1", "2")
    assert status == 0, errors
    assert "strong, 1 rank(s): 1 measured before" in output and output.count("s an iteration") == 1
    stored = read_studies(tmp_path / "studies.h5").runs
    assert [(run.kind, run.ranks, len(run.seconds)) for run in stored] == [("strong", 1, 2), ("strong", 2, 2)]
    assert [run.summary["subdomains"] for run in stored] == [2, 2]
    # The same iterates, summed in another order in float32.
    losses = [run.summary["train_loss"] for run in stored]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    status, output, errors = run("weak", "studies.h5", "--ranks", "1", "--samples-per-rank", "1")
    assert status == 2 and "the run with 1 rank(s) failed: " in errors
    assert "batch_size: 1 is too small" in errors
    assert read_studies(tmp_path / "studies.h5").runs == stored
    # Two sizes, of which none can be left out to see how wrong the fit is.
    assert call(str(tmp_path / "studies.h5"), command="predict") == 2
    assert "a fit to fewer than 3 cannot be checked" in capsys.readouterr().err
