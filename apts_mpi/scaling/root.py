"""What one rank does with the tables of all in an iteration, on tables of as many ranks as nobody has here."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from apts_mpi.errors import InvalidInput
from apts_mpi.options import TrustRegionOptions
from apts_mpi.tools.environment import seconds

try:
    from apts_mpi.trust_region.acceptance import judge_table
    from apts_mpi.trust_region.inner_products import InnerProducts
except ImportError as error:
    raise InvalidInput(f"root: the judge needs mpi4py, which cannot be imported ({error})") from error

# Seconds that all of it may take at the last size, and how often each is timed; the least counts.
BUDGET, REPEATS = 1e-3, 5

# Numbers of a rank in the table of the judge: work, the six that `judge_table` has, faults, freezing and notes.
NUMBERS = 10

Operation = Callable[[], object]


def _table(ranks: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.5, 1.0, (ranks, NUMBERS))


def _judge(ranks: int, parts: int) -> Operation:
    table, options = _table(ranks), TrustRegionOptions()
    inner = InnerProducts("2", rows=range(parts))
    return lambda: judge_table(
        table[:, 1:7],
        options=options,
        inner=inner,
        radius=1.0,
        predicted_reduction=1.0,
        earlier_losses=(),
        rounding=1e-7,
    )


def _largest(ranks: int) -> Operation:
    table = _table(ranks)
    return lambda: [table[:, 0].max(), *table[:, -3:].max(axis=0)]


def _objects(ranks: int, value: object) -> Operation:
    """As an allgather of objects ends: one is unpickled for each rank."""
    packed = [pickle.dumps(value)] * ranks
    return lambda: list(map(pickle.loads, packed))


def _failures(ranks: int) -> Operation:
    messages: list[str | None] = [None] * ranks
    return lambda: [rank for rank, message in enumerate(messages) if message is not None]


def _columns(ranks: int) -> Operation:
    told = [("", False, True, False, 0, 12345)] * ranks
    return lambda: list(map(list, zip(*told, strict=True)))


# By name, with the ranks on which it is done; each gets the number of ranks, and returns what is timed.
OPERATIONS: dict[tuple[str, str], Callable[[int], Operation]] = {
    ("judge, every rank has the whole vector", "rank 0"): lambda ranks: _judge(ranks, 1),
    ("judge, every rank has a part", "rank 0"): lambda ranks: _judge(ranks, ranks),
    ("largest work, faults and news", "rank 0"): _largest,
    ("what users changed: unpickled", "all"): lambda ranks: _objects(ranks, ("", False, True, False, 0, 12345)),
    ("what users changed: compared", "all"): _columns,
    ("signatures of the batch: unpickled", "all"): lambda ranks: _objects(ranks, {"inputs": (1, 2), "targets": (3, 4)}),
    ("shared errors: unpickled", "all"): lambda ranks: _objects(ranks, None),
    ("shared errors: looked through", "all"): _failures,
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
