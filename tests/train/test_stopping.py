"""``--stop-on``, ``--keep-best``, tolerances, and the reason why a run ended."""

import json
import math

import pytest
import torch
from mpi4py import MPI
from torch import nn

from apts_mpi.checkpoint import Checkpoint, CheckpointDirectory
from apts_mpi.errors import InvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems import Problem
from apts_mpi.tools.events import Events
from apts_mpi.train.ending import Ending
from apts_mpi.train.layouts import train_problem
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.progress import Progress
from apts_mpi.train.stopping import Reason, Stopping, metric_and_sign

USAGE = 2
PROBLEM = "--problem=networks:problem"
COMMON = f"{PROBLEM} --dtype=float64 --device=cpu --batch-size=30 --trust-region.initial-radius=0.01".split()
REPLICATED = [*COMMON, *"--local.solver=sgd --schwarz.variant=exact --schwarz.local_data=shard --coarse=none".split()]
STAGED = [*COMMON, *"--layout=staged --micro-batches=2 --local.solver=sgd".split()]
LAYOUTS = pytest.mark.parametrize("arguments", [REPLICATED, STAGED], ids=["replicated", "staged"])

NAMES = ["train_loss", "train_accuracy", "test_loss", "relative_l2_error", "f1", "accuracy_loss"]


def summary_of(path):
    return json.loads((path / "summary.json").read_text())


def epochs_of(path):
    records = map(json.loads, (path / "history.jsonl").read_text().splitlines())
    return [record for record in records if "train_loss" in record]


def last_line(output):
    return output.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("test_loss", ("test_loss", 1.0)),
        ("train_accuracy", ("train_accuracy", -1.0)),
        ("relative_l2_error", ("relative_l2_error", 1.0)),
        ("max:f1", ("f1", -1.0)),
        ("min:train_accuracy", ("train_accuracy", 1.0)),
    ],
)
def test_direction_of_a_metric(asked, found):
    assert metric_and_sign(asked, NAMES) == found


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("test_los", "stop_on: 'test_los' is no metric of this run; did you mean test_loss.* it has train_loss, "),
        ("zebra", "'zebra' is no metric of this run; it has"),
        ("f1", "whether less or more of f1 is better is not known; write min:f1 or max:f1"),
        ("accuracy_loss", "write min:accuracy_loss"),
        ("most:f1", "stop_on: 'most:f1' is not allowed; write min:f1 or max:f1"),
    ],
)
def test_what_is_no_metric_is_refused(asked, words):
    with pytest.raises(InvalidInput, match=words):
        metric_and_sign(asked, NAMES)


def watch(values, patience=2, stop_on="test_loss"):
    """Best value and epoch, and after how many epochs it ends."""
    stopping = Stopping(TrainingOptions(stop_on=stop_on, patience=patience), 1, [stop_on])
    for epoch, value in enumerate(values, 1):
        stopping.see_epoch(epoch, epoch, {"train_loss": 1.0, stop_on: value})
        if stopping.reason is not None:
            return stopping.state.best, stopping.state.best_epoch, epoch
    return stopping.state.best, stopping.state.best_epoch, None


def test_what_is_the_best():
    assert watch([3.0, 2.0, 2.0, 2.5, 1.0]) == (2.0, 2, 4)
    assert watch([3.0, 4.0, 2.0, math.nan, 1.0]) == (1.0, 5, None)
    assert watch([math.nan, -math.inf, 1.0]) == (None, 0, 2)
    assert watch([0.5, 0.4, 0.6, math.nan, 0.1], stop_on="test_accuracy") == (0.6, 3, 5)
    assert watch([3.0, 4.0, 5.0, 6.0], patience=None) == (3.0, 1, None)


def test_gradients_of_an_epoch_of_batches_in_a_row():
    stopping = Stopping(TrainingOptions(gradient_tolerance=0.1, relative_gradient_tolerance=0.01), 2, [])
    for norm in (4.0, 0.05, 0.2, 0.03, math.nan):
        stopping.see_iteration(norm, True)
        assert stopping.reason is None
    stopping.see_iteration(0.05, True)
    stopping.see_iteration(0.05, False)  # a batch that is tried again counts once
    assert stopping.reason is None
    stopping.see_iteration(0.06, True)
    assert stopping.reason is Reason.CONVERGED_GRADIENT
    other = Stopping(TrainingOptions(relative_gradient_tolerance=0.01), 2, [])
    for norm in (0.0, 4.0, 0.04, 0.03):
        assert other.reason is None
        other.see_iteration(norm, True)
    assert other.reason is Reason.CONVERGED_RELATIVE_GRADIENT


