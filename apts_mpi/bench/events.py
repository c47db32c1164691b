"""What the timers and counters of the events cost, beside the iterations that they time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table
from torch import nn

from apts_mpi.apts import APTS
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.nonblocking import Pending, Starts
from apts_mpi.parallel.timing import Timing, time_in_turn, wait_for_all
from apts_mpi.parallel.transport import HostStreams
from apts_mpi.problems import build
from apts_mpi.staged.solver import StagedAPTS
from apts_mpi.tools.command import FILE_WIDTH
from apts_mpi.tools.environment import seconds
from apts_mpi.tools.events import Events, Spans
from apts_mpi.train.baselines import DataParallel
from apts_mpi.train.options import BaselineOptions

# Notes of each kind in a series, and series, of which the median counts.
NOTES, SERIES = 10_000, 5

# Operations that are not waited for where they begin.
NON_BLOCKING = ("sum", "gather", "pipeline")


def cost(note: Callable[[], None]) -> float:
    """Median seconds of a call."""
    taken = []
    for _ in range(SERIES):
        start = seconds()
        for _ in range(NOTES):
            note()
        taken.append((seconds() - start) / NOTES)
    return sorted(taken)[SERIES // 2]


def timer(spans: Spans | None) -> Callable[[], None]:
    """An empty block that is timed, with a pass that is counted."""
    events = Events()
    events.spans = spans

    def note() -> None:
        with events.timed("wait"):
            events.count_work(1, 1.0, 1.0)

    return note


def message() -> Callable[[], None]:
    """A message that is counted."""
    events = Events()
    return lambda: events.message("sum", 8)


def operation() -> Callable[[], None]:
    """A non-blocking operation whose time under way is counted; the look at it belongs to the operation, and is in."""
    events = Events()

    def note() -> None:
        pending = Pending(events, Starts())
        pending.add(HostStreams.Event(), lambda: MPI.REQUEST_NULL, lambda: None)
        pending.progress()

    return note


class Iterations:
    """Iterations of a solver on the first batch of the digits, the smallest problem of the package."""

    def __init__(self, kind: str, comm: MPI.Intracomm) -> None:
        self._solver = self._make(kind, comm)
        self.events = self._solver.events

    def _make(self, kind: str, comm: MPI.Intracomm) -> APTS | DataParallel:
        problem = build("digits")
        inputs, targets = problem.train
        self._batch = inputs[: problem.batch_size], targets[: problem.batch_size]
        if kind == "adam":
            adam = BaselineOptions(optimizer="adam", learning_rate=1e-3)
            return DataParallel(problem.network, problem.loss, comm=comm, options=adam)
        if kind == "staged":
            assert isinstance(problem.network, nn.Sequential)
            return StagedAPTS(problem.network, problem.loss, comm=comm, options=APTSOptions(layout="staged"))
        return APTS(problem.network, problem.loss, comm=comm, options=APTSOptions())

    def __call__(self) -> None:
        """One of them."""
        self._solver.step(self._batch)


def events(repetitions: int) -> None:
    """Print the cost of the notes of an iteration as a share of it, on the slowest rank. Collective."""
    world = MPI.COMM_WORLD
    kinds = ["apts", "adam"] + (["staged"] if world.size > 1 else [])
    solvers = [Iterations(kind, world) for kind in kinds]
    for solver in solvers:
        solver()
        solver.events.clear()
    timings = time_in_turn(solvers, repetitions, warm_up=0, between=lambda: wait_for_all(world, 0.0005))
    notes = [_notes(solver.events, repetitions) for solver in solvers]
    costs = [cost(note) for note in (timer(None), timer(Spans(SERIES * NOTES)), message(), operation())]
    wait_for_all(world, 0.01)
    shares = []
    for timing, (timers, messages, operations) in zip(timings, notes, strict=True):
        plain, traced, sent, under_way = costs
        own = [(timers * one + messages * sent + operations * under_way) / timing.median for one in (plain, traced)]
        shares.append([world.allreduce(value, MPI.MAX) for value in own])
    if world.rank == 0:
        _print(world.size, kinds, timings, notes, costs, shares)


def _notes(events: Events, iterations: int) -> tuple[float, float, float]:
    """Timed blocks, messages and non-blocking operations of an iteration."""
    calls = sum(event.calls for event in events.totals.values())
    messages = {name: kind.messages for name, kind in events.operations.items()}
    operations = sum(messages.get(name, 0) for name in NON_BLOCKING)
    return calls / iterations, sum(messages.values()) / iterations, operations / iterations


def _print(
    ranks: int,
    kinds: list[str],
    timings: list[Timing],
    notes: list[tuple[float, float, float]],
    costs: list[float],
    shares: list[list[float]],
) -> None:
    plain, traced, sent, under_way = (f"{1e6 * one:.2f}" for one in costs)
    table = Table(
        title=f"digits, {ranks} rank(s), {torch.get_num_threads()} thread(s) a rank",
        caption=f"microseconds: {plain} a timed block, {traced} with --trace, {sent} a message, "
        f"{under_way} an operation under way",
    )
    for column in ("iteration", "milliseconds", "timed blocks", "messages", "share of events", "with --trace"):
        table.add_column(column, justify="left" if column == "iteration" else "right")
    for kind, timing, (timers, messages, _), (share, with_trace) in zip(kinds, timings, notes, shares, strict=True):
        row = (kind, f"{1e3 * timing.median:.2f}", f"{timers:.1f}", f"{messages:.1f}")
        table.add_row(*row, f"{share:.2%}", f"{with_trace:.2%}")
    Console(width=max(Console().width, FILE_WIDTH)).print(table)
