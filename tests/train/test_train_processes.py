"""The command line as users call it: ``python -m apts_mpi.train``, alone and with mpirun."""

import json
import time

import pytest
from mpi4py import MPI
from processes import SMALL, needs_mpirun, start

pytestmark = pytest.mark.processes


@pytest.mark.slow
@needs_mpirun
def test_alone_and_with_mpirun(tmp_path):
    """The same records, whatever the number of ranks."""
    losses = []
    for ranks in (None, 2, 4):
        run = start(tmp_path, ranks, [*SMALL, f"--run-dir=run_{ranks}"])
        assert run.returncode == 0, run.stderr
        assert run.stderr == ""
        assert run.stdout.count("accepted steps") == 1
        path = tmp_path / f"run_{ranks}"
        assert {file.name for file in path.iterdir()} == {"checkpoints", "config.yaml", "history.jsonl", "summary.json"}
        assert json.loads((path / "summary.json").read_text())["ranks"] == (ranks or 1)
        records = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
        losses.append([record.get("loss", record.get("train_loss")) for record in records])
    assert len(losses[0]) == 3
    for others in losses[1:]:
        assert others == pytest.approx(losses[0], rel=1e-10)


@needs_mpirun
def test_bad_option_is_told_once_by_all_ranks(tmp_path):
    """A message, no traceback, no run directory, no rank left waiting."""
    run = start(tmp_path, 2, [*SMALL, "--subdomains=100"])
    assert run.returncode != 0
    assert run.stderr.count("apts_mpi.train: error: subdomains: 100 is too many") == 1
    assert "Traceback" not in run.stderr and run.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [0, 1])
def test_launcher_of_another_mpi(tmp_path, number):
    """It says that there are two processes, while the library knows one: else both would train, each by itself."""
    mpich = MPI.get_vendor()[0] == "MPICH"
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK") if mpich else ("PMI_SIZE", "PMI_RANK")
    run = start(tmp_path, None, SMALL, **dict(zip(names, ("2", str(number)), strict=True)))
    assert run.returncode != 0 and run.stdout == ""
    message = "the launcher started 2 processes, but MPI has 1: mpirun belongs to another MPI"
    assert run.stderr.count(message) == (number == 0)
    assert number == 1 or "MPI4PY_MPIABI" in run.stderr
    assert list(tmp_path.iterdir()) == []


PROBLEMS = """
import time
from pathlib import Path

import networks
import torch
from mpi4py import MPI

calls = 0


def failing_loss(outputs, targets):
    global calls
    calls += 1
    if calls > 5 and MPI.COMM_WORLD.rank == 1:
        Path("failed_at").write_text(str(time.time()))
        raise RuntimeError("out of luck")
    return networks.cross_entropy(outputs, targets)


def fails_later():
    network, _, data = networks.problem()
    return network, failing_loss, data


def without_reduction(outputs, targets):
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


def vector_loss():
    network, _, data = networks.problem()
    return network, without_reduction, data
"""


@needs_mpirun
def test_error_on_one_rank_ends_all(tmp_path):
    (tmp_path / "problems.py").write_text(PROBLEMS)
    run = start(tmp_path, 3, [*SMALL, "--problem=problems:fails_later", "--epochs=1000"])
    assert run.returncode != 0
    assert time.time() - float((tmp_path / "failed_at").read_text()) < 10.0
    assert run.stderr.count("apts_mpi.train: rank 1 failed and ends the run") == 1
    assert run.stderr.count("RuntimeError: out of luck") == 1
    assert "problems.py" in run.stderr and "train loss" not in run.stdout


@needs_mpirun
def test_loss_that_is_no_mean_ends_all_ranks(tmp_path):
    (tmp_path / "problems.py").write_text(PROBLEMS)
    run = start(tmp_path, 2, [*SMALL, "--problem=problems:vector_loss"])
    assert run.returncode != 0 and "train loss" not in run.stdout
    assert "apts_mpi.train" in run.stderr