RISING = "--stop-on=max:train_loss --patience=2 --keep-best --epochs=9 --checkpoint-keep-last=1 --checkpoint-every=1"


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@LAYOUTS
def test_run_stops_and_keeps_the_best(world, directory, trained, arguments):
    """The largest loss is the first epoch's: whoever watches that stops two epochs later, and can go on from there."""
    output = trained(*arguments, *RISING.split(), "--run-dir=run")
    resumed = trained(PROBLEM, "--resume=run/checkpoints/best", "--run-dir=other")
    again = trained(PROBLEM, "--resume", "--run-dir=run")
    longer = trained(PROBLEM, "--resume", "--run-dir=run", "--patience=3")
    if world.rank > 0:
        return
    assert last_line(output).startswith("STOPPED_EARLY: ended after iteration ")
    assert last_line(again) == last_line(output)
    for path, output, epochs in ((directory / "run", longer, 4), (directory / "other", resumed, 3)):
        found, records = summary_of(path), epochs_of(path)
        assert last_line(output).startswith("STOPPED_EARLY") and found["reason"] == "STOPPED_EARLY"
        assert len(records) == epochs and found["best_epoch"] == 1
        assert found["best_train_loss"] == records[0]["train_loss"] == max(record["train_loss"] for record in records)
    names = {file.name for file in (directory / "run" / "checkpoints").glob("*.h5")}
    best = records[0]["iteration"]
    assert len(names) == 2 and f"step-{best:08d}.h5" in names
    with Checkpoint(directory / "run" / "checkpoints" / "best") as checkpoint:
        checkpoint.verify()
        assert checkpoint.step == best and checkpoint.metadata["stopping"]["best_iteration"] == best
    assert "the best checkpoint so far" in resumed and "the best checkpoint so far" not in longer


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@LAYOUTS
def test_interrupted_counter_goes_on(world, directory, trained, arguments):
    watched = "--stop-on=max:train_loss --patience=3 --epochs=9".split()
    trained(*arguments, *watched, "--run-dir=whole")
    trained(*arguments, *watched, "--run-dir=parts", "--max-iterations=5")
    trained(PROBLEM, "--resume", "--run-dir=parts", "--max-iterations=100")
    if world.rank == 0:
        whole, parts = summary_of(directory / "whole"), summary_of(directory / "parts")
        names = ("reason", "iterations", "epochs", "best_epoch", "best_train_loss", "test_loss")
        assert [whole[name] for name in names] == [parts[name] for name in names]
        assert whole["reason"] == "STOPPED_EARLY" and whole["epochs"] == 4


ENDS = {
    "--epochs=2": "LIMIT_EPOCHS",
    "--max-iterations=3": "LIMIT_ITERATIONS",
    "--max-seconds=1e-9": "LIMIT_SECONDS",
    "--target-loss=100": "CONVERGED_TARGET",
    "--gradient-tolerance=1e9": "CONVERGED_GRADIENT",
    "--relative-gradient-tolerance=1e9": "CONVERGED_RELATIVE_GRADIENT",
}


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize("option", ENDS)
@LAYOUTS
def test_reasons(world, directory, trained, arguments, option):
    output = trained(*arguments, "--epochs=7", option, "--run-dir=run")
    if world.rank == 0:
        found = summary_of(directory / "run")
        assert found["reason"] == ENDS[option] and last_line(output).startswith(f"{ENDS[option]}: ")
        batches = found["iterations"] / found["epochs"] if found["epochs"] else 0
        if "gradient" in option or "target" in option:
            assert found["epochs"] == 1 and batches >= 2  # not the first batch alone


