"""A solution on a grid of two coordinates, what a network has for it, and the difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apts_mpi.plot.figure import TEXT, WIDTH, Figure, rc_context, save

# Inches.
HEIGHT = 2.3


def plot_solution(
    axes: tuple[Any, Any], solution: Any, found: Any, files: Sequence[Path], labels: tuple[str, str] = ("t", "x")
) -> None:
    """Draw the solution, the network's values and the size of the error, by its logarithm.

    Parameters
    ----------
    axes : (ndarray (m,), ndarray (n,))
        The coordinates of the grid, ascending: the first lies horizontally.
    solution, found : ndarray, (m, n)
        Values on the grid.
    files
        Where to write the figure; the ends of the names say in which formats.
    labels
        Names of the coordinates.

    Raises
    ------
    InvalidInput
        If a file cannot be written.
    """
    error = abs(found - solution)
    largest = abs(solution).max()
    same = {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}
    # Four decades, also where there is no error at all.
    greatest = max(error.max(), largest * 1e-12)
    of_error = {"norm": "log", "vmin": greatest * 1e-4, "vmax": greatest, "cmap": "viridis"}
    panels = (("solution", solution, same), ("network", found, same), ("size of the error", error, of_error))
    with rc_context({"font.size": TEXT, "svg.hashsalt": "apts_mpi"}):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        for place, (title, values, style) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
            # An image within, as thousands of patches would make a large file.
            mesh = place.pcolormesh(*axes, values.T, shading="nearest", rasterized=True, **style)
            place.set_title(title, fontsize=TEXT)
            place.set_xlabel(labels[0])
            figure.colorbar(mesh, ax=place)
        figure.axes[0].set_ylabel(labels[1])
        save(figure, files, "out", dpi=150)
