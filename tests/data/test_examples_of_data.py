"""The programs of the page "From a PyTorch program" on data, as users start them."""

import json
import shutil
from pathlib import Path

import pytest
from processes import needs_mpirun, start

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

# Trains within a limit on the memory that is taken from now on: what the imports took depends on the machine.
WITHIN = """
import resource
import sys
import h5py, mpi4py.MPI, torch, torch._dynamo
import apts_mpi.train.layouts, apts_mpi.train.run
from apts_mpi.train.__main__ import main

(line,) = [line for line in open("/proc/self/status") if line.startswith("VmData")]
most = int(line.split()[1]) * 1024 + int(sys.argv.pop(1)) * 1_000_000
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
main(sys.argv[1:])
"""


def last_record(path):
    return json.loads((path / "history.jsonl").read_text().splitlines()[-1])


@needs_mpirun
@pytest.mark.processes
@pytest.mark.slow
def test_a_loader_with_augmentation(tmp_path):
    name = f"--problem={EXAMPLES}/augmented_loader.py:problem"
    for workers in (0, 2):
        job = start(
            tmp_path,
            2,
            [
                name,
                "--problem.args.width=16",
                f"--problem.args.workers={workers}",
                "--epochs=1",
                f"--run_dir=w{workers}",
            ],
        )
        assert job.returncode == 0, job.stderr
    one, other = (last_record(tmp_path / f"w{workers}") for workers in (0, 2))
    assert one["test_loss"] == other["test_loss"] < 2.2


@pytest.mark.processes
@pytest.mark.slow
def test_images_that_do_not_fit_into_memory(tmp_path):
    """A file of 440 MB, trained on with 150 MB."""
    shutil.copy(EXAMPLES / "hdf5_images.py", tmp_path)
    (tmp_path / "within.py").write_text(WITHIN)
    written = start(tmp_path, None, ["images.h5", "400"], "hdf5_images")
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "images.h5").stat().st_size > 400e6
    arguments = "--problem=hdf5:images.h5 --network=hdf5_images.py:network --batch_size=100 --max_iterations=4"
    job = start(tmp_path, None, ["150", *arguments.split(), "--device=cpu", "--run_dir=run"], "within")
    assert job.returncode == 0, job.stderr
    assert last_record(tmp_path / "run")["test_loss"] < 2.0
