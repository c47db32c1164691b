"""Faults that real jobs meet while they save: a rank killed, a disk full or read-only, another run in the directory."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from processes import LIMIT, find_mpirun, needs_mpirun, surroundings
from test_checkpoint_storage import WRITERS
from thread_ranks import on_ranks

from apts_mpi.checkpoint import newest_valid

pytestmark = pytest.mark.processes

RANKS = 3

# Each rank of a job begins with this; `save` gives arrays that tell their step.
BEGIN = """
import os, sys
from pathlib import Path
import numpy as np
from mpi4py import MPI
from apts_mpi.checkpoint import CheckpointDirectory, newest_valid, saving, split_evenly
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.errors import InvalidInput
from apts_mpi.tools.events import Events

directory, writer = Path(sys.argv[1]), sys.argv[2]
comm = Communicator(MPI.COMM_WORLD, Events())

def save(checkpoints, step, rows=300):
    arrays = {"a": np.full((rows, 10), float(step)), "b": np.full(7, step), "c": np.array(step)}
    checkpoints.save(split_evenly(arrays, comm), {"step": step}, step)
"""

SAVE_FOR_EVER = f"""{BEGIN}
first = 0
if directory.is_dir() and any(directory.glob("step-*.h5")):
    with newest_valid(directory, comm)[0] as checkpoint:
        first = checkpoint.step
with CheckpointDirectory(directory, comm, writer=writer) as checkpoints:
    Path(f"pid_{{comm.rank}}").write_text(str(os.getpid()))
    for step in range(first, 1_000_000):  # begins with the one that is there
        save(checkpoints, step)
"""

SAVE_ONCE = f"""{BEGIN}
with CheckpointDirectory(directory, comm, writer=writer) as checkpoints:
    save(checkpoints, 1)
"""

# Ends while the checkpoint of step 2 gets its names: after so many of them.
KILLED_BETWEEN = f"""{BEGIN}
with CheckpointDirectory(directory, comm, writer=writer) as checkpoints:
    save(checkpoints, 1)
    replace, names = os.replace, []
    def ended(source, destination):
        if len(names) == {{names}}:
            os._exit(9)
        replace(source, destination)
        names.append(destination)
    os.replace = ended
    save(checkpoints, 2)
    os._exit(9)
"""

SAVE_TOO_MUCH = f"""{BEGIN}
with CheckpointDirectory(directory, comm, writer=writer) as checkpoints:
    save(checkpoints, 1)
    before = sorted(directory.iterdir())
    try:
        save(checkpoints, 2, rows=100_000)
    except InvalidInput as error:
        if comm.rank == 0:
            print(error)
    comm.collect(None)
    assert sorted(directory.iterdir()) == before
    save(checkpoints, 3)
"""

# What another program writes at the wrong moment, after this one has seen that there is space.
SPACE_LOST = f"""{BEGIN}
def lose_space(self):
    if self.step > 1 and comm.rank == 0:
        try:
            with open(directory / "others", "wb") as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            pass
    comm.collect(None)

saving.Saving._check_space = lose_space
with CheckpointDirectory(directory, comm, writer=writer) as checkpoints:
    save(checkpoints, 1)
    save(checkpoints, 2, rows=50_000)
"""

SAVE_OR_SAY_WHY = f"""{BEGIN}
try:
    with CheckpointDirectory(directory, comm, writer=writer) as checkpoints:
        save(checkpoints, 2)
except InvalidInput as error:
    if comm.rank == 0:
        print(error)
"""


class Job:
    """A job of `RANKS` ranks under mpirun, with its own process group, ended at the end of a ``with`` block."""

    def __init__(self, script, place, writer):
        command = [find_mpirun(), "-n", str(RANKS), sys.executable, "-c", script, "checkpoints", writer]
        self.process = subprocess.Popen(
            command, cwd=place, env=surroundings(place), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip

    def end(self):
        """Wait; return status, output and errors."""
        output, errors = self.process.communicate(timeout=2 * LIMIT)  # a write that hangs is ended after one minute
        return self.process.returncode, output, errors

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()


def run(script, place, writer):
    with Job(script, place, writer) as job:
        return job.end()


def newest_step(directory):
    """Step of the newest checkpoint, after a look at its values; none may be damaged."""

    def look(comm):
        checkpoint, messages = newest_valid(directory, comm)
        assert not messages
        with checkpoint:
            assert checkpoint.metadata == {"step": checkpoint.step}
            assert all((checkpoint.read(name) == checkpoint.step).all() for name in "abc")
            return checkpoint.step

    return on_ranks(1, look)[0]


def latest(directory):
    """Name of the latest checkpoint; None before the first."""
    link = directory / "latest"
    return os.readlink(link) if link.is_symlink() else None


def wait_for(condition):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def small_disk(tmp_path):
    """A directory of 4 MB on a file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if shutil.which("mount") is None or not mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", path):
        pytest.skip("needs the right to mount a file system")
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


