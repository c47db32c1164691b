"""What it costs to save a checkpoint, beside a raw write of the same bytes."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table

from apts_mpi.checkpoint import Array, CheckpointDirectory, split_evenly
from apts_mpi.checkpoint.writers import choose_writer
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.timing import Timing, time_in_turn, wait_for_all
from apts_mpi.tools.command import FILE_WIDTH
from apts_mpi.tools.environment import pause
from apts_mpi.tools.events import Events

SIZES = (1, 2, 4)
LAYERS, ROWS = 16, 1024

# Bytes of one raw write.
BLOCK = 2**24

# Seconds between two looks whether all ranks are done, and until old files are removed in the background.
INTERVAL, SETTLED = 0.0005, 0.3


class Case(NamedTuple):
    """A way to save, the number of ranks that take part, and what each of them calls; None on the others."""

    name: str
    ranks: int
    save: Callable[[], object] | None


def parameters(megabytes: int) -> dict[str, np.ndarray]:
    """Random float32 matrices of about 10⁶ ``megabytes`` bytes together, the same on every rank."""
    random = np.random.default_rng(0)
    columns = round(megabytes * 1e6 / (4 * LAYERS * ROWS))
    return {f"parameters/{layer}": random.random((ROWS, columns), np.float32) for layer in range(LAYERS)}


def save_by_torch(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """``torch.save``, and what it leaves to do until the file is on disk."""
    torch.save({name: torch.from_numpy(values) for name, values in arrays.items()}, path)
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def write_raw(path: Path, content: memoryview) -> None:
    """Bring bytes to disk by plain system calls."""
    with path.open("wb", buffering=0) as file:
        for start in range(0, len(content), BLOCK):
            file.write(content[start : start + BLOCK])
        os.fsync(file.fileno())


def save_next(checkpoints: CheckpointDirectory, arrays: list[Array], steps: Iterator[int]) -> None:
    """Save under a new step, as a run does: to replace a file takes the time that its removal takes. Collective."""
    checkpoints.save(arrays, {}, next(steps))


def cases_of(size: int, arrays: dict[str, np.ndarray], directory: Path, stack: ExitStack) -> Iterator[Case]:
    """All ways for the first ``size`` ranks; ``stack`` takes what is to be closed. Collective."""
    world = MPI.COMM_WORLD
    taking_part = world.rank < size
    group = Communicator(world, Events()).group(taking_part)
    content = np.concatenate([values.ravel() for values in arrays.values()]).data.cast("B")
    start, stop = (len(content) * (world.rank + end) // size for end in (0, 1))
    raw = partial(write_raw, directory / f"{world.rank}.raw", content[start:stop])
    yield Case("raw write and fsync", size, raw if taking_part else None)
    if size == 1:
        torch_save = partial(save_by_torch, directory / "torch.raw", arrays)
        yield Case("torch.save and fsync", size, torch_save if taking_part else None)
    for writer in dict.fromkeys(["parts", choose_writer(group)]):
        save = None
        if taking_part:
            path = directory / f"{writer}-{size}"
            checkpoints = stack.enter_context(CheckpointDirectory(path, group, keep_last=1, writer=writer))
            save = partial(save_next, checkpoints, split_evenly(arrays, group), itertools.count())
        yield Case(f"checkpoint, writer {writer}", size, save)


def checkpoint(repetitions: int, megabytes: int, directory: Path) -> None:
    """Time the ways to save at 1, 2 and 4 ranks, as far as there are. Collective."""
    world = MPI.COMM_WORLD
    arrays = parameters(megabytes)
    if world.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
    place = Path(world.bcast(tempfile.mkdtemp(dir=directory) if world.rank == 0 else None))
    with ExitStack() as stack:
        cases = [case for size in SIZES if size <= world.size for case in cases_of(size, arrays, place, stack)]
        calls = [partial(on_ranks, case) for case in cases]
        timings = time_in_turn(calls, repetitions, warm_up=1, between=partial(clear, place))
    wait_for_all(world, INTERVAL)
    if world.rank == 0:
        shutil.rmtree(place)
        print_table(cases, timings, sum(values.nbytes for values in arrays.values()))


def on_ranks(case: Case) -> None:
    """Save on the ranks that take part, until all are done. Collective."""
    if case.save is not None:
        case.save()
    wait_for_all(MPI.COMM_WORLD, INTERVAL)


def clear(directory: Path) -> None:
    """Remove files that would be overwritten, and give the others time to remove theirs. Collective."""
    wait_for_all(MPI.COMM_WORLD, INTERVAL)
    if MPI.COMM_WORLD.rank == 0:
        for path in directory.glob("*.raw"):
            path.unlink()
        pause(SETTLED)
    wait_for_all(MPI.COMM_WORLD, INTERVAL)


def print_table(cases: list[Case], timings: list[Timing], size: int) -> None:
    """Print medians with quartiles, bandwidths, and their ratios to that of the raw write by as many ranks."""
    table = Table(title=f"saving {size / 1e6:.0f} MB of parameters")
    for column in ("what", "ranks", "milliseconds", "quartiles", "MB/s", "of the raw write"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for case, timing in zip(cases, timings, strict=True):
        if case.name.startswith("raw"):
            raw = timing
        table.add_row(
            case.name,
            str(case.ranks),
            f"{1e3 * timing.median:.0f}",
            f"{1e3 * timing.low:.0f} to {1e3 * timing.high:.0f}",
            f"{size / 1e6 / timing.median:.0f}",
            f"{raw.median / timing.median:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table)
