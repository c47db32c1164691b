"""``--logger``: the records of a run, given to whoever takes them on rank 0."""

import csv
import json
import sys

import pytest
from processes import start

from apts_mpi.errors import InvalidInput
from apts_mpi.train.logger import LoggerSetting
from apts_mpi.train.loggers import KINDS, Loggers
from apts_mpi.train.options import LOGGERS

FAILED, USAGE = 1, 2
PROBLEM = "--problem=networks:problem"
COMMON = f"{PROBLEM} --dtype=float64 --device=cpu --batch-size=30 --epochs=2 --local.solver=sgd".split()
LAYOUTS = pytest.mark.parametrize("layout", ["replicated", "staged"])

MINE = """
import json
from apts_mpi.train.logger import Logger

class Lines(Logger):
    def __init__(self, setting):
        super().__init__(setting)
        self.file = open(setting.directory / "lines", "a")
        self.note("begin", {"iteration": setting.iteration, "earlier": len(setting.earlier),
                            "epochs": setting.configuration["epochs"]})
    def note(self, kind, record):
        print(json.dumps([kind, dict(record)]), file=self.file, flush=True)
    def on_iteration(self, record):
        self.note("iteration", record)
    def on_epoch(self, record):
        self.note("epoch", record)
    def on_end(self, summary):
        self.note("end", summary)
    def close(self):
        self.file.close()

class Broken(Lines):
    def on_epoch(self, record):
        raise OSError("no room\\nfor it")

class BrokenEnd(Lines):
    def on_end(self, summary):
        raise ValueError("no end")

class Unmade(Lines):
    def __init__(self, setting):
        raise ValueError("not here")

class NoLogger:
    pass
"""


@pytest.fixture
def mine(world, directory, request):
    """The name of a module with loggers, of this test alone: each is imported once."""
    name = f"mine_{abs(hash(request.node.name)) % 10**8}"
    name = world.bcast(name)
    if world.rank == 0:
        (directory / f"{name}.py").write_text(MINE)
    world.Barrier()
    yield name
    sys.modules.pop(name, None)


def history(path):
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_names_of_the_options_are_those_of_the_classes():
    assert tuple(KINDS) == LOGGERS


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@LAYOUTS
def test_one_of_ones_own_gets_everything(world, directory, mine, trained, layout):
    trained(*COMMON, f"--layout={layout}", f"--logger={mine}:Lines", "--run-dir=run", "--max-iterations=3")
    resumed = trained(PROBLEM, "--resume", "--run-dir=run", "--max-iterations=100", f"--logger={mine}:Lines, csv")
    if world.rank > 0:
        return
    assert "note:" not in resumed
    lines = [json.loads(line) for line in (directory / "run" / "lines").read_text().splitlines()]
    records = history(directory / "run")
    kinds = [kind for kind, _ in lines]
    assert kinds[0] == "begin" and kinds.count("begin") == kinds.count("end") == 2 and kinds[-1] == "end"
    again = kinds.index("end") + 1
    # The partial epoch at the end of the first call is no part of the run that goes on.
    assert lines[again][1] == {"iteration": 3, "earlier": 4, "epochs": 2}
    given = [record for kind, record in lines[1 : again - 2] + lines[again + 1 : -1] if kind in ("iteration", "epoch")]
    assert given == records
    assert lines[-1][1]["reason"] == "LIMIT_EPOCHS" and lines[again - 1][1]["reason"] == "LIMIT_ITERATIONS"
    # A resumed run has the table from its beginning.
    for name, of_kind in (
        ("iterations.csv", [record for record in records if "train_loss" not in record]),
        ("epochs.csv", [record for record in records if "train_loss" in record]),
    ):
        table = rows(directory / "run" / name)
        assert [int(row["iteration"]) for row in table] == [record["iteration"] for record in of_kind]
        for row, record in zip(table, of_kind, strict=True):
            for key, value in record.items():
                if isinstance(value, float | int):
                    assert float(row[key]) == float(value), key


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@LAYOUTS
def test_one_that_fails_ends_all_ranks_and_leaves_a_checkpoint(world, directory, mine, command, trained, layout):
    options = [*COMMON, f"--layout={layout}", "--epochs=5", "--run-dir=run"]
    status, _, errors = command(*options, f"--logger=csv,{mine}:Broken")
    assert status == FAILED
    if world.rank == 0:
        words = f"logger {mine}:Broken failed in on_epoch with OSError: no room for it; the run is saved after"
        assert errors.count("\n") == 1 and words in errors
        assert len(rows(directory / "run" / "epochs.csv")) == 1
    output = trained(PROBLEM, "--resume", "--run-dir=run")
    if world.rank == 0:
        assert "resumed after iteration" in output and history(directory / "run")[-1]["epoch"] == 5


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_one_that_fails_at_the_end(world, directory, mine, command):
    status, _, errors = command(*COMMON, f"--logger={mine}:BrokenEnd", "--run-dir=run")
    assert status == FAILED and (directory / "run" / "summary.json").exists()
    if world.rank == 0:
        assert "failed in on_end with ValueError: no end" in errors


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Unmade", "cannot be made (ValueError: not here)"),
        ("NoLogger", "it is not a class derived from apts_mpi.train.Logger"),
        ("Missing", "has no class 'Missing'"),
    ],
)
def test_what_is_no_logger_is_told_before_the_work(world, directory, mine, command, name, words):
    status, output, errors = command(*COMMON, f"--logger={mine}:{name}", "--run-dir=run")
    assert status == USAGE and "epoch 1" not in output
    if world.rank == 0:
        assert words in errors and errors.count("\n") == 1


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_missing_package_is_told_with_its_extra(directory, command, monkeypatch, name):
    (directory / f"{name}.py").write_text(f"raise ImportError('no {name} here')\n")
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, name, raising=False)
    status, _, errors = command(*COMMON, f"--logger={name}", "--run-dir=run")
    assert status == USAGE and not (directory / "run").exists()
    assert f"no {name} here" in errors and f"pip install apts_mpi[{name}]" in errors