@pytest.mark.parametrize(
    ("options", "progress", "watched", "reason"),
    [
        ({}, {"epoch": 2}, {}, None),
        ({}, {"epoch": 3}, {}, Reason.LIMIT_EPOCHS),
        ({"max_iterations": 5}, {"iteration": 5}, {}, Reason.LIMIT_ITERATIONS),
        ({"max_seconds": 2.0}, {"seconds": 2.0}, {}, Reason.LIMIT_SECONDS),
        ({"max_cpu_seconds": 2.0}, {"cpu_seconds": 2.0}, {}, Reason.LIMIT_SECONDS),
        ({}, {"at_rest": 4, "epoch": 3}, {}, Reason.AT_REST),
        ({"target_loss": 0.5}, {}, {"train_loss": 0.5}, Reason.CONVERGED_TARGET),
        ({"gradient_tolerance": 0.1}, {"epoch": 3}, {"small": 4}, Reason.CONVERGED_GRADIENT),
        ({"relative_gradient_tolerance": 0.1}, {}, {"relatively_small": 4}, Reason.CONVERGED_RELATIVE_GRADIENT),
        ({"stop_on": "test_loss", "patience": 2}, {}, {"waited": 2}, Reason.STOPPED_EARLY),
    ],
)
def test_every_reason_by_what_is_known(options, progress, watched, reason):
    """Of two epochs of four batches; a loss that is no number is the reason where a limit would be."""
    asked = TrainingOptions(**options)
    stopping = Stopping(asked, 4, NAMES)
    for name, value in watched.items():
        setattr(stopping.state, name, value)
    ending, at = Ending(asked, 2, 4, stopping, Communicator(MPI.COMM_SELF, Events())), Progress(**progress)
    ending.look(at)
    assert ending.due(at) is ending.reason(at) is reason
    ending.diverged = True
    limits = (Reason.LIMIT_EPOCHS, Reason.LIMIT_ITERATIONS, Reason.LIMIT_SECONDS)
    assert ending.reason(at) is (Reason.DIVERGED_LOSS if reason in limits else reason)
    ending.interrupted = True
    assert ending.reason(at) is Reason.INTERRUPTED


def test_every_reason_has_words():
    assert all(reason.words and reason.value.isupper() for reason in Reason)


def test_other_optimizers_have_reasons(directory, trained):
    output = trained(*COMMON, "--optimizer=sgd", "--learning-rate=1e308", "--epochs=2", "--run-dir=run")
    assert (
        last_line(output).startswith("DIVERGED_LOSS: ") and summary_of(directory / "run")["reason"] == "DIVERGED_LOSS"
    )
    output = trained(*COMMON, "--optimizer=adam", "--epochs=20", "--gradient-tolerance=1e9", "--run-dir=other")
    assert last_line(output).startswith("CONVERGED_GRADIENT: converged after iteration ")


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@LAYOUTS
def test_wrong_names_are_told_before_the_work(world, directory, command, arguments):
    status, output, errors = command(*arguments, "--stop-on=test_acuracy", "--run-dir=run")
    assert status == USAGE and "epoch 1" not in output and not (directory / "run").exists()
    if world.rank == 0:
        assert "did you mean test_accuracy?" in errors and errors.count("\n") == 1


@pytest.mark.mpi
def test_reason_for_a_program(world):
    torch.manual_seed(0)
    data = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64)
    problem = Problem(
        name="line", network=nn.Linear(3, 1, dtype=torch.float64), loss=nn.functional.mse_loss, train=data
    )
    options = TrainingOptions(epochs=50, relative_gradient_tolerance=1e-6, dtype="float64", subdomains=1)
    training = train_problem(problem, options, torch.device("cpu"), world)
    assert training.reason is None
    training.run(lambda record: None)
    assert training.reason is Reason.CONVERGED_RELATIVE_GRADIENT
    assert set(world.allgather(training.reason)) == {training.reason}


def test_link_to_what_is_no_longer_the_best_goes(tmp_path):
    """A run that goes on from before it saves another network under its number."""
    with CheckpointDirectory(tmp_path, Communicator(MPI.COMM_SELF, Events()), keep_last=1) as checkpoints:
        for step, best in ((1, False), (2, True), (3, False), (4, False)):
            checkpoints.save([], {}, step, best)
        checkpoints.finish_removal()
        assert sorted(path.name for path in tmp_path.glob("*.h5")) == ["step-00000002.h5", "step-00000004.h5"]
        assert (tmp_path / "best").resolve().name == "step-00000002.h5"
        checkpoints.start_save([], {}, 2)
        checkpoints.finish()
        assert not (tmp_path / "best").is_symlink()
        assert checkpoints.name_best(4) and not checkpoints.name_best(9) and not (tmp_path / "best").is_symlink()
        checkpoints.name_best(4)
        checkpoints.clear()
        assert not (tmp_path / "best").is_symlink()
