"""The progress of a run, for those who watch it and for its records."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress

from apts_mpi.records.directory import RunDirectory
from apts_mpi.tools.environment import seconds
from apts_mpi.train.columns import Columns
from apts_mpi.train.loggers import Loggers


class Reporter:
    """Shows and keeps the progress of a run, on rank 0: a line an epoch, and on a terminal a bar.

    Parameters
    ----------
    total, done
        Accepted steps that the run will come to, and those before it was resumed.
    directory
        Where records go; None on the other ranks, which report nothing.
    console
        Where to print.
    monitor
        Whether to print a line an iteration.
    loggers
        Where records go as well.
    """

    def __init__(
        self,
        total: int,
        done: int,
        directory: RunDirectory | None,
        console: Console,
        monitor: bool,
        loggers: Loggers | None,
    ) -> None:
        self._directory = directory
        self._loggers = loggers
        self._console = console
        self._monitor = monitor
        self._progress = Progress(console=console, disable=directory is None or not console.is_terminal)
        self._task = self._progress.add_task("training", total=total, completed=done)
        self._total, self._done, self._steps = total, done, 0
        self._started = seconds()
        self._columns: Columns | None = None
        # Of the last iteration, and of those of the epoch.
        self._last: dict[str, Any] = {}
        self._rejected = 0

    def __enter__(self) -> Reporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def record(self, values: dict[str, Any]) -> None:
        """Take in one iteration or one epoch."""
        if self._directory is None:
            return
        self._directory.record(values)
        if self._loggers is not None:
            self._loggers.record(values)
        if "train_loss" in values:
            self._directory.flush()
            self._print_epoch(values)
        else:
            if self._monitor:
                self._print(values)
            self._last = values
            self._steps += bool(values["accepted"])
            self._rejected += not (values["accepted"] or values.get("skipped", False))
            self._progress.update(self._task, advance=float(values["accepted"]))

    def _print_epoch(self, values: dict[str, Any]) -> None:
        """Print the line of an epoch, above the first one the headings."""
        shown: dict[str, Any] = {name: self._last[name] for name in ("rho", "next_radius") if name in self._last}
        if shown:
            shown["rejected"] = self._rejected
        shown |= {"left": self._seconds_left()} | values
        if self._columns is None:
            self._columns = Columns(self._console.width, shown)
            self._console.print(self._columns.heading(), highlight=False, soft_wrap=True)
        self._console.print(self._columns.line(shown), highlight=False, soft_wrap=True)
        self._rejected = 0

    def _seconds_left(self) -> float | None:
        """Seconds to the end, were all steps like those so far; None before the first one."""
        ahead = max(0, self._total - self._done - self._steps)
        return (seconds() - self._started) / self._steps * ahead if self._steps else None

    def _print(self, values: dict[str, Any]) -> None:
        parts = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in values.items()
            if not isinstance(value, dict)
        ]
        self._console.print("  ".join(parts), highlight=False, soft_wrap=True)
