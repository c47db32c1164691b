"""Tries on the machine at hand, whose outcomes `apts_mpi.doctor.diagnosis` judges. All collective unless stated."""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from apts_mpi.checkpoint import Array, CheckpointDirectory, Slab, open_checkpoint
from apts_mpi.doctor.diagnosis import RankFacts
from apts_mpi.doctor.shared_memory import Survey, survey
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.timing import time_in_turn
from apts_mpi.parallel.transport import ADMITTED_DTYPES, Mirror, identity_of
from apts_mpi.tools import environment

# Numbers of elements that are summed: MPI libraries take other algorithms for short and for long messages.
SIZES = (8, 2**18)

# Of the measured overlap: float32 elements of the sum (4 MB), rows of the matrices that are multiplied meanwhile,
# timed calls, the most products in one of them, and how often all of it is measured.
ELEMENTS, MATRIX, REPETITIONS, MOST_PIECES, ROUNDS = 2**20, 128, 3, 2000, 5


def gather_facts(comm: Communicator, device: torch.device) -> list[RankFacts]:
    """What each rank knows of its place."""
    facts = RankFacts(
        environment.host(),
        environment.cores(),
        torch.get_num_threads(),
        str(device),
        identity_of(device),
        environment.versions(),
        environment.has_gpu_driver(),
    )
    return comm.collect(facts)


def sum_everywhere(comm: Communicator, device: torch.device) -> list[dict[str, int]]:
    """Sum whole numbers over the ranks in each admitted dtype; return the wrong elements by dtype, of each rank."""
    wrong = {}
    for dtype in ADMITTED_DTYPES:
        name = str(dtype).removeprefix("torch.")
        wrong[name] = sum(_wrong_elements(comm, size, dtype, device) for size in SIZES)
    return comm.collect(wrong)


def _wrong_elements(comm: Communicator, size: int, dtype: torch.dtype, device: torch.device) -> int:
    # Small enough for exact float32 sums of 100,000 ranks, in whatever order.
    pattern = torch.arange(size, dtype=dtype, device=device) % 16 + 1
    weights = torch.arange(comm.size) % 8 + 1
    mirror = Mirror(pattern * int(weights[comm.rank]))
    comm.sum(mirror)
    return int((mirror.tensor != pattern * int(weights.sum())).sum())


def measure_overlap(comm: Communicator) -> list[tuple[float, float]]:
    """Share of the shorter of an Iallreduce and a computation of about its length that the other hides.

    In the memory of the host, where reductions take place by default.

    Returns
    -------
    list of (float, float)
        Of each measurement the shares without and with calls of ``Test`` from the computation; medians of the slowest
        rank. Empty with one rank.
    """
    if comm.size == 1:
        return []
    mirror = Mirror(torch.zeros(ELEMENTS))
    factor, product = torch.zeros(MATRIX, MATRIX), torch.zeros(MATRIX, MATRIX)
    pieces = 1

    def communicate() -> None:
        comm.sum(mirror)

    def compute() -> None:
        for _ in range(pieces):
            torch.mm(factor, factor, out=product)

    def both(tested: bool) -> None:
        pending = comm.pending()
        comm.start_sum(pending, mirror, mirror, 0, ELEMENTS)
        for _ in range(pieces):
            torch.mm(factor, factor, out=product)
            if tested:
                pending.progress()
        pending.wait()

    def together() -> None:
        comm.total(0)

    alone = time_in_turn([communicate, compute], REPETITIONS, between=together)
    medians = [timing.median for timing in alone]
    (number,) = comm.agree(medians, lambda table: [math.ceil(table[:, 0].max() / table[:, 1].max())])
    pieces = min(max(1, int(number)), MOST_PIECES)
    calls = [communicate, compute, lambda: both(False), lambda: both(True)]
    rounds = [time_in_turn(calls, REPETITIONS, between=together) for _ in range(ROUNDS)]
    own = [timing.median for timings in rounds for timing in timings]
    slowest = comm.agree(own, lambda table: list(table.max(axis=0)))
    return [_hidden(*slowest[start : start + len(calls)]) for start in range(0, len(slowest), len(calls))]