def test_new_columns(tmp_path):
    """Of a run that goes on with other options; rows before have nothing there, and none is lost."""
    setting = LoggerSetting(tmp_path, 0, [], {}, print)
    loggers = Loggers({"csv": KINDS["csv"]}, setting)
    loggers.record({"iteration": 1, "epoch": 1, "loss": 2.0, "global_step": {"rho": 0.5}, "gone": None})
    loggers.record({"iteration": 2, "epoch": 1, "loss": 1.0, "more": True})
    loggers.record({"iteration": 3, "epoch": 1, "loss": float("nan"), "global_step": {"rho": 0.25}})
    loggers.end({"reason": "LIMIT_EPOCHS"})
    loggers.close()
    assert loggers.failure == ""
    assert (tmp_path / "iterations.csv").read_text().splitlines() == [
        "iteration,epoch,loss,global_step/rho,more", "1,1,2.0,0.5,", "2,1,1.0,,1.0", "3,1,nan,0.25,",
    ]  # fmt: skip


def test_place_that_cannot_be_written_is_told(tmp_path):
    with pytest.raises(InvalidInput, match="csv cannot write to"):
        (tmp_path / "iterations.csv").mkdir()
        Loggers({"csv": KINDS["csv"]}, LoggerSetting(tmp_path, 0, [], {}, print))


@pytest.mark.filterwarnings("ignore")
def test_mlflow(directory, trained):
    tracking = pytest.importorskip("mlflow.tracking")
    trained(*COMMON, "--logger=mlflow", "--run-dir=run")
    client = tracking.MlflowClient(tracking_uri=f"sqlite:///{directory / 'run' / 'mlflow.db'}")
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED" and run.data.tags["reason"] == "LIMIT_EPOCHS"
    records = history(directory / "run")
    for kind, name in (("iteration", "loss"), ("epoch", "train_loss")):
        found = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, f"{kind}/{name}")]
        assert found == [(record["iteration"], record[name]) for record in records if name in record]
    assert run.data.params["batch_size"] == "30"


@pytest.mark.processes
def test_wandb(tmp_path):
    pytest.importorskip("wandb")
    done = start(tmp_path, None, [*COMMON, "--logger=wandb", "--run-dir=run"])
    assert done.returncode == 0 and "LIMIT_EPOCHS" in done.stdout, done.stderr
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    content = file.read_bytes()
    assert b"iteration/loss" in content and b"epoch/test_loss" in content
