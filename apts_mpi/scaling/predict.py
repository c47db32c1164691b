"""What measured studies say of many ranks: the fit, its errors at held-out sizes, and what limits first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from apts_mpi.errors import InvalidInput
from apts_mpi.options import USUAL_LARGEST
from apts_mpi.scaling.calls import Exchanges, Machine
from apts_mpi.scaling.cost_fit import (
    Limit,
    Point,
    extrapolate,
    first_limit,
    fit,
    fit_reduced_model,
    held_out,
    predicted,
)
from apts_mpi.scaling.cost_model import UNITS, Shape
from apts_mpi.scaling.measured import MeasuredRun, check_belong_together
from apts_mpi.scaling.report import studies_of
from apts_mpi.scaling.studies import Studies
from apts_mpi.tools.command import say

# How far studies are predicted, and the sizes of the table.
MOST_RANKS = 10_000
SHOWN = (1, 16, 128, 1024, MOST_RANKS)

ELEMENT_SIZES = {"float32": 4, "float64": 8}


@dataclass(frozen=True)
class Prediction:
    """What was found.

    Attributes
    ----------
    values
        Of the unknowns, in the units of `UNITS`.
    points
        The measured sizes of each study.
    errors
        For each number of ranks that was held out, its points with predicted seconds.
    shapes
        What each study becomes with more ranks.
    limits
        Which term limits each first.
    machine, measured_on
        That is predicted, and on which the runs were.
    """

    values: dict[str, float]
    points: dict[str, list[Point]]
    errors: dict[int, list[tuple[Point, float]]]
    shapes: dict[str, list[Shape]]
    limits: dict[str, Limit]
    machine: Machine
    measured_on: Machine


def point_of(run: MeasuredRun) -> Point:
    """A measured size.

    Raises
    ------
    InvalidInput
        If the run was of an optimizer without subdomains.
    """
    summary, options = run.summary, run.options
    if summary["optimizer"] != "apts":
        raise InvalidInput(f"optimizer: {summary['optimizer']!r} has no cost model; give studies of apts")
    coarse, replicas = options["coarse"], options["replicas"]
    judge = summary["events"]["judge"]
    staged = options["layout"] == "staged" and run.ranks > replicas
    shape = Shape(
        layout=options["layout"],
        ranks=run.ranks,
        subdomains=summary["subdomains"],
        batch_size=run.batch_size,
        parameters=summary["parameters"],
        element_size=ELEMENT_SIZES[options["dtype"]],
        columns=len(coarse["columns"]) if coarse["model"] != "none" else 0,
        largest=coarse.get("largest") or USUAL_LARGEST,
        coarse_share=coarse.get("samples"),
        targets=summary.get("targets_per_sample", 1),
        micro_batches=options["pipeline"]["micro_batches"],
        # To be judged a step sends its activations once; the few scalars beside them do not count.
        activation_bytes=judge["bytes"] / judge["calls"] / run.batch_size * replicas if staged else 0.0,
        cores=run.cores,
        exchanges=_exchanges(run),
    )
    # Events are of the whole run, whose first iteration is a slow one.
    scale = run.median / summary["seconds"]
    events = {name: scale * event["seconds_max"] for name, event in summary["events"].items()}
    return Point(shape, run.median, events)


def _exchanges(run: MeasuredRun) -> Exchanges:
    """Messages of an iteration by event, as the rank with most of them has counted them."""
    iterations, events = run.summary["iterations"], run.summary["events"]
    counts = {name: round(event["messages"] / iterations) for name, event in events.items()}
    sizes = {name: event["bytes"] / max(1, event["messages"]) for name, event in events.items()}
    return Exchanges({name: (count, sizes[name]) for name, count in counts.items() if count})


def predict(studies: Studies, machine: Machine, measured_on: Machine) -> Prediction:
    """Fit the model to all sizes of all studies, and to all but one in turn.

    Parameters
    ----------
    studies
        What was measured.
    machine, measured_on
        To predict, and on which it was measured.

    Raises
    ------
    InvalidInput
        If there are fewer than three sizes, or a staged study without a run of two stages.
    """
    if not studies.runs:
        raise InvalidInput("predict: the file has no runs; measure some with apts_mpi.scaling run")
    check_belong_together(studies.runs)
    points = {name: [point_of(run) for run in runs] for name, runs in studies_of(studies.runs).items()}
    points = {name: _with_activations(name, own) for name, own in points.items()}
    every = [point for own in points.values() for point in own]
    reduced = fit_reduced_model(list(studies.reduced_model), list(studies.reduced_model.values()))
    errors = held_out(every, reduced, measured_on)
    values = fit(every, reduced, measured_on)
    shapes = {name: extrapolate(own[-1].shape, name.split(", ")[0], MOST_RANKS) for name, own in points.items()}
    limits = {name: first_limit(own, values, machine) for name, own in shapes.items()}
    return Prediction(values, points, errors, shapes, limits, machine, measured_on)


def _with_activations(name: str, points: list[Point]) -> list[Point]:
    """Stages exchange the same bytes a sample at any number of them; one stage exchanges none to learn them from."""
    if points[0].shape.layout == "replicated":
        return points
    size = max(point.shape.activation_bytes for point in points)
    if not size:
        raise InvalidInput(f"{name}: no run has two stages, which would show their messages; measure --ranks 2 as well")
    return [replace(point, shape=replace(point.shape, activation_bytes=size)) for point in points]


def print_prediction(prediction: Prediction, console: Console) -> None:
    """Print the values, the errors, some sizes and the limits."""
    table = Table(title="fitted")
    for heading in ("unknown", "value", "unit"):
        table.add_column(heading, justify="right" if heading == "value" else "left")
    for name, unit in UNITS.items():
        value = prediction.values[name]
        table.add_row(name, f"{value:.3g}" if value else "0 (not seen)", unit)
    console.print(table)
    _print_errors(prediction, console)
    say(console, f"measured on {prediction.measured_on.network}; predicted on {prediction.machine.network}")
    for name, shapes in prediction.shapes.items():
        _print_sizes(name, shapes, prediction, console)
        limit = prediction.limits[name]
        sentence = f"{name}: the efficiency stays above a half up to {MOST_RANKS} ranks"
        if limit.ranks is not None:
            sentence = (
                f"{name}: limited first by the {limit.term}: at {limit.ranks} ranks the efficiency is below a half, "
                f"and they are {limit.share:.0%} of an iteration"
            )
        say(console, sentence)


def _print_errors(prediction: Prediction, console: Console) -> None:
    table = Table(title="each size predicted from the others", caption="More ranks than cores: as many share one.")
    for heading in ("ranks", "study", "measured s", "predicted s", "error"):
        table.add_column(heading, justify="left" if heading == "study" else "right")
    for ranks, found in prediction.errors.items():
        for point, seconds in found:
            name = next(name for name, own in prediction.points.items() if point in own)
            error = f"{seconds / point.seconds - 1.0:+.0%}"
            shown = "below 1%" if error in ("+0%", "-0%") else error
            table.add_row(str(ranks), name, f"{point.seconds:.4g}", f"{seconds:.4g}", shown)
    console.print(table)


def _print_sizes(name: str, shapes: Sequence[Shape], prediction: Prediction, console: Console) -> None:
    values, machine = prediction.values, prediction.machine
    table = Table(title=f"{name}, predicted")
    for heading in ("ranks", "seconds", "samples/s", "efficiency", "longest terms"):
        table.add_column(heading, justify="left" if heading == "longest terms" else "right")
    base = shapes[0]
    base_speed = base.batch_size / sum(predicted(base, values, machine).values())
    for shape in (shape for shape in shapes if shape.ranks in SHOWN):
        parts = predicted(shape, values, machine)
        whole = sum(parts.values())
        longest = sorted(parts, key=lambda term: -parts[term])[:3]
        shares = ", ".join(f"{term} {parts[term] / whole:.0%}" for term in longest)
        speed = shape.batch_size / whole
        efficiency = speed / base_speed * base.ranks / shape.ranks
        table.add_row(str(shape.ranks), f"{whole:.4g}", f"{speed:.4g}", f"{efficiency:.1%}", shares)
    console.print(table)


def as_json(prediction: Prediction) -> dict[str, Any]:
    """The same as data."""
    values = prediction.values
    return {
        "values": values,
        "units": UNITS,
        "network": str(prediction.machine.network),
        "measured_on": str(prediction.measured_on.network),
        "errors": [
            {"ranks": ranks, "layout": point.shape.layout, "batch_size": point.shape.batch_size}
            | {"measured": point.seconds, "predicted": seconds}
            for ranks, found in prediction.errors.items()
            for point, seconds in found
        ],
        "studies": {
            name: {
                "limit": {"ranks": limit.ranks, "term": limit.term, "share": limit.share},
                "sizes": [
                    {"ranks": shape.ranks, "seconds": predicted(shape, values, prediction.machine)} for shape in shapes
                ],
            }
            for (name, shapes), limit in zip(prediction.shapes.items(), prediction.limits.values(), strict=True)
        },
    }
