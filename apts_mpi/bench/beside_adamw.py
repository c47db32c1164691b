"""What an iteration costs beside a step of AdamW in plain torch, on networks of several kinds, and which part of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table

from apts_mpi.apts import APTS
from apts_mpi.bench.cases import CASES, HOST, TOGETHER, Case
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.timing import Timing, clock_of, time_in_turn
from apts_mpi.tools.command import FILE_WIDTH
from apts_mpi.tools.environment import cpu_seconds
from apts_mpi.trust_region.next_batch import TRIALS

Noise = Literal["none", "batches"]

NOISE: tuple[Noise, ...] = ("none", "batches")

# Events of an iteration that the table has, in their order there; all others are together.
PARTS = ("global evaluation", "local solves", "assembly", "coarse", "judge")


class AdamW:
    """Steps of AdamW on a network, with nothing of this package."""

    def __init__(self, case: Case, device: torch.device = HOST) -> None:
        self._network, self._loss = case.make(device), case.loss
        self._batches = itertools.cycle(case.batches(device))
        self._optimizer = torch.optim.AdamW(self._network.parameters())

    def __call__(self) -> None:
        """As many as are timed together."""
        for inputs, targets in itertools.islice(self._batches, TOGETHER):
            self._optimizer.zero_grad()
            self._loss(self._network(inputs), targets).backward()
            self._optimizer.step()


class Iterations:
    """Iterations of the solver at its defaults with a number of subdomains, on one rank."""

    def __init__(self, case: Case, subdomains: int, noise: Noise = "none", device: torch.device = HOST) -> None:
        options = APTSOptions(subdomains=subdomains, noise=noise)
        self._solver = APTS(case.make(device), case.loss, comm=MPI.COMM_SELF, options=options)
        # Beyond the start, whose steps are tried.
        self._solver.state.starting, self._solver.state.tried = False, TRIALS
        self._batches = itertools.cycle(case.batches(device))
        self._clock = clock_of(device)
        self._seconds = 0.0

    def __call__(self) -> None:
        """As many as are timed together."""
        started = self._clock()
        for batch in itertools.islice(self._batches, TOGETHER):
            self._solver.step(batch)
        self._seconds += self._clock() - started

    def forget(self) -> None:
        """Begin to count anew."""
        self._solver.events.clear()
        self._seconds = 0.0

    def shares(self) -> dict[str, float]:
        """Of each part in the seconds of the iterations since then; they add up to 1."""
        found = {name: self._solver.events.totals[name].own_seconds / self._seconds for name in PARTS}
        return found | {"rest": 1.0 - sum(found.values())}


def beside_adamw(names: Sequence[str], rounds: int, device: torch.device = HOST) -> None:
    """Time iterations beside steps of AdamW, in turn, and print a table for each case. For one rank alone.

    On a CPU its seconds count, which others do not disturb; on a GPU those of a clock.
    """
    clock, unit = (cpu_seconds, "CPU ms") if device.type == "cpu" else (clock_of(device), "ms")
    for name in names:
        case = CASES[name]
        kinds = list(itertools.product(NOISE, case.subdomains()))
        solvers = [Iterations(case, number, noise, device) for noise, number in kinds]
        calls: list[Callable[[], None]] = [AdamW(case, device), *solvers]
        for call in calls:
            call()
        for solver in solvers:
            solver.forget()
        adamw, *timings = time_in_turn(calls, rounds, warm_up=0, clock=clock)
        shares = [solver.shares() for solver in solvers]
        _print(name, adamw, dict(zip(kinds, zip(timings, shares, strict=True), strict=True)), unit)


def _print(
    name: str, adamw: Timing, found: Mapping[tuple[Noise, int], tuple[Timing, dict[str, float]]], unit: str
) -> None:
    table = Table(
        title=f"{name}, {torch.get_num_threads()} thread(s): an iteration in steps of AdamW",
        caption=f"a step of AdamW: {1e3 * adamw.median / TOGETHER:.2f} {unit}",
    )
    for heading in ("noise", "subdomains", unit, "all", *PARTS, "rest"):
        table.add_column(heading, justify="right")
    for (noise, number), (timing, shares) in found.items():
        ratio = timing.median / adamw.median
        parts = (f"{share * ratio:.2f}" for share in shares.values())
        table.add_row(noise, str(number), f"{1e3 * timing.median / TOGETHER:.2f}", f"{ratio:.2f}", *parts)
    Console(width=max(Console().width, FILE_WIDTH)).print(table)
