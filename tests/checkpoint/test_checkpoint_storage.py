"""Checkpoints on disk: what was saved is read, whatever the ranks; a broken file is never made and never believed."""

import errno
import math
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from processes import TESTS
from thread_ranks import on_ranks

from apts_mpi.checkpoint import (
    Array,
    Checkpoint,
    CheckpointDirectory,
    DamagedCheckpoint,
    Slab,
    claim,
    directory,
    newest_valid,
    open_checkpoint,
    resolve,
    saving,
    seals,
    split_evenly,
    writers,
)
from apts_mpi.errors import InvalidInput, SharedInvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import Events

# A single rank has nothing to write together, so there they are the same.
WRITERS = (
    "parts",
    pytest.param("mpio", marks=pytest.mark.skipif(not h5py.get_config().mpi, reason="h5py was built without MPI")),
)

DTYPES = ("float32", "float64", "int64", "int32", "uint8", "bool", "complex128")


@pytest.fixture
def comm(world):
    return Communicator(world, Events())


def network(step=0):
    """Arrays as of a small network, different at each step."""
    random = np.random.default_rng(step)
    return {
        "parameters/0.weight": random.random((7, 5), dtype=np.float32),
        "parameters/0.bias": random.random(7),
        "parameters/one_row": random.random((1, 40)),
        "buffers/1.running_mean": random.random(3),
        "buffers/1.num_batches_tracked": np.array(step),
        "solver/none": np.zeros((0, 3)),
    }


def assert_holds(checkpoint, arrays):
    assert set(checkpoint.names) == set(arrays)
    for name, values in arrays.items():
        read = checkpoint.read(name)
        assert (
            (read.shape, read.dtype) == (values.shape, values.dtype) == (checkpoint.shape(name), checkpoint.dtype(name))
        )
        assert read.tobytes() == values.tobytes()


def save(path, comm, step=1, arrays=None, **options):
    with CheckpointDirectory(path, comm, **options) as checkpoints:
        return checkpoints.save(split_evenly(arrays or network(step), comm), {"step": step}, step)


def listing(path, comm):
    """Names in a directory, without the lock, once all ranks have done what they do there."""
    comm.collect(None)
    names = sorted({file.name for file in path.iterdir()} - {claim.LOCK})
    comm.collect(None)
    return names


def files_of(path):
    """A checkpoint's files: the main one, then its parts."""
    with Checkpoint(path) as checkpoint:
        return [path, *sorted((path.parent / checkpoint.parts).iterdir())] if checkpoint.parts else [path]


# Round trips


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("writer", WRITERS)
def test_any_number_of_ranks_reads_what_all_wrote(mpi_tmp_path, comm, writer):
    arrays = network() | {f"dtypes/{name}": np.arange(13).astype(name) for name in DTYPES}
    metadata = {"history": [1.0, math.inf, 2], "text": "ρ", "nested": {"a": None, "b": True}}
    with CheckpointDirectory(mpi_tmp_path, comm, writer=writer) as checkpoints:
        path = checkpoints.save(split_evenly(arrays, comm), metadata, 100)
    assert path.name == "step-00000100.h5"
    for readers in range(1, comm.size + 1):
        with open_checkpoint(path, comm.group(comm.rank < readers)) as checkpoint:
            assert (checkpoint.step, checkpoint.metadata) == (100, metadata)
            assert checkpoint.names == tuple(arrays)
            assert_holds(checkpoint, arrays)
            assert (
                checkpoint.read("parameters/0.weight", 2, 3).tobytes() == arrays["parameters/0.weight"][2:5].tobytes()
            )
            assert checkpoint.read("parameters/0.weight", 6).shape == (1, 5)


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("writer", WRITERS)
def test_uneven_slabs_and_ranks_without_any(mpi_tmp_path, comm, writer):
    """Rank r gives rows r, r + size, ... one by one, last first; the last rank alone gives the other array."""
    values, other = np.arange(24.0).reshape(8, 3)[:, ::-1], np.arange(5)
    rows = range(comm.rank, 8, comm.size)
    last = comm.rank == comm.size - 1
    arrays = [
        Array("all", values.shape, values.dtype, [Slab(row, values[row : row + 1]) for row in reversed(rows)]),
        Array("last", other.shape, other.dtype, [Slab(0, other)] if last else []),
    ]
    with CheckpointDirectory(mpi_tmp_path, comm, writer=writer) as checkpoints:
        path = checkpoints.save(arrays, {}, 1)
    with open_checkpoint(path, comm) as checkpoint:
        assert_holds(checkpoint, {"all": values, "last": other})


