"""The lines of the epochs of a run: columns that fit the width of the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Headings and widths, in their order; and the records of an epoch that they show, the first one that is there.
COLUMNS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("", 9, ("epoch",)),
    ("seconds", 7, ("seconds",)),
    ("left", 7, ("left",)),
    ("train loss", 10, ("train_loss",)),
    ("test loss", 9, ("test_loss",)),
    ("accuracy", 8, ("test_accuracy", "train_accuracy")),
    ("rho", 6, ("rho",)),
    ("radius", 8, ("next_radius",)),
    ("rejected", 8, ("rejected",)),
    ("error", 9, ("error",)),
    ("iterations", 10, ("iteration",)),
    ("evaluations", 11, ("gradient_evaluations",)),
    ("cpu seconds", 11, ("cpu_seconds",)),
)


def duration(seconds: float) -> str:
    """Seconds as ``H:MM:SS``, or as days and hours where there are many."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours < 24 else f"{hours // 24}d {hours % 24}h"


class Columns:
    """The columns of a run: those that it has values for, as many as a line has room for.

    Parameters
    ----------
    width
        Characters of a line.
    values
        A record of an epoch with what else columns show.
    """

    def __init__(self, width: int, values: Mapping[str, Any]) -> None:
        self._columns: list[tuple[str, int, str]] = []
        room = width + 1
        for heading, size, names in COLUMNS:
            name = next((name for name in names if name in values), None)
            if name is not None and size + 1 <= room:
                self._columns.append((heading, size, name))
                room -= size + 1

    def heading(self) -> str:
        """The line above the others."""
        return " ".join(heading.rjust(size) for heading, size, _ in self._columns)

    def line(self, values: Mapping[str, Any]) -> str:
        """The line of an epoch."""
        return " ".join(_cell(name, values.get(name)).rjust(size) for _, size, name in self._columns)


def _cell(name: str, value: Any) -> str:
    if name == "epoch":
        return f"epoch {value}".ljust(9)
    if name == "left":
        return "" if value is None else duration(value)
    if isinstance(value, float):
        return f"{value:.3g}" if name == "rho" else f"{value:.4g}"
    return "" if value is None else str(value)
