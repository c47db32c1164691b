"""Iterations to a loss as the network is cut into more subdomains, on one process that carries them all.

Iterates depend on subdomains and batch, not on the ranks: so this says how the method bears many ranks, in the place of
those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from apts_mpi.errors import InvalidInput
from apts_mpi.options import APTSOptions, CoarseOptions, GlobalStepOptions

try:
    from apts_mpi.apts import APTS
    from apts_mpi.problems import build
except ImportError as error:
    raise InvalidInput(f"subdomains: the solver needs mpi4py, which cannot be imported ({error})") from error


@dataclass(frozen=True)
class Series:
    """Iterations of one network with one bound of the columns, by the number of subdomains; None: more than were made.

    ``largest`` None stands for the bound of the options.
    """

    layers: int
    largest: int | None
    iterations: dict[int, int | None]

    @property
    def growth(self) -> float | None:
        """Iterations with the most subdomains over those with 4, or with the fewest."""
        first = self.iterations.get(4, self.iterations[min(self.iterations)])
        last = self.iterations[max(self.iterations)]
        return None if first is None or last is None else last / max(first, 1)


def iterations_to(
    loss: float, layers: int, width: int, coarse: CoarseOptions, subdomains: int, most: int
) -> int | None:
    """Iterations until the loss of all training digits is ``loss`` or less; None: more than ``most``.

    The batch is all of them. There is no global step, which would make up for what the coarse level lacks.
    """
    digits = build("digits", arguments={"depth": str(layers - 1), "width": str(width)})
    options = APTSOptions(
        subdomains=subdomains, noise="none", coarse=coarse, global_step=GlobalStepOptions(model="none")
    )
    solver = APTS(digits.network, digits.loss, options=options)
    for done in range(most + 1):
        if solver.step(digits.train).schwarz.loss <= loss:
            return done
    return None


def measure(
    layers: Sequence[int], subdomains: Sequence[int], bounds: Sequence[int], loss: float, width: int, most: int
) -> list[Series]:
    """All series, without a bound of the columns and with each; more subdomains than layers are left out."""
    found = []
    for depth in layers:
        for largest in (None, *bounds):
            coarse = CoarseOptions(model="gauss-newton", largest=largest)
            numbers = [number for number in subdomains if number <= depth]
            steps = {number: iterations_to(loss, depth, width, coarse, number, most) for number in numbers}
            found.append(Series(depth, largest, steps))
    return found


def print_series(found: Sequence[Series], loss: float, console: Console) -> None:
    """A line a series."""
    numbers = sorted({number for series in found for number in series.iterations})
    table = Table(title=f"iterations to a loss of {loss:g} by the number of subdomains")
    for heading in ("layers", "coarse.largest", *map(str, numbers), "growth"):
        table.add_column(heading, justify="right")
    for series in found:
        shown = {number: "more" if steps is None else str(steps) for number, steps in series.iterations.items()}
        growth = "" if series.growth is None else f"{series.growth:.2f}"
        bound = "null" if series.largest is None else str(series.largest)
        table.add_row(str(series.layers), bound, *(shown.get(number, "") for number in numbers), growth)
    console.print(table)


def as_json(found: Sequence[Series]) -> list[dict[str, Any]]:
    """A mapping a series."""
    return [asdict(series) | {"growth": series.growth} for series in found]
