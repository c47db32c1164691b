"""What an iteration costs: beside its bare passes, beside one rank, and beside a step of AdamW."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from apts_mpi.apts import APTS
from apts_mpi.bench.beside_adamw import beside_adamw
from apts_mpi.bench.launches import as_json, launches_of, print_launches
from apts_mpi.bench.over_ranks import over_ranks
from apts_mpi.options import APTSOptions, CoarseOptions, LocalOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.timing import Timing, clock_of, time_in_turn, wait_for_all
from apts_mpi.parallel.transport import choose_device
from apts_mpi.tools.events import Events

BATCH = 2000
WIDTHS = (784, 128, 128, 128, 128, 128, 10)

BARE = "bare passes"

# Iterations whose launches are counted: two updates of curvature are among them.
COUNTED = 10

PLAIN = APTSOptions(local=LocalOptions(solver="sgd"), coarse=CoarseOptions(model="none"))


def network() -> torch.nn.Sequential:
    """The 784-128^5-10 network, the same on every call."""
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def batch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images and labels, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, WIDTHS[0], generator=generator)
    return images.to(device), torch.randint(0, WIDTHS[-1], (BATCH,), generator=generator).to(device)


class BarePasses:
    """A plain torch loop: ``gradients`` times forward and backward, ``losses`` times forward alone."""

    def __init__(self, gradients: int, losses: int, device: torch.device) -> None:
        self._network = network().to(device)
        self._batch = batch(device)
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

    def __init__(self, comm: MPI.Intracomm, options: APTSOptions, device: torch.device) -> None:
        self._solver = APTS(network().to(device), cross_entropy, comm=comm, options=options)
        self._batch = batch(device)

    def __call__(self) -> None:
        """One iteration."""
        self._solver.step(self._batch)


def iteration(repetitions: int, rounds: int, problems: Sequence[str], device: str, json: Path | None) -> None:
    """Time iterations on one rank beside their passes, on all ranks beside one, and beside AdamW. Collective."""
    world = Communicator(MPI.COMM_WORLD, Events())
    with world.shared_errors():
        chosen = choose_device(device, world.local_rank())
    beside_passes(repetitions, chosen, json)
    if world.rank == 0:
        beside_adamw(problems, rounds, chosen)
    wait_for_all(MPI.COMM_WORLD, 0.01)
    if problems and world.size > 1 and chosen.type == "cpu":
        over_ranks(problems, rounds)


def beside_passes(repetitions: int, device: torch.device, file: Path | None = None) -> None:
    """Time iterations on one rank beside their passes, and on all ranks beside one rank. Collective.

    Of those on one rank the launches are counted too; ``file`` gets all figures as JSON.
    """
    world, clock = MPI.COMM_WORLD, clock_of(device)
    split = APTSOptions(subdomains=world.size)
    plain_split = APTSOptions(subdomains=world.size, local=PLAIN.local, coarse=PLAIN.coarse)
    alone: dict[str, Timing] = {}
    calls: dict[str, Callable[[], None]] = {}
    if world.rank == 0:
        # On one rank the last two are the two before them.
        options = {
            plain_sum(1): PLAIN,
            default_solver(1): APTSOptions(),
            plain_sum(world.size): plain_split,
            default_solver(world.size): split,
        }
        iterations = {name: Iteration(MPI.COMM_SELF, chosen, device) for name, chosen in options.items()}
        calls = {BARE: BarePasses(1, 1, device), **iterations}
        alone = dict(zip(calls, time_in_turn(list(calls.values()), repetitions, clock=clock), strict=True))
    wait_for_all(world, 0.01)
    ours = [Iteration(world, options, device) for options in (plain_split, split)]
    together = time_in_turn(ours, repetitions, clock=clock)
    if world.rank == 0:
        print_table(alone, together, world.size)
        counted = {name: (alone[name], launches_of(call, COUNTED, device)) for name, call in calls.items()}
        print_launches(counted, device)
        if file is not None:
            seconds = {"plain sum": together[0].median, "default solver": together[1].median}
            found = {"device": str(device), "ranks": world.size, "one_rank": as_json(counted), "all_ranks": seconds}
            file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def plain_sum(subdomains: int) -> str:
    """Name of such iterations."""
    return f"plain sum, {subdomains} subdomain{'s' if subdomains > 1 else ''}"


def default_solver(subdomains: int) -> str:
    """Name of such iterations."""
    return f"default solver, {subdomains} subdomain{'s' if subdomains > 1 else ''}"


def print_table(alone: Mapping[str, Timing], together: Sequence[Timing], ranks: int) -> None:
    """Print the medians with their quartiles and the ratios."""
    bare = alone[BARE]
    table = Table(title=f"784-128^5-10, batch {BATCH}, {torch.get_num_threads()} thread(s) a rank")
    for column in ("iteration", "milliseconds", "quartiles", "ratio to", "ratio"):
        table.add_column(column, justify="left" if column in ("iteration", "ratio to") else "right")

    def row(name: str, timing: Timing, base: Timing | None = None, base_name: str = "") -> None:
        ratio = f"{timing.median / base.median:.3f}" if base else ""
        spread = f"{1e3 * timing.low:.2f} to {1e3 * timing.high:.2f}"
        table.add_row(name, f"{1e3 * timing.median:.2f}", spread, base_name, ratio)

    row(f"{BARE}: forward, backward, forward", bare)
    for name in (plain_sum(1), default_solver(1)):
        row(f"{name}, 1 rank", alone[name], bare, BARE)
    if ranks > 1:
        for name, timing in zip((plain_sum(ranks), default_solver(ranks)), together, strict=True):
            row(f"{name}, 1 rank", alone[name], bare, BARE)
            row(f"{name}, {ranks} ranks", timing, alone[name], "1 rank")
    Console().print(table)
