"""What an iteration costs beside a step of AdamW in plain torch, on networks of several kinds, and which part of it.

The samples are random, in the shapes of the problems: the costs do not depend on their values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from apts_mpi.apts import APTS
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.timing import Timing, clock_of, time_in_turn
from apts_mpi.problems import Wanted, build
from apts_mpi.problems.images import PIXELS
from apts_mpi.problems.layers import mlp
from apts_mpi.problems.losses import token_cross_entropy
from apts_mpi.problems.text import CONTEXT, character_gpt
from apts_mpi.tools.command import FILE_WIDTH
from apts_mpi.tools.environment import cpu_seconds
from apts_mpi.trust_region.next_batch import TRIALS

Noise = Literal["none", "batches"]

CLASSES, CHARACTERS = 10, 65

# Iterations that are timed together: what is not done in each of them, such as curvature, counts with its share. As
# many as lie between updates of curvature, so that the first of them, which all update, are not timed.
TOGETHER = 20

# Different batches, as an iteration on one that is solved may leave out parts.
BATCHES = 5

SUBDOMAINS = (1, 2, 3, 6)

NOISE: tuple[Noise, ...] = ("none", "batches")

# Events of an iteration that the table has, in their order there; all others are together.
PARTS = ("global evaluation", "local solves", "assembly", "coarse", "judge")

HOST = torch.device("cpu")

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A network and its batches."""

    network: Callable[[], nn.Module]
    batch_size: int
    loss: Loss = cross_entropy
    sample: Callable[[int], Batch] = lambda count: (torch.randn(count, PIXELS), torch.randint(CLASSES, (count,)))

    def make(self, device: torch.device = HOST) -> nn.Module:
        """The network, the same on every call."""
        torch.manual_seed(0)
        return self.network().to(device)

    def batches(self, device: torch.device = HOST) -> list[Batch]:
        """Random ones, the same on every call."""
        torch.manual_seed(1)
        drawn = [self.sample(self.batch_size) for _ in range(BATCHES)]
        return [(inputs.to(device), targets.to(device)) for inputs, targets in drawn]

    def subdomains(self) -> list[int]:
        """Those of `SUBDOMAINS` for which the network has layers."""
        network = self.make()
        layers = SegmentedNetwork(network, None).layers(FlatParameters(network))
        return [number for number in SUBDOMAINS if number <= len(layers)]


def _of_problem(name: str) -> Callable[[], nn.Module]:
    """The network of a problem, without its data."""
    return lambda: build(name, wanted=Wanted(inputs=False, targets=False)).network


def _characters(count: int) -> Batch:
    tokens = torch.randint(CHARACTERS, (count, CONTEXT + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


CASES: Mapping[str, Case] = {
    "mlp-256": Case(_of_problem("fashion-mnist"), 256),
    "mlp-2000": Case(_of_problem("fashion-mnist"), 2000),
    "cnn-250": Case(_of_problem("fashion-mnist-cnn"), 250),
    "resnet-500": Case(_of_problem("fashion-mnist-resnet"), 500),
    "text-64": Case(lambda: character_gpt(CHARACTERS, CONTEXT, 128, 4, 4), 64, token_cross_entropy, _characters),
    "wide-1024": Case(lambda: mlp([PIXELS, 2048, 2048, CLASSES], nn.ReLU), 1024),
}


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