@pytest.mark.mpi
@pytest.mark.parametrize("writer", WRITERS)
def test_three_lines_of_h5py_show_the_tensors(mpi_tmp_path, comm, writer):
    path = save(mpi_tmp_path, comm, writer=writer)
    with h5py.File(path, "r") as file:
        for name, values in network(1).items():
            assert file[name].shape == values.shape and np.array_equal(file[name][()], values)


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("writer", WRITERS)
def test_large_slabs_are_cut(mpi_tmp_path, comm, writer, monkeypatch):
    monkeypatch.setattr(writers, "LARGEST_SLAB", 100)
    arrays = {"a": np.arange(300.0).reshape(100, 3), "wide": np.arange(60.0).reshape(3, 20)}
    with open_checkpoint(save(mpi_tmp_path, comm, arrays=arrays, writer=writer), comm) as checkpoint:
        assert_holds(checkpoint, arrays)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_files_in_parts_can_be_moved_together_and_read_from_elsewhere(mpi_tmp_path, comm, monkeypatch):
    save(mpi_tmp_path / "a", comm, writer="parts")
    if comm.rank == 0:
        (mpi_tmp_path / "a").rename(mpi_tmp_path / "b")
        (mpi_tmp_path / "link.h5").symlink_to(mpi_tmp_path / "b" / "latest")
    comm.collect(None)
    monkeypatch.chdir("/")
    for path in (mpi_tmp_path / "link.h5", resolve(mpi_tmp_path / "b")):
        with open_checkpoint(path, comm) as checkpoint:
            assert_holds(checkpoint, network(1))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_even_split(size):
    """No rank has more than its share and a row; together they have each row once."""
    arrays = network()
    shares = on_ranks(size, lambda comm: split_evenly(arrays, comm))
    total = sum(values.size for values in arrays.values())
    for share in shares:
        assert [array.name for array in share] == list(arrays)
        assert sum(slab.values.size for array in share for slab in array.slabs) <= total / size + 40
    for number, values in enumerate(arrays.values()):
        slabs = [slab.values for share in shares for slab in share[number].slabs]
        assert np.array_equal(np.concatenate(slabs) if values.ndim else slabs[0], values)