def mount(*arguments):
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


@pytest.mark.slow
@needs_mpirun
@pytest.mark.parametrize("writer", WRITERS)
def test_a_rank_is_killed_while_all_save(tmp_path, writer):
    """The job ends, a valid checkpoint is there, and the next job goes on from it."""
    chance = random.Random(1)
    steps = []
    pids = [tmp_path / f"pid_{rank}" for rank in range(RANKS)]
    directory = tmp_path / "checkpoints"
    for kill in range(4):
        with Job(SAVE_FOR_EVER, tmp_path, writer) as job:
            before = latest(directory)
            wait_for(lambda before=before: latest(directory) not in (None, before))
            time.sleep(chance.uniform(0, 0.3))
            assert job.process.poll() is None
            os.kill(int(pids[kill % RANKS].read_text()), signal.SIGKILL)
            assert job.end()[0] != 0
        steps.append(newest_step(directory))
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(("names", "newest"), [(0, 1), (1, 2), (2, 2)])
def test_killed_between_the_names_of_a_checkpoint(tmp_path, names, newest):
    """It is the latest as soon as its file has its name, also for the next run, which saves an earlier step."""
    assert run(KILLED_BETWEEN.replace("{names}", str(names)), tmp_path, "parts")[0] != 0
    assert newest_step(tmp_path / "checkpoints") == newest
    assert run(SAVE_ONCE, tmp_path, "parts")[0] == 0
    assert newest_step(tmp_path / "checkpoints") == 1
    assert list((tmp_path / "checkpoints").glob(".step-*")) == []


@needs_mpirun
@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk(small_disk, writer):
    """Told once, with the directory as it was; smaller checkpoints are still saved."""
    status, output, errors = run(SAVE_TOO_MUCH, small_disk, writer)
    assert status == 0, errors
    assert output.count("directory 'checkpoints' cannot be written (") == 1
    assert "No space left on device" in output and "free some space" in output
    assert newest_step(small_disk / "checkpoints") == 3


@pytest.mark.slow
@needs_mpirun
@pytest.mark.parametrize("writer", WRITERS)
def test_space_lost_while_saving(small_disk, writer):
    """HDF5 may crash on a full disk. The job ends, and the earlier checkpoint is as it was and is where to go on."""
    status, _, errors = run(SPACE_LOST, small_disk, writer)
    assert status != 0, errors
    assert newest_step(small_disk / "checkpoints") == 1
    (small_disk / "checkpoints" / "others").unlink()
    status, _, errors = run(SAVE_OR_SAY_WHY, small_disk, writer)
    assert status == 0, errors
    assert newest_step(small_disk / "checkpoints") == 2


@pytest.mark.slow
@needs_mpirun
@pytest.mark.parametrize("writer", WRITERS)
def test_read_only_file_system(small_disk, writer):
    """Told once; what is there can be read."""
    assert run(SAVE_ONCE, small_disk, writer)[0] == 0
    assert mount("-o", "remount,ro", small_disk)
    status, output, errors = run(SAVE_OR_SAY_WHY, small_disk, writer)
    assert status == 0, errors
    assert output.count("Read-only file system") == 1
    assert "directory 'checkpoints' cannot be written" in output
    assert newest_step(small_disk / "checkpoints") == 1


@needs_mpirun
def test_two_jobs_in_one_directory(tmp_path):
    """The second is told; the first goes on."""
    with Job(SAVE_FOR_EVER, tmp_path, "parts") as first:
        wait_for((tmp_path / "checkpoints" / "latest").exists)
        status, output, errors = run(SAVE_OR_SAY_WHY, tmp_path, "parts")
        assert status == 0, errors
        assert output.count("directory 'checkpoints': another run saves checkpoints into it") == 1
        before = latest(tmp_path / "checkpoints")
        wait_for(lambda: latest(tmp_path / "checkpoints") != before)
        assert first.process.poll() is None
