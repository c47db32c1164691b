"""The network of a job, measured among its ranks."""

import json

import pytest
from processes import needs_mpirun, start

from apts_mpi.scaling.network import read_network


@pytest.mark.processes
@needs_mpirun
def test_a_machine_file(tmp_path):
    job = start(tmp_path, 2, ["network", "machine.json"], "apts_mpi.scaling")
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("us a call from Python without a message: machine.json") == 1
    found = read_network(str(tmp_path / "machine.json"))
    assert json.loads((tmp_path / "machine.json").read_text())["topology"] == found.topology == "flat"
    # Memory of one machine, however busy: less than a millisecond a message, and more than a megabyte a second.
    assert found.latency < 1e-3 and found.bandwidth > 1e6


@pytest.mark.processes
@needs_mpirun
def test_one_rank_has_no_network(tmp_path):
    job = start(tmp_path, 1, ["network", "machine.json"], "apts_mpi.scaling")
    assert job.returncode == 2
    assert "there is one rank, and no message; start it with mpirun -n 2 or more" in job.stderr
    assert not (tmp_path / "machine.json").exists()


@pytest.mark.processes
@needs_mpirun
def test_a_file_that_cannot_be_written(tmp_path):
    job = start(tmp_path, 2, ["network", "nowhere/machine.json"], "apts_mpi.scaling")
    assert job.returncode == 2
    assert job.stderr.count("'nowhere/machine.json' cannot be written") == 1