# Arrays that do not fit


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (lambda rank: Array("a", (4,), np.dtype(float), []), "leave out or repeat a row after the first 0"),
        (lambda rank: Array("a", (4,), np.dtype(float), [Slab(0, np.zeros(3))] * (rank == 0)), "after the first 3"),
        (lambda rank: Array("a", (4,), np.dtype(float), [Slab(0, np.zeros(4))] * 2), "after the first 4"),
        (lambda rank: Array("a", (4,), np.dtype(float), [Slab(0, np.zeros((4, 1)))]), "slab of shape (4, 1)"),
        (lambda rank: Array("a", (4,), np.dtype(float), [Slab(0, np.zeros(4, int))]), "dtype int64"),
        (lambda rank: Array("checkpoint/a", (4,), np.dtype(float), []), "'checkpoint/a' cannot be used"),
        (lambda rank: Array("a//b", (4,), np.dtype(float), []), "'a//b' cannot be used"),
    ],
)
def test_arrays_that_cannot_be_saved(mpi_tmp_path, comm, array, message):
    with CheckpointDirectory(mpi_tmp_path, comm) as checkpoints:
        checkpoints.save(split_evenly(network(1), comm), {}, 1)
        before = listing(mpi_tmp_path, comm)
        with pytest.raises(SharedInvalidInput) as caught:
            checkpoints.save([array(comm.rank)], {}, 2)
        assert message in str(caught.value)
        assert listing(mpi_tmp_path, comm) == before


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_ranks_that_give_different_arrays(mpi_tmp_path, comm):
    array = Array("a" if comm.rank == 0 else "b", (0,), np.dtype(float), [])
    with (
        CheckpointDirectory(mpi_tmp_path, comm) as checkpoints,
        pytest.raises(SharedInvalidInput, match="rank 1 gives"),
    ):
        checkpoints.save([array], {}, 1)


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_scalar_of_another_rank(mpi_tmp_path, comm):
    slabs = [Slab(0, np.array(1.0))] if comm.rank == 1 else []
    with CheckpointDirectory(mpi_tmp_path, comm) as checkpoints, pytest.raises(SharedInvalidInput, match="rank 0's"):
        checkpoints.save([Array("a", (), np.dtype(float), slabs)], {}, 1)


@pytest.mark.mpi
def test_metadata_and_step_that_cannot_be_saved(mpi_tmp_path, comm):
    with CheckpointDirectory(mpi_tmp_path, comm) as checkpoints:
        with pytest.raises(SharedInvalidInput, match="JSON"):
            checkpoints.save([], {"a": np.zeros(3)}, 1)
        with pytest.raises(SharedInvalidInput, match="-1"):
            checkpoints.save([], {}, -1)


# The directory


@pytest.mark.mpi
@pytest.mark.parametrize("writer", WRITERS)
def test_retention(mpi_tmp_path, comm, writer):
    with CheckpointDirectory(mpi_tmp_path, comm, keep_last=2, keep_every=4, writer=writer) as checkpoints:
        for step in range(1, 11):
            checkpoints.save(split_evenly(network(step), comm), {}, step)
    parts = writer == "parts" and comm.size > 1
    kept = [f"step-{step:08d}" for step in (4, 8, 9, 10)]
    assert listing(mpi_tmp_path, comm) == sorted(
        ["latest", *(f"{name}.h5" for name in kept), *(f"{name}.parts" for name in kept if parts)]
    )
    assert os.readlink(mpi_tmp_path / "latest") == "step-00000010.h5"
    assert resolve(mpi_tmp_path).name == "step-00000010.h5"


@pytest.mark.mpi
@pytest.mark.parametrize("writer", WRITERS)
def test_same_step_again(mpi_tmp_path, comm, writer):
    """As when a run is resumed at its only checkpoint: this is replaced when the new one is complete."""
    for number in (1, 2, 3):
        path = save(mpi_tmp_path, comm, step=5, arrays=network(number), writer=writer)
        with open_checkpoint(path, comm) as checkpoint:
            assert_holds(checkpoint, network(number))
        assert len(listing(mpi_tmp_path, comm)) == len(files_of(path)[:2]) + 1


@pytest.mark.mpi
def test_resumed_before_the_newest(mpi_tmp_path, comm):
    """Later checkpoints of the abandoned run are left, and are the last to be tried."""
    for step in (1, 2, 3, 9, 4):
        path = save(mpi_tmp_path, comm, step, keep_last=3)
    with newest_valid(mpi_tmp_path, comm)[0] as checkpoint:
        assert checkpoint.step == 4
    assert directory.saved_steps(mpi_tmp_path) == [2, 3, 4, 9]
    comm.collect(None)
    if comm.rank == 0:
        path.write_bytes(b"")
    comm.collect(None)
    with newest_valid(mpi_tmp_path, comm)[0] as checkpoint:
        assert checkpoint.step == 3


@pytest.mark.mpi
def test_step_0(mpi_tmp_path, comm):
    for step in (7, 0):
        save(mpi_tmp_path, comm, step)
    with newest_valid(mpi_tmp_path, comm)[0] as checkpoint:
        assert checkpoint.step == 0


