"""Plots of training runs, for screen and print."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apts_mpi.errors import InvalidInput
from apts_mpi.plot.figure import COLORS, LINE_STYLES, MIDDLE, TEXT, THICK, THIN, WIDTH, Axes, Figure, rc_context, save
from apts_mpi.records.reading import Group

# What lies on the horizontal axes.
COLUMNS = {"iteration": "iterations", "gradient_evaluations": "gradient evaluations", "seconds": "seconds"}

# The metric of a problem whose solution is known.
ERROR = "relative_l2_error"

# How many groups can be told apart.
MOST_GROUPS = len(COLORS) * len(LINE_STYLES)

# Inches of a row of panels, and the opacity of what lies behind the others.
ROW_HEIGHT, FAINT = 1.9, 0.4

# Within this range ρ is drawn linearly, beyond it by its logarithm: steps far too long have values in the thousands.
LINEAR_RHO = 2.0

CROSS: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 4.0}


@dataclass(frozen=True)
class PanelRow:
    """A row of panels: label and scale of its vertical axis, whether a group has values for it, and what draws them."""

    label: str
    shown: Callable[[Group], bool]
    draw: Callable[[Axes, Group, str, dict[str, Any]], None]
    scale: str


def plot_runs(groups: Sequence[Group], files: Sequence[Path], rows: Sequence[str] | None = None) -> None:
    """Draw loss, accuracy, error, ρ and radius against iterations, evaluations and seconds.

    Lines are means over the seeds, bands reach from the least to the greatest value. Rows for which no run has values
    are left out.

    Parameters
    ----------
    groups
        Up to `MOST_GROUPS`.
    files
        Where to write the figure; the ends of the names say in which formats.
    rows
        Names in `ROWS` of those to draw, if there are values for them; None is all.

    Raises
    ------
    InvalidInput
        If there are too many groups to tell apart, no values for the rows, or a file cannot be written.
    """
    if len(groups) > MOST_GROUPS:
        raise InvalidInput(
            f"run: {len(groups)} configurations cannot be told apart in a plot; give {MOST_GROUPS} or fewer"
        )
    styles = list(itertools.islice(zip(itertools.cycle(COLORS), itertools.cycle(LINE_STYLES)), len(groups)))
    shown = [row for name, row in ROWS.items() if (rows is None or name in rows) and any(map(row.shown, groups))]
    if not shown:
        raise InvalidInput(f"rows: the runs have no {', '.join(rows or ROWS)}; give others, or other runs")
    with rc_context({"font.size": TEXT}):
        figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(shown) + 1.0), layout="constrained")
        panels = figure.subplots(len(shown), len(COLUMNS), sharex="col", sharey="row", squeeze=False)
        for (color, line_style), group in zip(styles, groups, strict=True):
            for row, line in zip(shown, panels, strict=True):
                for name, axes in zip(COLUMNS, line, strict=True):
                    if row.shown(group):
                        row.draw(axes, group, name, {"color": color, "linestyle": line_style})
        _label(shown, panels)
        _legends(figure, groups, styles)
        save(figure, files, "out")


def _label(rows: Sequence[PanelRow], panels: Any) -> None:
    for row, line in zip(rows, panels, strict=True):
        line[0].set_ylabel(row.label)
        for axes in line:
            low, high = axes.get_ylim()
            if row.scale == "symlog" and low >= -LINEAR_RHO and high <= LINEAR_RHO:
                axes.set_yscale("linear")
            elif row.scale == "symlog":
                axes.set_yscale("symlog", linthresh=LINEAR_RHO)
            else:
                axes.set_yscale(row.scale)
            axes.grid(alpha=0.3, linewidth=0.5)
    for axes, label in zip(panels[-1], COLUMNS.values(), strict=True):
        axes.set_xlabel(label)


def _legends(figure: Figure, groups: Sequence[Group], styles: Sequence[tuple[str, str]]) -> None:
    """Above the panels what the kinds of lines and marks mean, below them the groups."""
    axes = figure.axes[0]
    kinds: list[tuple[str, dict[str, Any]]] = [("training", {"linewidth": THICK})]
    if any(_has(group, "epochs", "test_loss") for group in groups):
        kinds.append(("test", {"linewidth": THIN}))
    kinds.append(("batch", {"linewidth": THIN, "alpha": FAINT}))
    if any(_rejected(group) for group in groups):
        kinds.append(("rejected step", CROSS))
    upper = [line for label, style in kinds for line in axes.plot([], [], color="0.2", label=label, **style)]
    lower = []
    for (color, line_style), group in zip(styles, groups, strict=True):
        seeds = len(group.runs)
        label = group.label + (f" (mean and range of {seeds} seeds)" if seeds > 1 else "")
        lower += axes.plot([], [], color=color, linestyle=line_style, linewidth=THICK, label=label)
    common: dict[str, Any] = {"frameon": False, "handlelength": 3.5}
    figure.legend(handles=upper, loc="outside upper center", ncols=len(upper), **common)
    figure.legend(handles=lower, loc="outside lower center", **common)


def _has(group: Group, kind: str, name: str) -> bool:
    return any(math.isfinite(value) for values in group.columns(kind, name) for value in values)


def _rejected(group: Group) -> bool:
    return any(not record["accepted"] for run in group.runs for record in run.iterations)


def _curve(axes: Axes, group: Group, kind: str, place: str, name: str, style: dict[str, Any]) -> None:
    """The mean over the seeds, and the range."""
    places = _means(group.columns(kind, place))
    values = group.columns(kind, name)
    axes.plot(places, _means(values), marker="o" if len(places) == 1 else None, markersize=3.0, **style)
    if len(values) > 1:
        ranges = list(zip(*values, strict=True))
        axes.fill_between(
            places, list(map(min, ranges)), list(map(max, ranges)), color=style["color"], alpha=0.2, linewidth=0.0
        )


def _means(columns: list[list[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*columns, strict=True)]


def _mark_rejected(axes: Axes, group: Group, place: str, name: str, color: str) -> None:
    """A cross at each rejected step of each seed; at the lower edge where its value is not finite."""
    for run in group.runs:
        rejected = [record for record in run.iterations if not record["accepted"]]
        inside = [record for record in rejected if record[name] is not None]
        outside = [record[place] for record in rejected if record[name] is None]
        style = CROSS | {"color": color}
        axes.plot([record[place] for record in inside], [record[name] for record in inside], **style)
        axes.plot(outside, [0.03] * len(outside), transform=axes.get_xaxis_transform(), **style)


def _draw_loss(axes: Axes, group: Group, place: str, style: dict[str, Any]) -> None:
    places, losses = (_means(group.columns("iterations", name)) for name in (place, "loss"))
    axes.plot(places, losses, **style | {"linewidth": THIN, "alpha": FAINT})
    _curve(axes, group, "epochs", place, "train_loss", style | {"linewidth": THICK})
    _curve(axes, group, "epochs", place, "test_loss", style | {"linewidth": THIN})
    _mark_rejected(axes, group, place, "loss", style["color"])


def _draw_accuracy(axes: Axes, group: Group, place: str, style: dict[str, Any]) -> None:
    _curve(axes, group, "epochs", place, "train_accuracy", style | {"linewidth": THICK})
    _curve(axes, group, "epochs", place, "test_accuracy", style | {"linewidth": THIN})


def _draw_error(axes: Axes, group: Group, place: str, style: dict[str, Any]) -> None:
    _curve(axes, group, "epochs", place, ERROR, style | {"linewidth": THICK})


def _draw_step(name: str) -> Callable[[Axes, Group, str, dict[str, Any]], None]:
    def draw(axes: Axes, group: Group, place: str, style: dict[str, Any]) -> None:
        _curve(axes, group, "iterations", place, name, style | {"linewidth": MIDDLE})
        _mark_rejected(axes, group, place, name, style["color"])

    return draw


def _shows(kind: str, name: str) -> Callable[[Group], bool]:
    return lambda group: _has(group, kind, name)


ROWS = {
    "loss": PanelRow("loss", _shows("iterations", "loss"), _draw_loss, "log"),
    "accuracy": PanelRow("accuracy", _shows("epochs", "train_accuracy"), _draw_accuracy, "linear"),
    "error": PanelRow("relative L2 error", _shows("epochs", ERROR), _draw_error, "log"),
    "rho": PanelRow("ρ", _shows("iterations", "rho"), _draw_step("rho"), "symlog"),
    "radius": PanelRow("radius", _shows("iterations", "radius"), _draw_step("radius"), "log"),
}
