"""What one rank does by itself in an iteration with what all ranks tell, at as many ranks as nobody has here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from apts_mpi.errors import InvalidInput
from apts_mpi.options import TrustRegionOptions
from apts_mpi.tools.environment import seconds

try:
    from apts_mpi.parallel.parts import Parts, put_together
    from apts_mpi.trust_region.acceptance import judge_measured
    from apts_mpi.trust_region.measured import measured, parts_of_step
except ImportError as error:
    raise InvalidInput(f"root: the judge needs mpi4py, which cannot be imported ({error})") from error

# Seconds that all of it may take at the last size, and how often each is timed; the least counts.
BUDGET, REPEATS = 1e-3, 5

# Numbers that a rank tells beside those of the step: two sums, work, faults, freezing, notes and buffers.
SUMS, LARGEST = [0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]

# Numbers of all ranks that all see, and are compared: what users changed, the batch, and errors.
SEEN = 9

Operation = Callable[[], object]


def _told(rank: int) -> Parts:
    step = parts_of_step(rank, "2", True, [0.5, 0.4, 1.0, -1.0, 0.5, 2.0])
    return Parts([*step.sums, *SUMS], [*step.largest, *LARGEST], step.norms)


def _rounds(ranks: int) -> range:
    """Of a binomial tree: so many messages come to rank 0, or to any rank where all see the result."""
    return range((ranks - 1).bit_length())


def _reduce(ranks: int) -> Operation:
    own, messages = _told(0).message(), [_told(rank).message() for rank in _rounds(ranks)]

    def reduce() -> None:
        for message in messages:
            put_together(message, own)

    return reduce


def _judge(ranks: int) -> Operation:
    own, message = _told(0), _told(0).message()
    for rank in _rounds(ranks):
        put_together(_told(rank).message(), message)
    return lambda: judge_measured(
        measured(own.of(message), "2"),
        options=TrustRegionOptions(),
        radius=1.0,
        predicted_reduction=1.0,
        earlier_losses=(),
        rounding=1e-7,
    )


def _compare(ranks: int) -> Operation:
    own = np.arange(SEEN)
    others = [own + rank for rank in _rounds(ranks)]

    def compare() -> list[int]:
        found = own.copy()
        for other in others:
            np.maximum(found, other, out=found)
        return found.tolist()

    return compare


# By name, with the ranks on which it is done; each gets the number of ranks, and returns what is timed.
OPERATIONS: dict[tuple[str, str], Callable[[int], Operation]] = {
    ("numbers of a step put together, a message a round", "rank 0"): _reduce,
    ("judge", "rank 0"): _judge,
    ("what users changed, batches and errors: compared", "all"): _compare,
}


def time_operations(sizes: Sequence[int]) -> dict[tuple[str, str], list[float]]:
    """Seconds of each operation at each number of ranks."""
    return {name: [_fastest(made(ranks)) for ranks in sizes] for name, made in OPERATIONS.items()}


def _fastest(operation: Operation) -> float:
    taken = []
    for _ in range(REPEATS):
        start = seconds()
        operation()
        taken.append(seconds() - start)
    return min(taken)


def print_operations(sizes: Sequence[int], console: Console) -> None:
    """Time and print."""
    found = time_operations(sizes)
    table = Table(
        title="milliseconds of an iteration",
        caption=f"Budget of all on one rank: {1e3 * BUDGET:.0f} ms; those above it alone are marked.",
    )
    table.add_column("operation")
    table.add_column("done on")
    for size in sizes:
        table.add_column(f"{size} ranks", justify="right")
    for (name, place), times in found.items():
        shown = [f"{1e3 * time:.4f}{' *' if time > BUDGET else ''}" for time in times]
        table.add_row(name, place, *shown)
    console.print(table)