@pytest.mark.mpi
@pytest.mark.all_sizes(damage="truncate")
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
@pytest.mark.parametrize("writer", WRITERS)
def test_damaged_newest_is_reported_and_the_one_before_is_used(mpi_tmp_path, comm, writer, damage):
    for step in (1, 2):
        path = save(mpi_tmp_path, comm, step, writer=writer)
    file = files_of(path)[-1]
    content = file.read_bytes()
    comm.collect(None)
    if comm.rank == 0:
        values = network(2)["parameters/one_row"].tobytes()
        changed = {
            "flip": content.replace(values, values[::-1]),
            "truncate": content[:-1],
            "empty": b"",
            "remove": None,
        }
        os.remove(file) if damage == "remove" else file.write_bytes(changed[damage])
    comm.collect(None)
    if damage == "flip" and values_elsewhere(content):
        return
    checkpoint, messages = newest_valid(mpi_tmp_path, comm)
    with checkpoint:
        assert checkpoint.step == 1
        assert_holds(checkpoint, network(1))
    assert len(messages) == (0 if damage == "remove" and file == path else 1)
    assert all(str(file) in message for message in messages)


def values_elsewhere(content):
    """Whether the values that the test changes lie in another file than the one with this content."""
    return network(2)["parameters/one_row"].tobytes() not in content


@pytest.mark.mpi
def test_no_checkpoint_can_be_used(mpi_tmp_path, comm):
    with pytest.raises(SharedInvalidInput, match="has no checkpoint in it"):
        newest_valid(mpi_tmp_path / "absent", comm)
    path = save(mpi_tmp_path, comm)
    comm.collect(None)
    if comm.rank == 0:
        path.write_bytes(b"")
    comm.collect(None)
    with pytest.raises(SharedInvalidInput, match="no checkpoint that can be used: .*not a checkpoint"):
        newest_valid(mpi_tmp_path, comm)


@pytest.mark.mpi
def test_leftovers_of_killed_runs_are_removed(mpi_tmp_path, comm):
    save(mpi_tmp_path, comm, 1)
    before = listing(mpi_tmp_path, comm)
    comm.collect(None)
    if comm.rank == 0:
        for name in (".step-00000001.parts.tmp", "step-00000001.7.parts", "step-00000003.parts"):
            (mpi_tmp_path / name).mkdir()
            (mpi_tmp_path / name / "0000.h5").write_bytes(b"x")
        (mpi_tmp_path / ".step-00000001.h5.tmp").write_bytes(b"x")
        (mpi_tmp_path / ".step-latest.tmp").symlink_to("nowhere")
        (mpi_tmp_path / "notes.parts").write_bytes(b"mine")
    comm.collect(None)
    save(mpi_tmp_path, comm, 1)
    assert len(listing(mpi_tmp_path, comm)) == len(before) + 1
    assert (mpi_tmp_path / "notes.parts").exists()


@pytest.mark.mpi
def test_two_runs_in_one_directory(mpi_tmp_path, comm, monkeypatch):
    monkeypatch.setattr(claim, "LOCK_TRIES", 2)
    with CheckpointDirectory(mpi_tmp_path, comm) as checkpoints:
        with pytest.raises(SharedInvalidInput, match="another run saves checkpoints into it"):
            CheckpointDirectory(mpi_tmp_path, comm)
        checkpoints.save(split_evenly(network(1), comm), {}, 1)
    save(mpi_tmp_path, comm, 2)


@pytest.mark.mpi
def test_retention_that_keeps_nothing(mpi_tmp_path, comm):
    with pytest.raises(SharedInvalidInput, match="keep_last 0"):
        CheckpointDirectory(mpi_tmp_path, comm, keep_last=0)


# In the background


