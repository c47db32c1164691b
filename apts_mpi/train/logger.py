"""What takes the records of a run while it trains: the protocol of loggers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What an iteration or an epoch did, or a run came to: numbers, texts and further such objects by name.
Record = Mapping[str, Any]

# Where a value stands on the horizontal axis, and what is the same for all.
AXES = {"iteration", "epoch"}


@dataclass(frozen=True)
class LoggerSetting:
    """What a logger is made for.

    Attributes
    ----------
    directory : Path
        Of the run, for what is written.
    iteration : int
        Iterations that the run has done.
    earlier : sequence of mapping
        Its records so far, of iterations and epochs, where it is resumed.
    configuration : mapping
        The options of the run, nested as in ``config.yaml``.
    tell : callable
        Shows a message.
    """

    directory: Path
    iteration: int
    earlier: Sequence[Record]
    configuration: Record
    tell: Callable[[str], None]


class Logger:
    """Takes the records of a run, on rank 0 alone; all methods do nothing by default.

    A class derived from it is named by ``--logger MODULE:CLASS``. What raises an exception gets nothing more; the run
    saves itself and ends on all ranks, with status 1 and the error.

    Parameters
    ----------
    setting
        See `LoggerSetting`.

    Raises
    ------
    InvalidInput
        If it cannot work there.
    """

    def __init__(self, setting: LoggerSetting) -> None:
        self.setting = setting

    @classmethod
    def check(cls) -> None:
        """Raise `InvalidInput`, before any work, where something is missing."""

    def on_iteration(self, record: Record) -> None:
        """Take an iteration: a line of ``history.jsonl``."""

    def on_epoch(self, record: Record) -> None:
        """Take an epoch with its metrics: a line of ``history.jsonl``."""

    def on_end(self, summary: Record) -> None:
        """Take what the run came to, as ``summary.json`` has it; ``reason`` alone where it was stopped."""

    def close(self) -> None:
        """Leave; also called after an error."""


def is_epoch(record: Record) -> bool:
    """Whether a record is one of an epoch."""
    return "train_loss" in record


def scalars(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record by their names, of those in an object within it ``OBJECT/NAME``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif name not in AXES and isinstance(value, int | float):
            yield prefix + name, float(value)


def tagged(record: Record) -> dict[str, float]:
    """The same as ``iteration/NAME`` or ``epoch/NAME``."""
    group = "epoch" if is_epoch(record) else "iteration"
    return {f"{group}/{name}": value for name, value in scalars(record)}
