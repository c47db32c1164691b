"""The progress of a run, for those who watch it and for its records."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from apts_mpi.records.directory import RunDirectory
from apts_mpi.tools.environment import seconds
from apts_mpi.train.columns import Columns, duration
from apts_mpi.train.loggers import Loggers
from apts_mpi.train.options import ProgressName
from apts_mpi.train.progress import Pace

# Seconds between two looks of the live line, at least: what is drawn more often nobody can read.
INTERVAL = 0.2


def console_for(progress: ProgressName, console: Console) -> Console:
    """The console of a run: one that draws whatever takes its output, where the live line is always to be shown."""
    return Console(force_terminal=True, quiet=console.quiet) if progress == "always" else console


def is_live(progress: ProgressName, console: Console) -> bool:
    """Whether a line that is rewritten in its place may be shown.

    By itself on a terminal alone, of which the output is asked: colours can be forced on a pipe by the environment.
    """
    return progress == "always" or (progress == "auto" and console.is_terminal and console.file.isatty())


class Reporter:
    """Shows and keeps the progress of a run, on rank 0: a line an epoch, and below them one that is rewritten.

    Parameters
    ----------
    pace
        How far the run is.
    directory
        Where records go; None on the other ranks, which report nothing.
    console
        Where to print.
    live
        Whether to show the line that is rewritten, see `is_live`.
    monitor
        Whether to print a line an iteration.
    loggers
        Where records go as well.
    """

    def __init__(
        self,
        pace: Pace,
        directory: RunDirectory | None,
        console: Console,
        live: bool,
        monitor: bool,
        loggers: Loggers | None,
    ) -> None:
        self._pace = pace
        self._directory = directory
        self._loggers = loggers
        self._console = console
        self._monitor = monitor
        # Drawn between iterations and not by a thread, which would take time from them.
        self._bar = Bar(
            *(TextColumn("{task.description}"), BarColumn(None), TaskProgressColumn()),
            TextColumn("{task.fields[left]}"),
            console=console,
            auto_refresh=False,
            transient=True,
            expand=True,
            disable=directory is None or not live,
        )
        self._task = self._bar.add_task("the first iteration", total=1.0, left="")
        self._drawn = seconds()
        self._columns: Columns | None = None
        # Of the last iteration, and of those of the epoch.
        self._last: dict[str, Any] = {}
        self._rejected = 0

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

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
            self._rejected += not (values["accepted"] or values.get("skipped", False))
            self._draw(values)

    def _draw(self, values: dict[str, Any]) -> None:
        """Rewrite the live line, unless that was done just now."""
        now = seconds()
        if self._bar.disable or now - self._drawn < INTERVAL:
            return
        self._drawn = now
        left = self._pace.seconds_left()
        self._bar.update(
            self._task,
            completed=self._pace.share(),
            description=f"epoch {values['epoch']}, iteration {values['iteration']}, loss {values['loss']:.4g}",
            left="" if left is None else f"{duration(left)} left",
            refresh=True,
        )

    def _print_epoch(self, values: dict[str, Any]) -> None:
        """Print the line of an epoch, above the first one the headings."""
        shown: dict[str, Any] = {name: self._last[name] for name in ("rho", "next_radius") if name in self._last}
        if shown:
            shown["rejected"] = self._rejected
        shown |= {"left": self._pace.seconds_left()} | values
        if self._columns is None:
            self._columns = Columns(self._console.width, shown)
            self._console.print(self._columns.heading(), highlight=False, soft_wrap=True)
        self._console.print(self._columns.line(shown), highlight=False, soft_wrap=True)
        self._rejected = 0

    def _print(self, values: dict[str, Any]) -> None:
        parts = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in values.items()
            if not isinstance(value, dict)
        ]
        self._console.print("  ".join(parts), highlight=False, soft_wrap=True)