@pytest.mark.mpi
def test_background_saves_what_was_there_when_it_began(mpi_tmp_path, comm):
    arrays = network(1)
    with CheckpointDirectory(mpi_tmp_path, comm, writer="parts") as checkpoints:
        checkpoints.start_save(split_evenly(arrays, comm), {}, 1)
        for values in arrays.values():
            values[...] = 0
        assert not (mpi_tmp_path / "latest").exists()
        comm.collect(None)
        checkpoints.start_save(split_evenly(network(2), comm), {}, 2)
        assert directory.saved_steps(mpi_tmp_path) == [1]
        comm.collect(None)
        checkpoints.save(split_evenly(network(3), comm), {}, 3)
        checkpoints.start_save(split_evenly(network(4), comm), {}, 4)
        checkpoints.start_save(split_evenly(network(5), comm), {}, 5)
    assert directory.saved_steps(mpi_tmp_path) == [4, 5]
    with newest_valid(mpi_tmp_path, comm)[0] as checkpoint:
        assert_holds(checkpoint, network(5))
    save(mpi_tmp_path / "other", comm)  # no thread is in the way


@pytest.mark.mpi
def test_background_uses_no_mpi_and_its_failure_is_told_at_the_end(mpi_tmp_path, comm, monkeypatch):
    threads = []

    def fail(path, *arguments):
        threads.append(threading.current_thread())
        raise OSError(errno.ENOSPC, "No space left on device")

    with CheckpointDirectory(mpi_tmp_path, comm, writer="parts") as checkpoints:
        checkpoints.save(split_evenly(network(1), comm), {}, 1)
        before = listing(mpi_tmp_path, comm)
        if comm.rank == 0:
            monkeypatch.setattr(saving, "write_own", fail)
        checkpoints.start_save(split_evenly(network(2), comm), {}, 2)
        with pytest.raises(SharedInvalidInput, match="No space left on device"):
            checkpoints.finish()
        assert listing(mpi_tmp_path, comm) == before
    assert threading.main_thread() not in threads and len(threads) == (comm.rank == 0)


# Failures while saving


@pytest.mark.mpi
@pytest.mark.parametrize("writer", WRITERS)
def test_directory_that_cannot_be_made(mpi_tmp_path, comm, writer):
    if comm.rank == 0:
        (mpi_tmp_path / "file").write_text("")
    with pytest.raises(SharedInvalidInput, match=r"directory '.*file/run' cannot be written .*Not a directory"):
        save(mpi_tmp_path / "file" / "run", comm, writer=writer)


@pytest.mark.mpi
@pytest.mark.all_sizes(name="replace")
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", ["replace", "fsync", "link"])
def test_file_system_fails(mpi_tmp_path, comm, writer, name, monkeypatch):
    """On one rank; all raise, and the directory is as it was."""

    def fail(*arguments):
        raise OSError(errno.EROFS, "Read-only file system")

    with CheckpointDirectory(mpi_tmp_path, comm, keep_last=1, writer=writer) as checkpoints:
        checkpoints.save(split_evenly(network(1), comm), {}, 1)
        before = listing(mpi_tmp_path, comm)
        with monkeypatch.context() as patch:
            if comm.rank == 0:
                patch.setattr(Path if name == "link" else os, "symlink_to" if name == "link" else name, fail)
            with pytest.raises(SharedInvalidInput, match=r"cannot be written .*Read-only file system"):
                checkpoints.save(split_evenly(network(2), comm), {}, 2)
        if name != "link":  # where the link fails the checkpoint is made, and it is complete
            assert listing(mpi_tmp_path, comm) == before
        with newest_valid(mpi_tmp_path, comm)[0] as checkpoint:
            assert checkpoint.step == 1
        comm.collect(None)
        checkpoints.save(split_evenly(network(2), comm), {}, 2)
    with newest_valid(mpi_tmp_path, comm)[0] as checkpoint:
        assert_holds(checkpoint, network(2))


