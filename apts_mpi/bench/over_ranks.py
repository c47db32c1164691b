"""What ranks share of an iteration: local solves of the slowest beside the fastest, and all work beside one rank's."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from unittest import mock

import numpy as np
from mpi4py import MPI
from rich.console import Console
from rich.table import Table

from apts_mpi.apts import APTS
from apts_mpi.bench.cases import CASES, TOGETHER, Case
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.timing import wait_for_all
from apts_mpi.tools import events
from apts_mpi.tools.command import FILE_WIDTH
from apts_mpi.tools.environment import cpu_seconds
from apts_mpi.trust_region.next_batch import TRIALS


class Shared:
    """Iterations on noisy batches of some ranks, a subdomain each."""

    def __init__(self, case: Case, comm: MPI.Intracomm) -> None:
        self._solver = APTS(case.make(), case.loss, comm=comm, options=APTSOptions(noise="batches"))
        # Beyond the start, whose steps are tried.
        self._solver.state.starting, self._solver.state.tried = False, TRIALS
        self._batches = itertools.cycle(case.batches())

    def __call__(self) -> tuple[float, float]:
        """Seconds of this rank in local solves and in all, of as many iterations as are timed, without waiting."""
        solver, started = self._solver, cpu_seconds()
        solving, waited = solver.holding.schwarz.solving.seconds, solver.events.totals["wait"].own_seconds
        for batch in itertools.islice(self._batches, TOGETHER):
            solver.step(batch)
        waited = solver.events.totals["wait"].own_seconds - waited
        return solver.holding.schwarz.solving.seconds - solving, cpu_seconds() - started - waited


def over_ranks(names: Sequence[str], rounds: int) -> None:
    """Time iterations of all ranks beside those of one, and print a table. Collective.

    Seconds are those of the processor without waiting, which other programs lengthen little.
    """
    table = Table(title=f"an iteration on noisy batches, {MPI.COMM_WORLD.size} ranks: CPU ms without waiting")
    for heading in (
        "problem",
        "one rank",
        "slowest rank",
        "ratio",
        "local solves, one rank",
        "slowest",
        "over fastest",
    ):
        table.add_column(heading, justify="left" if heading == "problem" else "right")
    for name in names:
        found = _of_case(CASES[name], rounds)
        if found is not None:
            alone, (solving, working) = found[0], found[1:].max(axis=0)
            ratio = f"{working / alone[1]:.2f}"
            spread = f"{solving / max(found[1:, 0].min(), 1e-9):.2f}"
            numbers = [f"{each:.2f}" for each in (alone[1], working)], [f"{each:.2f}" for each in (alone[0], solving)]
            table.add_row(name, *numbers[0], ratio, *numbers[1], spread)
    if MPI.COMM_WORLD.rank == 0:
        Console(width=max(Console().width, FILE_WIDTH)).print(table)


def _of_case(case: Case, rounds: int) -> np.ndarray | None:
    """Milliseconds of an iteration, in local solves and in all: of one rank and of each rank together; on rank 0."""
    world = MPI.COMM_WORLD
    with mock.patch.object(events, "seconds", cpu_seconds):
        shared, alone = Shared(case, world), Shared(case, MPI.COMM_SELF) if world.rank == 0 else None
        taken = []
        for number in range(1 + rounds):
            one = alone() if alone else (0.0, 0.0)
            # In a barrier the others would spin.
            wait_for_all(world, 0.01)
            if number:
                taken.append((one, shared()))
            else:
                shared()
    medians = 1e3 / TOGETHER * np.median(taken, axis=0)
    found = world.gather(medians)
    return None if found is None else np.stack([found[0][0], *(each[1] for each in found)])
