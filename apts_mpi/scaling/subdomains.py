"""Iterations to a loss as the network is cut into more subdomains, on one process that carries them all.

Iterates depend on subdomains and batch, not on the ranks: so this says how the method bears many ranks, in the place of
those.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from apts_mpi.errors import InvalidInput
from apts_mpi.options import APTSOptions, CoarseOptions, GlobalStepOptions

try:
    from apts_mpi.apts import APTS
    from apts_mpi.problems import build
except ImportError as error:
    raise InvalidInput(f"subdomains: the solver needs mpi4py, which cannot be imported ({error})") from error

# Of the digits.
PIXELS, CLASSES = 64, 10


class Residual(nn.Module):
    """A layer whose outputs are added to its inputs, times a factor with which they do not grow with the depth."""

    def __init__(self, width: int, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        """Of a batch, (b, width) to (b, width)."""
        return inputs + self.factor * self.linear(inputs).relu()


def deep_network(kind: str, layers: int, width: int) -> nn.Module:
    """A network for the digits: ``plain``, that of the problem; or ``residual``."""
    if kind == "plain":
        return build("digits", arguments={"depth": str(layers - 1), "width": str(width)}).network
    torch.manual_seed(0)
    hidden = [Residual(width, (layers - 2) ** -0.5) for _ in range(layers - 2)]
    return nn.Sequential(nn.Linear(PIXELS, width), *hidden, nn.Linear(width, CLASSES))


@dataclass(frozen=True)
class Series:
    """Iterations of one network with one bound of the columns, by the number of subdomains; None: more than were made.

    ``largest`` None stands for the bound of the options.
    """

    network: str
    layers: int
    largest: int | None
    iterations: dict[int, int | None]

    @property
    def growth(self) -> float | None:
        """Iterations with the most subdomains over those with 4, or with the fewest."""
        first = self.iterations.get(4, self.iterations[min(self.iterations)])
        last = self.iterations[max(self.iterations)]
        return None if first is None or last is None else last / max(first, 1)


def iterations_to(loss: float, network: nn.Module, subdomains: int, largest: int | None, most: int) -> int | None:
    """Iterations until the loss of all training digits is ``loss`` or less; None: more than ``most``.

    The batch is all of them. There is no global step, which would make up for what the coarse level lacks.
    """
    digits = build("digits")
    coarse = CoarseOptions(model="gauss-newton", largest=largest)
    options = APTSOptions(
        subdomains=subdomains, noise="none", coarse=coarse, global_step=GlobalStepOptions(model="none")
    )
    solver = APTS(network, digits.loss, options=options)
    for done in range(most + 1):
        if solver.step(digits.train).schwarz.loss <= loss:
            return done
    return None


def measure(options: Namespace) -> Iterator[Series]:
    """All series, without a bound of the columns and with each; more subdomains than layers are left out.

    ``options`` are those of the command, by their names there.
    """
    for kind, layers, largest in product(options.networks, options.layers, (None, *options.largest)):
        found = {
            number: iterations_to(
                options.loss, deep_network(kind, layers, options.width), number, largest, options.most
            )
            for number in options.subdomains
            if number <= layers
        }
        yield Series(kind, layers, largest, found)


def print_series(found: Sequence[Series], loss: float, console: Console) -> None:
    """A line a series."""
    numbers = sorted({number for series in found for number in series.iterations})
    table = Table(title=f"iterations to a loss of {loss:g} by the number of subdomains")
    for heading in ("network", "layers", "coarse.largest", *map(str, numbers), "growth"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for series in found:
        shown = {number: "more" if steps is None else str(steps) for number, steps in series.iterations.items()}
        growth = "" if series.growth is None else f"{series.growth:.2f}"
        bound = "null" if series.largest is None else str(series.largest)
        table.add_row(series.network, str(series.layers), bound, *(shown.get(number, "") for number in numbers), growth)
    console.print(table)


def as_json(found: Sequence[Series]) -> list[dict[str, Any]]:
    """A mapping a series."""
    return [asdict(series) | {"growth": series.growth} for series in found]