@pytest.mark.mpi
def test_values_that_do_not_reach_the_disk_as_they_were(mpi_tmp_path, comm, monkeypatch):
    """Verification finds what the disk, or a write that others share, has changed."""

    def write_and_change(path, *arguments):
        written = original(path, *arguments)
        content = bytearray(path.read_bytes())
        content[content.index(scalar.tobytes())] ^= 1
        path.write_bytes(content)
        return written

    scalar = np.array(0x1234567890ABCDEF)
    original = writers.write_own
    with CheckpointDirectory(mpi_tmp_path, comm) as checkpoints:
        checkpoints.save(split_evenly(network(1), comm), {}, 1)
        before = listing(mpi_tmp_path, comm)
        monkeypatch.setattr(saving, "write_own", write_and_change)
        with pytest.raises(SharedInvalidInput, match="does not hold what was written to it"):
            checkpoints.save(split_evenly({"a": scalar, "b": np.zeros(50)}, comm), {}, 2)
        assert listing(mpi_tmp_path, comm) == before


@pytest.mark.mpi
@pytest.mark.parametrize("writer", WRITERS)
def test_full_disk(mpi_tmp_path, comm, writer):
    """A limit on the size of files, which the kernel reports in the same places as a full disk."""
    big = {"a": np.arange(200_000.0), "b": np.zeros(200_000)}
    with CheckpointDirectory(mpi_tmp_path, comm, writer=writer) as checkpoints:
        checkpoints.save(split_evenly(network(1), comm), {}, 1)
        before = listing(mpi_tmp_path, comm)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        for save_or_start in (checkpoints.save, checkpoints.start_save):
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
            try:
                with pytest.raises(SharedInvalidInput, match=f"{mpi_tmp_path}' cannot be written .*too large"):
                    save_or_start(split_evenly(big, comm), {}, 2)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            assert listing(mpi_tmp_path, comm) == before
        checkpoints.save(split_evenly(big, comm), {}, 2)
    with newest_valid(mpi_tmp_path, comm)[0] as checkpoint:
        assert_holds(checkpoint, big)


def run_script(text, *arguments):
    """What a Python process prints, whose script finds the tests' modules."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", text, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=100, check=True,
    ).stdout  # fmt: skip


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
from apts_mpi.checkpoint import CheckpointDirectory, newest_valid, split_evenly
from thread_ranks import on_ranks

directory, kills = Path(sys.argv[1]), int(sys.argv[2])

def save(comm):
    step = 0
    if directory.is_dir() and any(directory.glob("step-*.h5")):
        with newest_valid(directory, comm)[0] as checkpoint:
            step = checkpoint.step
    with CheckpointDirectory(directory, comm, writer="parts") as checkpoints:
        for step in range(step, 1_000_000):  # begins with the one that is there
            arrays = {"a": np.full((300, 10), step), "b": np.full(7, step)}
            (checkpoints.start_save if step % 2 else checkpoints.save)(split_evenly(arrays, comm), {"step": step}, step)

def check(comm):
    checkpoint, messages = newest_valid(directory, comm)
    with checkpoint:
        assert checkpoint.metadata == {"step": checkpoint.step}
        assert (checkpoint.read("a") == checkpoint.step).all() and (checkpoint.read("b") == checkpoint.step).all()
    return checkpoint.step, messages

random.seed(1)
steps = []
for kill in range(kills):
    process = os.fork()
    if process == 0:
        on_ranks(1 + kill % 3, save)
    while not (directory / "latest").exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0.02, 0.3))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    step, messages = on_ranks(1, check)[0]
    assert not messages, messages
    steps.append(step)
assert steps == sorted(steps), steps
print(steps[-1], len(list(directory.iterdir())))
"""


@pytest.mark.processes
def test_killed_at_random_moments(tmp_path):
    """Processes that do nothing but save, on 1 to 3 ranks; each killed by SIGKILL, then a valid checkpoint is there."""
    last, files = map(int, run_script(KILLED, tmp_path / "run", 50).split())
    assert last > 3  # they came to save between the kills
    assert files < 15


