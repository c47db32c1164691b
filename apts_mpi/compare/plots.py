"""Plots of a comparison, for screen and print."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apts_mpi.compare.equal import ERROR
from apts_mpi.compare.full_batch.options import TUNED
from apts_mpi.compare.options import METHODS
from apts_mpi.compare.table import Comparison, Outcome
from apts_mpi.plot.figure import COLORS, STYLES, Axes, Figure, save
from apts_mpi.plot.files import files_of

# Colours and line styles of all methods, which can be told apart without colour in a comparison of a few.
LOOKS: dict[str, dict[str, Any]] = {
    **STYLES,
    "adamw-cosine": {"color": COLORS[4], "linestyle": "-", "marker": "v"},
    "schedule-free": {"color": COLORS[5], "linestyle": "--", "marker": "<"},
    "muon": {"color": COLORS[6], "linestyle": "-.", "marker": ">"},
    "soap": {"color": COLORS[6], "linestyle": ":", "marker": "P"},
    "prodigy": {"color": COLORS[4], "linestyle": "--", "marker": "X"},
    "spring": {"color": COLORS[4], "linestyle": "-", "marker": "v"},
    "levenberg-marquardt": {"color": COLORS[5], "linestyle": "--", "marker": "<"},
    "broyden": {"color": COLORS[6], "linestyle": "-.", "marker": ">"},
    "adam-lbfgs": {"color": COLORS[2], "linestyle": ":", "marker": "^"},
}

AXES = {
    "epoch": "epochs",
    "gradient_evaluations": "gradient evaluations on the critical path",
    "seconds": "seconds",
}

# A horizontal axis is logarithmic if the longest curve is that many times as long as the shortest, which a linear one
# would squeeze.
SQUEEZED = 4.0

# Inches that an entry of the legend takes.
ENTRY = 2.8

# Losses above the highest initial one times this are drawn at the upper edge, as diverged.
DIVERGED = 3.0


def plot_losses(comparison: Comparison, path: Path) -> None:
    """Write ``loss.png`` and ``loss.svg``: training loss of each method with its best step size.

    Lines are means over the seeds, bands reach from the least to the greatest.
    """
    figure = Figure(figsize=(12.0, 4.0), layout="constrained")
    best = comparison.best()
    panels = figure.subplots(1, len(AXES), sharey=True)
    for axes, (name, label) in zip(panels, AXES.items(), strict=True):
        for row in best.values():
            _curve(axes, row, name, "train_loss")
        lengths = [row.mean(name)[-1] for row in best.values()]
        if lengths and max(lengths) > SQUEEZED * min(lengths):
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("training loss")
    _finish(figure, [panels[0]], _title(comparison), path / "loss")


def plot_equal_seconds(comparison: Comparison, path: Path) -> None:
    """Write ``cpu_seconds.png`` and ``cpu_seconds.svg``: losses, accuracies and errors against processor seconds.

    Of each method with its best step size; lines and bands as in `plot_losses`, but the lines of a problem whose error
    is known are medians, as in its table: errors of seeds may lie decades apart.
    """
    names = [name for name in ("train_loss", "test_loss", "test_accuracy", ERROR) if name in comparison.metrics]
    middle = "median" if ERROR in names else "mean"
    figure = Figure(figsize=(4.0 * max(len(names), 1), 4.0), layout="constrained")
    panels = figure.subplots(1, max(len(names), 1), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=False):
        for row in comparison.best().values():
            _curve(axes, row, "cpu_seconds", name, middle)
        if name.endswith(("_loss", "_error")):
            axes.set_yscale("log")
        axes.set_xlabel("processor seconds")
        axes.set_ylabel(name.replace("_", " "))
        axes.grid(alpha=0.3)
    _finish(figure, [panels[0]], _title(comparison, middle), path / "cpu_seconds")


def _title(comparison: Comparison, middle: str = "mean") -> str:
    seeds = comparison.plan.options.seeds
    return comparison.plan.problem + (f", {middle} and range of {seeds} seeds" if seeds > 1 else "")


def _curve(axes: Axes, row: Outcome, name: str, value: str, middle: str = "mean") -> None:
    values = list(zip(*(run.column("epochs", value) for run in row.finished), strict=False))
    style = LOOKS[row.setting.method]
    label = METHODS[row.setting.method]
    if row.setting.learning_rate is not None:
        label += f", {row.setting.tuned}" if row.setting.method in TUNED else f", step size {row.setting.step_size}"
    marker = style["marker"] if len(values) == 1 else None
    over_seeds = row.median if middle == "median" else row.mean
    places, color = over_seeds(name), style["color"]
    axes.plot(
        places, over_seeds(value), label=label, linewidth=1.8, color=color, linestyle=style["linestyle"], marker=marker
    )
    axes.fill_between(places, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2)


def plot_robustness(comparison: Comparison, path: Path) -> None:
    """Write ``robustness.png`` and ``robustness.svg``: final training loss against initial radius or learning rate."""
    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    initial = [run.iterations[0]["loss"] for row in comparison.sweep for run in row.finished]
    ceiling = DIVERGED * max((loss for loss in initial if loss is not None), default=1.0)
    for method in dict.fromkeys(row.setting.method for row in comparison.sweep):
        rows = [row for row in comparison.sweep if row.setting.method == method and row.finished]
        axes = panels[0 if method == "apts" else 1]
        places = [row.setting.learning_rate or row.setting.factor for row in rows]
        losses = [row.final("train_loss")[0] for row in rows]
        # Comparisons with what is not a number are false.
        heights = [loss if loss < ceiling else ceiling for loss in losses]
        axes.plot(places, heights, label=METHODS[method], linewidth=1.8, **LOOKS[method])
    for axes, label in zip(panels, ("initial radius / automatic radius", "learning rate"), strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.axhline(ceiling, color="0.5", linewidth=0.8)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("final training loss (top: diverged)")
    _finish(figure, panels, comparison.plan.problem, path / "robustness")


def _finish(figure: Figure, panels: Iterable[Axes], title: str, path: Path) -> None:
    lines = [line for axes in panels for line in axes.get_legend_handles_labels()[0]]
    # Below the panels, where it hides no curve.
    columns = max(1, min(len(lines), int(figure.get_figwidth() / ENTRY)))
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, handlelength=3.0)
    figure.suptitle(title)
    save(figure, files_of(path), "out", dpi=150)