def _hidden(communication: float, computation: float, plain: float, tested: float) -> tuple[float, float]:
    shorter = min(communication, computation)
    shares = ((communication + computation - both) / shorter for both in (plain, tested))
    first, second = (min(1.0, max(0.0, share)) for share in shares)
    return first, second


def survey_hosts(comm: Communicator, local_rank: int) -> list[Survey]:
    """What the first rank of each host finds in its shared memory."""
    return [found for found in comm.collect(survey() if local_rank == 0 else None) if found is not None]


@contextmanager
def scratch(comm: Communicator, run_directory: Path) -> Iterator[tuple[Path, str]]:
    """A directory that is there in the block, in the run directory or where that would be made.

    Yields
    ------
    directory, failure
        Where it is, and why it could not be made; empty if it could.
    """
    path, failure = "", ""
    if comm.rank == 0:
        place = run_directory.absolute()
        while not place.exists():
            place = place.parent
        path = str(place)
        try:
            path = tempfile.mkdtemp(prefix=".doctor-", dir=place)
        except OSError as error:
            failure = error.strerror or str(error)
    path, failure = comm.agree_on_text(path), comm.agree_on_text(failure)
    try:
        yield Path(path), failure
    finally:
        if comm.rank == 0 and not failure:
            shutil.rmtree(path, ignore_errors=True)


def see_renames(comm: Communicator, directory: Path) -> tuple[list[int], list[int]]:
    """Ranks that do not see a file of rank 0, and those that see its old contents after a rename onto it."""
    file, fresh = directory / "file", directory / "fresh"
    if comm.rank == 0:
        file.write_text("old", encoding="utf-8")
    comm.collect(None)
    first = _contents(file)
    comm.collect(None)
    if comm.rank == 0:
        fresh.write_text("new", encoding="utf-8")
        os.replace(fresh, file)
    comm.collect(None)
    seen = comm.collect((first, _contents(file)))
    unseen = [rank for rank, (before, _) in enumerate(seen) if before != "old"]
    return unseen, [rank for rank, (_, after) in enumerate(seen) if after != "new" and rank not in unseen]


def _contents(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8")
    return ""


def try_locks(comm: Communicator, directory: Path) -> tuple[str, list[int]]:
    """Lock a file on rank 0; return why that failed, empty if not, and the ranks that could lock it too."""
    file = directory / "lock"
    error, holder = "", None
    if comm.rank == 0:
        try:
            holder = open(file, "w")  # noqa: SIM115
            fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as caught:
            error = caught.strerror or str(caught)
    error = comm.agree_on_text(error)
    # Not on rank 0: some file systems know locks of processes only, and a second one would undo the first.
    got = comm.rank > 0 and not error and _can_lock(file)
    ignoring = [rank for rank, locked in enumerate(comm.collect(got)) if locked]
    if holder is not None:
        holder.close()
    return error, ignoring


def _can_lock(file: Path) -> bool:
    try:
        with open(file, "r+") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def try_checkpoint(comm: Communicator, directory: Path) -> str:
    """Save and read a small checkpoint as a run does; return what went wrong, empty if nothing."""
    own = np.full(1, float(comm.rank))
    try:
        with CheckpointDirectory(directory / "checkpoints", comm) as checkpoints:
            path = checkpoints.save([Array("ranks", (comm.size,), own.dtype, [Slab(comm.rank, own)])], {}, 0)
            with open_checkpoint(path, comm) as checkpoint:
                right = bool((checkpoint.read("ranks") == np.arange(comm.size)).all())
    except SharedInvalidInput as error:
        return str(error)
    return "" if all(comm.collect(right)) else "what was read is not what was saved"