# Damage


@pytest.mark.parametrize("size", [1, 2])
def test_any_byte_changed_is_found(tmp_path, size):
    arrays = {"a": np.arange(40, dtype=np.float32).reshape(10, 4), "b": np.arange(3), "c": np.array(2.0)}
    path = on_ranks(size, lambda comm: save(tmp_path, comm, arrays=arrays, writer="parts"))[0]
    files = files_of(path)
    assert len(files) == (1 if size == 1 else 3)
    for file in files:
        content = file.read_bytes()
        regions = seals.SealedFile(file).regions
        # All bytes of values and checksums, and of HDF5's own every few.
        places = [place for region in regions if region.is_slab for place in range(region.start, sum(region[:2]))]
        places += range(sum(regions[-1][:2]), len(content))
        for place in {*places, *range(0, len(content), 13)}:
            file.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
            with pytest.raises(DamagedCheckpoint, match=file.name), Checkpoint(path) as checkpoint:
                checkpoint.verify()
        file.write_bytes(content)
    with Checkpoint(path) as checkpoint:
        checkpoint.verify()
        assert_holds(checkpoint, arrays)


@pytest.mark.parametrize("size", [1, 2])
def test_truncated_anywhere(tmp_path, size):
    path = on_ranks(size, lambda comm: save(tmp_path, comm, writer="parts"))[0]
    for file in files_of(path):
        content = file.read_bytes()
        for length in {*range(0, len(content), 101), *range(len(content) - 60, len(content))}:
            file.write_bytes(content[:length])
            with pytest.raises(DamagedCheckpoint, match=file.name), Checkpoint(path) as checkpoint:
                checkpoint.verify()
        file.write_bytes(content)


def test_parts_of_another_checkpoint(tmp_path):
    first, second = (
        on_ranks(2, lambda comm, step=step: save(tmp_path, comm, step, writer="parts"))[0] for step in (1, 2)
    )
    os.replace(files_of(first)[2], files_of(second)[2])
    with pytest.raises(DamagedCheckpoint, match="does not belong to"):
        Checkpoint(second)


def test_main_file_without_its_parts(tmp_path):
    path = on_ranks(2, lambda comm: save(tmp_path, comm, writer="parts"))[0]
    (tmp_path / "step-00000001.parts").rename(tmp_path / "lost")
    with pytest.raises(InvalidInput, match=r"step-00000001.parts/0000.h5 cannot be read \(No such file"):
        Checkpoint(path)


def test_checkpoint_that_is_removed_while_it_is_read(tmp_path):
    """By another run that keeps the newest ones; HDF5 shows zeros for parts that are not there."""

    def overtaken(comm):
        path = save(tmp_path, comm, step=1, writer="parts")
        with Checkpoint(path) as checkpoint:
            save(tmp_path, comm, step=2, keep_last=1, writer="parts")
            assert not path.exists()
            for name in checkpoint.names:
                with pytest.raises(DamagedCheckpoint, match="removed or replaced while it was read"):
                    checkpoint.read(name)

    on_ranks(2, overtaken)


@pytest.mark.parametrize("kind", ["HDF5", "text", "nothing"])
def test_foreign_file(tmp_path, kind):
    path = tmp_path / "foreign.h5"
    if kind == "HDF5":
        with h5py.File(path, "w") as file:
            file["parameters/0.weight"] = np.zeros(100)
    else:
        path.write_text("x" * 1000 if kind == "text" else "")
    with pytest.raises(DamagedCheckpoint, match=r"foreign.h5 is not a checkpoint of apts_mpi"):
        Checkpoint(path)


def test_newer_format(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(seals, "VERSION", 7)
        path = on_ranks(1, lambda comm: save(tmp_path, comm, writer="parts"))[0]
    with pytest.raises(InvalidInput, match=r"version 7 of the checkpoint format, .* up to 1; update apts_mpi"):
        Checkpoint(path)
