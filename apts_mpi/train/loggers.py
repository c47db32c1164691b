"""The loggers of a run: chosen by name, made, called, and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apts_mpi.errors import InvalidInput, shortened
from apts_mpi.tools.user_code import class_of
from apts_mpi.train.csv_files import CsvFiles
from apts_mpi.train.logger import Logger, LoggerSetting, Record, is_epoch
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.tensorboard import TensorBoard
from apts_mpi.train.trackers import MLflow, WandB

KINDS: dict[str, type[Logger]] = {"csv": CsvFiles, "tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}

# Characters of an error of theirs that a message repeats.
LONGEST_REASON = 300


def in_words(error: Exception) -> str:
    """An error on one line."""
    return shortened(" ".join(f"{type(error).__name__}: {error}".split()), LONGEST_REASON)


def chosen_loggers(options: TrainingOptions) -> dict[str, type[Logger]]:
    """The classes of the loggers that the options name; those that are there. For rank 0 alone.

    Raises
    ------
    InvalidInput
        If one is not.
    """
    names = dict.fromkeys([*options.loggers(), *(["tensorboard"] if options.tensorboard else [])])
    found = {name: KINDS.get(name) or class_of("--logger", name, Logger) for name in names}
    for kind in found.values():
        kind.check()
    return found


class Loggers:
    """All loggers of a run. For rank 0 alone; the other ranks have none.

    Parameters
    ----------
    kinds
        By name.
    setting
        What they are made for.

    Attributes
    ----------
    failure : str
        Why the first that failed did; empty as long as none has.

    Raises
    ------
    InvalidInput
        For one that cannot be made.
    """

    def __init__(self, kinds: dict[str, type[Logger]], setting: LoggerSetting) -> None:
        self.failure = ""
        self._loggers: dict[str, Logger] = {}
        for name, kind in kinds.items():
            try:
                self._loggers[name] = kind(setting)
            except Exception as error:
                self.close()
                if isinstance(error, InvalidInput):
                    raise
                raise InvalidInput(
                    f"logger: {name} cannot be made ({in_words(error)}); choose another, or mend it"
                ) from error

    def record(self, record: Record) -> None:
        """Give them an iteration or an epoch."""
        if is_epoch(record):
            self._call("on_epoch", lambda logger: logger.on_epoch(record))
        else:
            self._call("on_iteration", lambda logger: logger.on_iteration(record))

    def end(self, summary: Record) -> None:
        """Give them what the run came to."""
        self._call("on_end", lambda logger: logger.on_end(summary))

    def _call(self, name: str, call: Callable[[Logger], None]) -> None:
        for own, logger in list(self._loggers.items()):
            try:
                call(logger)
            except Exception as error:
                self.failure = self.failure or f"logger {own} failed in {name} with {in_words(error)}"
                self._leave([own])

    def _leave(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                self._loggers.pop(name).close()
            except Exception as error:
                self.failure = self.failure or f"logger {name} failed in close with {in_words(error)}"

    def close(self) -> None:
        """Let all leave."""
        self._leave(list(self._loggers))
