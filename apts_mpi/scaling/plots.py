"""Plots of scaling studies and of what the cost model predicts, for screen and print."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from apts_mpi.plot.figure import (
    COLORS,
    LINE_STYLES,
    MIDDLE,
    TEXT,
    THICK,
    THIN,
    WIDTH,
    Axes,
    Figure,
    NullFormatter,
    ScalarFormatter,
    rc_context,
    save,
)
from apts_mpi.scaling.calls import Machine
from apts_mpi.scaling.cost_fit import Point, predicted
from apts_mpi.scaling.cost_model import Shape

# Beside the colours, for prints without any.
HATCHES = ("", "///", "...", "xxx")
MARKERS = ("o", "s", "^", "D")

# Inches of a panel, and of the legend below.
HEIGHT, LEGEND = 2.6, 0.9

# A term is drawn where it is at least this part of an iteration somewhere.
SEEN = 0.02


def plot_report(tables: Mapping[str, Sequence[dict[str, Any]]], files: Sequence[Path]) -> None:
    """Draw speed-up and efficiency against ranks, and the share of each event.

    Parameters
    ----------
    tables
        For each study by its name the rows of `apts_mpi.scaling.report.rows`.
    files
        Where to write the figure; the ends of the names say in which formats.
    """
    with rc_context({"font.size": TEXT}):
        figure = Figure(figsize=(WIDTH, 2 * HEIGHT + LEGEND), layout="constrained")
        upper, lower = figure.subfigures(2, 1, squeeze=False)[:, 0]
        speed_up, efficiency = upper.subplots(1, 2)
        for number, (name, table) in enumerate(tables.items()):
            style = {"color": COLORS[number % len(COLORS)], "linestyle": LINE_STYLES[number % len(LINE_STYLES)]}
            style |= {"marker": MARKERS[number % len(MARKERS)], "markersize": 4.0, "linewidth": THICK}
            ranks = [row["ranks"] for row in table]
            speed_up.plot(ranks, [row["speed_up"] for row in table], label=name, **style)
            efficiency.plot(ranks, [row["efficiency"] for row in table], **style)
        sizes = sorted({row["ranks"] for table in tables.values() for row in table})
        speed_up.plot(sizes, [size / sizes[0] for size in sizes], color="0.5", linewidth=THIN, label="ideal")
        speed_up.set_yscale("log", base=2)
        efficiency.set_ylim(bottom=0.0)
        efficiency.axhline(1.0, color="0.5", linewidth=THIN)
        for axes, label in ((speed_up, "speed-up"), (efficiency, "efficiency")):
            _label_ranks(axes, sizes)
            axes.set_ylabel(label)
        speed_up.yaxis.set_major_formatter(ScalarFormatter())
        upper.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=3.5)
        _draw_shares(lower, tables)
        save(figure, files, "plot")


def _label_ranks(axes: Axes, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ranks")
    axes.grid(alpha=0.3, linewidth=0.5)


def _draw_shares(figure: Any, tables: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """A bar a size, one panel a study."""
    events = dict.fromkeys(event for table in tables.values() for row in table for event in row["shares"])
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (name, table) in zip(panels, tables.items(), strict=True):
        places, below = [str(row["ranks"]) for row in table], [0.0] * len(table)
        for number, event in enumerate(events):
            heights = [row["shares"].get(event, 0.0) for row in table]
            # Neighbours differ in their hatch, and each colour has other ones when it comes round again.
            hatch = HATCHES[2 * (number // len(COLORS)) + number % 2]
            style = {"color": COLORS[number % len(COLORS)], "hatch": hatch}
            axes.bar(places, heights, bottom=below, label=event, edgecolor="white", linewidth=THIN, **style)
            below = [base + height for base, height in zip(below, heights, strict=True)]
        axes.set_title(name, fontsize=TEXT)
        axes.set_xlabel("ranks")
    panels[0].set_ylabel("share of the time")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)


def plot_prediction(
    studies: Mapping[str, tuple[Sequence[Point], Sequence[Shape]]],
    values: Mapping[str, float],
    machine: Machine,
    files: Sequence[Path],
) -> None:
    """Draw the predicted seconds of an iteration and of its terms against ranks, and the measured ones.

    Parameters
    ----------
    studies
        For each study by its name the measured points and the shapes to predict.
    values
        Of the unknowns.
    machine
        That is predicted.
    files
        Where to write the figure.
    """
    parts = {name: [predicted(shape, values, machine) for shape in shapes] for name, (_, shapes) in studies.items()}
    terms = dict.fromkeys(term for of_study in parts.values() for part in of_study for term in _seen(part))
    columns = min(2, len(studies))
    with rc_context({"font.size": TEXT}):
        lines = math.ceil(len(studies) / columns)
        figure = Figure(figsize=(WIDTH, HEIGHT * lines + LEGEND), layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes in panels[len(studies) :]:
            axes.remove()
        for axes, (name, (points, shapes)) in zip(panels, studies.items(), strict=False):
            ranks = [shape.ranks for shape in shapes]
            totals = [sum(part.values()) for part in parts[name]]
            for number, term in enumerate(terms):
                style = {"color": COLORS[number % len(COLORS)], "linestyle": LINE_STYLES[number % len(LINE_STYLES)]}
                heights = [part.get(term, 0.0) or math.nan for part in parts[name]]
                axes.plot(ranks, heights, linewidth=MIDDLE, label=term, **style)
            axes.plot(ranks, totals, color="black", linewidth=THICK, label="iteration")
            _mark(axes, points)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylim(bottom=min(totals) * SEEN)
            axes.set_title(name, fontsize=TEXT)
            axes.grid(alpha=0.3, linewidth=0.5)
            axes.set_xlabel("ranks")
        for axes in panels[: len(studies) : columns]:
            axes.set_ylabel("seconds an iteration")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, handlelength=3.5)
        save(figure, files, "plot")


def _seen(part: Mapping[str, float]) -> list[str]:
    whole = sum(part.values())
    return [term for term, seconds in part.items() if seconds > SEEN * whole]


def _mark(axes: Axes, points: Sequence[Point]) -> None:
    """Measured sizes, those with more ranks than cores divided by how many share one."""
    style: dict[str, Any] = {"linestyle": "none", "color": "black", "marker": "o", "markersize": 4.0}
    for label, fill, shared in (("measured", "full", False), ("measured, / ranks a core", "none", True)):
        own = [point for point in points if (point.shape.sharing > 1.0) == shared]
        places = [point.shape.ranks for point in own]
        axes.plot(places, [point.seconds / point.shape.sharing for point in own], label=label, fillstyle=fill, **style)
