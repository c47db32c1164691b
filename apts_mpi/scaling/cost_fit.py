"""The unknowns of the cost model from measured runs, their errors at other sizes, and what follows for many ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from apts_mpi.errors import InvalidInput
from apts_mpi.scaling.calls import NETWORK, Amounts, Machine
from apts_mpi.scaling.cost_model import UNITS, Shape, added, seconds_of, terms

try:
    from scipy.optimize import nnls
except ModuleNotFoundError as error:
    raise InvalidInput("predict needs scipy, which is not installed; pip install apts_mpi[plot]") from error

# The unknowns that the times of the reduced model give by themselves: runs have too few columns to show them.
REDUCED = ("column", "pair", "cube")

# Terms of the model in the seconds of an event, on the rank with most of them; waiting is in none of these events.
TERMS_OF_EVENTS = {
    ("global evaluation", "judge"): ("gradient evaluations",),
    ("local solves",): ("local solves",),
    ("coarse",): ("Jacobian products", "reduced model"),
}

# A study has outlived its use where less than this part of the ranks' time does the work of one rank.
HALF = 0.5

# Numbers of ranks without which nothing can be held out of a fit, so that no error is known.
FEWEST_SIZES = 3


@dataclass(frozen=True)
class Point:
    """A measured size.

    Attributes
    ----------
    shape
        What was run.
    seconds
        Of an iteration.
    events
        Seconds of an iteration in each event, of the rank with most.
    """

    shape: Shape
    seconds: float
    events: Mapping[str, float]


def fit_reduced_model(columns: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """Values of `REDUCED` from the times of forming and solving reduced models of so many columns."""
    rows = np.array([[m, m**2, m**3] for m in columns], dtype=float)
    return dict(zip(REDUCED, _solve(rows, np.array(seconds)), strict=True))


def fit(points: Sequence[Point], reduced: Mapping[str, float], machine: Machine) -> dict[str, float]:
    """Values of the unknowns by non-negative least squares, each equation relative to the time of its iteration.

    Parameters
    ----------
    points
        Measured sizes; those of one rank have no messages.
    reduced
        Values of `fit_reduced_model`.
    machine
        On which they were measured.

    Raises
    ------
    InvalidInput
        If all have the same number of ranks.
    """
    ranks = sorted({point.shape.ranks for point in points})
    if len(ranks) < 2:
        raise InvalidInput(f"predict: the runs are all of {ranks} ranks; measure one more size, such as --ranks 1 2")
    unknown = [name for name in UNITS if name not in REDUCED]
    equations = [equation for point in points for equation in _equations(point, machine)]
    rows = np.array([[amounts.get(name, 0.0) for name in unknown] for amounts, _, _ in equations])
    given = (*REDUCED, NETWORK)
    known = np.array([seconds_of({n: amounts.get(n, 0.0) for n in given}, reduced) for amounts, _, _ in equations])
    right = np.array([seconds for _, seconds, _ in equations])
    weights = np.array([1.0 / whole for _, _, whole in equations])
    solution = _solve(rows * weights[:, None], np.maximum(right - known, 0.0) * weights)
    return dict(zip(unknown, solution, strict=True)) | dict(reduced)


def _solve(rows: np.ndarray, right: np.ndarray) -> list[float]:
    # Unknowns that differ by ten orders of magnitude: columns of length one.
    lengths = np.linalg.norm(rows, axis=0)
    lengths[lengths == 0.0] = 1.0
    solution, _ = nnls(rows / lengths, right)
    return (solution / lengths).tolist()


def _equations(point: Point, machine: Machine) -> list[tuple[Amounts, float, float]]:
    """Amounts, their seconds, and those of the iteration: of it all and of the events that hold computation alone."""
    parts = terms(point.shape, machine)
    found = [(added(*parts.values()), point.seconds, point.seconds)]
    for events, names in TERMS_OF_EVENTS.items():
        seconds = sum(point.events.get(event, 0.0) for event in events)
        if seconds > 0.0:
            found.append((added(*(parts[name] for name in names)), seconds, point.seconds))
    return found


def predicted(shape: Shape, values: Mapping[str, float], machine: Machine) -> dict[str, float]:
    """Seconds of each term of an iteration."""
    return {name: seconds_of(amounts, values) for name, amounts in terms(shape, machine).items()}


def held_out(
    points: Sequence[Point], reduced: Mapping[str, float], machine: Machine
) -> dict[int, list[tuple[Point, float]]]:
    """For each number of ranks its points with the seconds that a fit of all other sizes predicts.

    Raises
    ------
    InvalidInput
        Below `FEWEST_SIZES`: no size is left over that would say how wrong the fit is.
    """
    sizes = sorted({point.shape.ranks for point in points})
    if len(sizes) < FEWEST_SIZES:
        raise InvalidInput(
            f"predict: the runs are of {len(sizes)} number(s) of ranks, {sizes}, and a fit to fewer than "
            f"{FEWEST_SIZES} cannot be checked by a size that is left out; measure one more size, such as --ranks 1 2 4"
        )
    found = {}
    for ranks in sizes:
        values = fit([point for point in points if point.shape.ranks != ranks], reduced, machine)
        own = [point for point in points if point.shape.ranks == ranks]
        found[ranks] = [(point, sum(predicted(point.shape, values, machine).values())) for point in own]
    return found


def extrapolate(shape: Shape, kind: str, most_ranks: int) -> list[Shape]:
    """The same study up to ``most_ranks``, each rank with a core of its own: twice the ranks each time.

    Parameters
    ----------
    shape
        A size of it.
    kind
        ``strong``: batch and subdomains stay. ``weak``: both grow with the ranks.
    most_ranks
        The last size.
    """
    doublings = range(math.ceil(math.log2(most_ranks)))
    return [grown(shape, kind, ranks) for ranks in [2**power for power in doublings] + [most_ranks]]


def grown(shape: Shape, kind: str, ranks: int) -> Shape:
    """A size of a study with another number of ranks, each with a core of its own; see `extrapolate`."""
    more = replace(shape, ranks=ranks, cores=0)
    if kind == "strong":
        return more
    samples = shape.batch_size * ranks // shape.ranks
    return replace(more, batch_size=samples, subdomains=max(1, shape.subdomains * ranks // shape.ranks))


@dataclass(frozen=True)
class Limit:
    """Where the efficiency falls below a half, and the term that then loses most.

    Attributes
    ----------
    ranks
        The least that were looked at; None: none.
    term
        Its name.
    share
        Of the time of an iteration.
    """

    ranks: int | None
    term: str = ""
    share: float = 0.0


def first_limit(shapes: Sequence[Shape], values: Mapping[str, float], machine: Machine) -> Limit:
    """Which term limits a study first. What a term loses is its seconds beyond its even share of those of one rank."""
    base = predicted(shapes[0], values, machine)
    whole = sum(base.values())
    for shape in shapes[1:]:
        parts = predicted(shape, values, machine)
        seconds = sum(parts.values())
        # Work a rank, compared with that of the first size: 1 in a weak study, fewer samples a rank in a strong one.
        even = shape.batch_size * shapes[0].ranks / (shapes[0].batch_size * shape.ranks)
        if whole * even < HALF * seconds:
            term = max(parts, key=lambda name: parts[name] - even * base.get(name, 0.0))
            return Limit(shape.ranks, term, parts[term] / seconds)
    return Limit(None)
