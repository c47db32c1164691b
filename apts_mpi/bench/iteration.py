"""What an iteration costs: beside its bare passes, beside one rank, and beside a step of AdamW."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from apts_mpi.apts import APTS
from apts_mpi.bench.beside_adamw import beside_adamw
from apts_mpi.options import APTSOptions, CoarseOptions, LocalOptions
from apts_mpi.parallel.timing import Timing, time_in_turn, wait_for_all

BATCH = 2000
WIDTHS = (784, 128, 128, 128, 128, 128, 10)

PLAIN = APTSOptions(local=LocalOptions(solver="sgd"), coarse=CoarseOptions(model="none"))


def network() -> torch.nn.Sequential:
    """The 784-128^5-10 network, the same on every call."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(BATCH, WIDTHS[0], generator=generator),
        torch.randint(0, WIDTHS[-1], (BATCH,), generator=generator),
    )


class BarePasses:
    """A plain torch loop: ``gradients`` times forward and backward, ``losses`` times forward alone."""

    def __init__(self, gradients: int, losses: int) -> None:
        self._network = network()
        self._batch = batch()
        self._gradients = gradients
        self._losses = losses

    def __call__(self) -> None:
        """The passes of one iteration."""
        inputs, targets = self._batch
        for _ in range(self._gradients):
            self._network.zero_grad()
            cross_entropy(self._network(inputs), targets).backward()
        with torch.no_grad():
            for _ in range(self._losses):
                cross_entropy(self._network(inputs), targets)


class Iteration:
    """Iterations of a solver on one batch."""

    def __init__(self, comm: MPI.Intracomm, options: APTSOptions) -> None:
        self._solver = APTS(network(), cross_entropy, comm=comm, options=options)
        self._batch = batch()

    def __call__(self) -> None:
        """One iteration."""
        self._solver.step(self._batch)


def iteration(repetitions: int, rounds: int, problems: Sequence[str]) -> None:
    """Time iterations on one rank beside their passes, on all ranks beside one, and beside AdamW. Collective."""
    beside_passes(repetitions)
    if MPI.COMM_WORLD.rank == 0:
        beside_adamw(problems, rounds)
    wait_for_all(MPI.COMM_WORLD, 0.01)


def beside_passes(repetitions: int) -> None:
    """Time iterations on one rank beside their passes, and on all ranks beside one rank. Collective."""
    world = MPI.COMM_WORLD
    subdomains = APTSOptions(subdomains=world.size)
    plain = APTSOptions(subdomains=world.size, local=PLAIN.local, coarse=PLAIN.coarse)
    alone: list[Timing] = []
    if world.rank == 0:
        calls: list[Callable[[], None]] = [
            BarePasses(gradients=1, losses=1),
            Iteration(MPI.COMM_SELF, PLAIN),
            Iteration(MPI.COMM_SELF, APTSOptions()),
            Iteration(MPI.COMM_SELF, plain),
            Iteration(MPI.COMM_SELF, subdomains),
        ]
        alone = time_in_turn(calls, repetitions)
    wait_for_all(world, 0.01)
    together = time_in_turn([Iteration(world, plain), Iteration(world, subdomains)], repetitions)
    if world.rank == 0:
        print_table(alone, together, world.size)


def print_table(alone: list[Timing], together: list[Timing], ranks: int) -> None:
    """Print the medians with their quartiles and the ratios."""
    bare, plain, default, plain_split, default_split = alone
    table = Table(title=f"784-128^5-10, batch {BATCH}, {torch.get_num_threads()} thread(s) a rank")
    for column in ("iteration", "milliseconds", "quartiles", "ratio to", "ratio"):
        table.add_column(column, justify="left" if column in ("iteration", "ratio to") else "right")

    def row(name: str, timing: Timing, base: Timing | None = None, base_name: str = "") -> None:
        ratio = f"{timing.median / base.median:.3f}" if base else ""
        spread = f"{1e3 * timing.low:.2f} to {1e3 * timing.high:.2f}"
        table.add_row(name, f"{1e3 * timing.median:.2f}", spread, base_name, ratio)

    row("bare passes: forward, backward, forward", bare)
    row("plain sum, 1 subdomain, 1 rank", plain, bare, "bare passes")
    row("default solver, 1 subdomain, 1 rank", default, bare, "bare passes")
    if ranks > 1:
        row(f"plain sum, {ranks} subdomains, 1 rank", plain_split, bare, "bare passes")
        row(f"plain sum, {ranks} subdomains, {ranks} ranks", together[0], plain_split, "1 rank")
        row(f"default solver, {ranks} subdomains, 1 rank", default_split, bare, "bare passes")
        row(f"default solver, {ranks} subdomains, {ranks} ranks", together[1], default_split, "1 rank")
    Console().print(table)
