"""That faults are drawn as their seed says, and that a run which does not stand one is counted so."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import needs_mpirun, start, surroundings
from rich.console import Console

from apts_mpi.bench import fault_runs
from apts_mpi.bench.fault_kinds import ENDED, KINDS, STOPPED, Going, InLoss, Kind, Signal
from apts_mpi.bench.fault_runs import Finished, References
from apts_mpi.bench.faults import HUNG, LOST, RIGHT, WRONG, campaign, carry_out, draws


def first(seed, count=100, ranks=4):
    return list(itertools.islice(draws(seed, ranks), count))


def test_a_seed_repeats_its_draws():
    assert first(7) == first(7)
    assert [fault.kind for fault in first(7)] != [fault.kind for fault in first(8)]


def test_what_is_drawn():
    """Each kind once before one comes twice, and only what so many ranks can have."""
    faults = first(3, 400)
    assert {fault.kind for fault in faults[: len(KINDS)]} == {kind.name for kind in KINDS}
    assert len({kind.name for kind in KINDS}) == len(KINDS)
    assert {fault.setting.ranks for fault in faults} == {fault.resumed.ranks for fault in faults} == {1, 2, 3, 4}
    assert {fault.setting.layout for fault in faults} == {"replicated", "staged"}
    assert all(fault.place.rank < fault.setting.ranks for fault in faults)
    assert all(fault.setting.launched or fault.setting.ranks == 1 for fault in faults)
    alone = first(3, 100, ranks=1)
    assert {fault.setting.ranks for fault in alone} == {1}
    assert {kind.name for kind in KINDS if kind.least > 1}.isdisjoint(fault.kind for fault in alone)


class Misled(Kind):
    """What was saved is removed, and asked for."""

    name = "removed without a word"

    def harm(self, checkpoints, steps, place):
        for step in steps:
            (checkpoints / f"step-{step:08d}.h5").unlink()
        return Going(steps[-1])


class Standing(Kind):
    """A rank never comes back, and the others wait for it as long."""

    name = "standing"
    action = "print('stands', flush=True); time.sleep(10000)"
    options = ("--stall-timeout=1000",)
    least = 2
    compares = False

    def do(self, job, place):
        job.wait_for("stands")
        return ENDED


def outcome_of(kind, directory, ranks=1):
    """Of one fault of a kind."""
    fault = next(draws(1, ranks, [kind]))
    return carry_out(fault, kind, directory / "fault", References(directory / "never-stopped"))


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "verdict", "words"),
    [
        (Signal(signal.SIGTERM, True, STOPPED), RIGHT, ""),
        (Signal(signal.SIGTERM, True, ENDED), WRONG, "status 75, where it should have failed"),
        (InLoss("an exception", "raise ValueError", "KeyError"), WRONG, "it did not say 'KeyError'"),
        (Misled(), LOST, "resumed after iteration 0, where"),
    ],
    ids=["right", "wrong status", "wrong words", "lost"],
)
def test_what_an_outcome_is_counted_as(tmp_path, kind, verdict, words):
    outcome = outcome_of(kind, tmp_path)
    assert outcome.verdict == verdict and words in outcome.reason, outcome


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
def test_job_that_hangs_is_ended(tmp_path, monkeypatch):
    """With all its processes, and the count says so."""
    monkeypatch.setattr(fault_runs, "LIMIT", 20.0)
    monkeypatch.setattr(fault_runs, "SETTLED", 0.5)
    output = io.StringIO()
    assert campaign(1.0, 1, 2, tmp_path / "faults", [Standing()], Console(file=output, width=160)) == 1
    (fault,) = json.loads((tmp_path / "faults" / "faults.json").read_text())["faults"]
    assert fault["verdict"] == HUNG, output.getvalue()
    assert "stands" in (tmp_path / "faults" / "0000" / "fault.txt").read_text()
    deadline = time.monotonic() + 5.0
    while working_in(tmp_path / "faults" / "0000"):  # a process that was killed takes a moment to go
        assert time.monotonic() < deadline
        time.sleep(0.05)


def working_in(directory):
    """Whether a process has this directory as its own."""
    return str(directory) in [os.path.realpath(place) for place in Path("/proc").glob("[0-9]*/cwd")]


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
def test_command(tmp_path):
    """As a user starts it; what is right leaves nothing but the record."""
    arguments = ["faults", "--seconds=80", "--seed=5", "--ranks=2", f"--directory={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "apts_mpi.bench", *arguments],
        env=surroundings(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "faults-5" / "faults.json").read_text())
    assert record["seed"] == 5 and record["versions"]["torch"]
    counts = record["counts"]
    assert counts["right"] >= 3 and counts["wrong"] == counts["lost"] == counts["hung"] == 0
    drawn = [(fault.kind, fault.place.rank) for fault in first(5, len(record["faults"]), ranks=2)]
    assert [(fault["kind"], fault["place"]["rank"]) for fault in record["faults"]] == drawn
    assert {path.name for path in (tmp_path / "faults-5").iterdir()} == {"faults.json", "never-stopped"}


@pytest.mark.processes
@needs_mpirun
def test_command_is_one_process(tmp_path):
    done = start(tmp_path, 2, ["faults", "--seconds=1"], module="apts_mpi.bench")
    assert done.returncode == 2 and done.stderr.count("error: apts_mpi.bench faults starts mpirun itself") == 1


def finished(losses):
    return Finished([{"iteration": number, "loss": loss} for number, loss in enumerate(losses)], {})


def test_runs_on_other_ranks_may_differ_by_rounding_alone():
    whole = finished([1.0, 0.5])
    assert whole.difference(finished([1.0, 0.5]), same_ranks=True) == ""
    assert "other records" in whole.difference(finished([1.0, 0.5 + 1e-15]), same_ranks=True)
    assert whole.difference(finished([1.0, 0.5 + 1e-10]), same_ranks=False) == ""
    assert "losses differ by 2.0e-06" in whole.difference(finished([1.0, 0.5 + 1e-6]), same_ranks=False)
    assert "1 losses instead of 2" in whole.difference(finished([1.0]), same_ranks=False)
    assert "losses differ" in whole.difference(finished([1.0, None]), same_ranks=False)
