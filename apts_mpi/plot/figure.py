"""What all plots share: matplotlib, or a word where it is missing; colours and line styles; names of files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apts_mpi.errors import InvalidInput

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter
except ModuleNotFoundError as error:
    raise InvalidInput("the plots need matplotlib, which is not installed; pip install apts_mpi[plot]") from error

# One place imports them, and tells where they are missing.
__all__ = ["COLORS", "LINE_STYLES", "STYLES", "Axes", "Figure", "NullFormatter", "ScalarFormatter", "rc_context"]

# Colours of Okabe and Ito, which the colour-blind can tell apart; line styles and markers for prints without colour.
STYLES: dict[str, dict[str, Any]] = {
    "apts": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "adam": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "sgd": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "lbfgs": {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
}

# Those and three more of the same authors' colours. As 7 and 4 have no common divisor, the pairs of colour and style
# repeat only after 28.
COLORS = (*(style["color"] for style in STYLES.values()), "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = tuple(style["linestyle"] for style in STYLES.values())

# Inches, for the width of a printed page without scaling, and points of the text.
WIDTH, TEXT = 7.2, 8.0

# Widths of lines in points.
THICK, MIDDLE, THIN = 1.6, 0.9, 0.6


def save(figure: Figure, files: Sequence[Path], option: str, dpi: int = 300) -> None:
    """Write a figure; the ends of the names say in which formats.

    Raises
    ------
    InvalidInput
        If a file cannot be written, naming the ``option`` that gave it.
    """
    for file in files:
        try:
            figure.savefig(file, dpi=dpi)
        except OSError as error:
            raise InvalidInput(
                f"{option}: {str(file)!r} cannot be written ({error}); give another --{option}"
            ) from error
