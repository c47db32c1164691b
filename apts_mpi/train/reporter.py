"""The progress of a run, for those who watch it and for its records."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress

from apts_mpi.records.directory import RunDirectory
from apts_mpi.train.loggers import Loggers


class Reporter:
    """Shows and keeps the progress of a run, on rank 0: a bar on a terminal, plain lines elsewhere.

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
            self._print(values)
        else:
            if self._monitor:
                self._print(values)
            self._progress.update(self._task, advance=float(values["accepted"]))

    def _print(self, values: dict[str, Any]) -> None:
        parts = [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in values.items()
            if not isinstance(value, dict)
        ]
        self._console.print("  ".join(parts), highlight=False, soft_wrap=True)
