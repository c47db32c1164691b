"""Event files for TensorBoard, written while a run trains."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from apts_mpi.errors import InvalidInput
from apts_mpi.records.lasting import LastingFile
from apts_mpi.tools.environment import host, wall_time

# Where a value stands on the horizontal axis, and what is the same for all.
AXES = {"iteration", "epoch"}

# Sentences.
NOTES = "notes"

# Of the format of event files.
VERSION = "brain.Event:2"


def check_tensorboard() -> None:
    """Raise `InvalidInput` where the package that writes event files is missing."""
    try:
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError as error:
        raise InvalidInput(
            f"tensorboard: its package cannot be imported ({error}); pip install apts_mpi[tensorboard], or leave "
            "--tensorboard out"
        ) from error


class ScalarWriter:
    """Writes the records of a run as scalars. For rank 0 alone.

    Parameters
    ----------
    path
        Directory of the event files; those that are there stay.
    tell
        Shows a message.
    done
        Iterations that the run has done; what the files there say of later ones no longer counts.

    Raises
    ------
    InvalidInput
        If nothing can be written there.
    """

    # Not by torch's SummaryWriter: its thread ends with a traceback at the first write that fails.

    def __init__(self, path: Path, tell: Callable[[str], None], done: int) -> None:
        # Optional, and a second to import.
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{int(wall_time()):010d}.{host()}.{os.getpid()}.0"
        try:
            self._file = LastingFile(path / name, tell)
        except OSError as error:
            raise InvalidInput(
                f"tensorboard: {str(path)!r} cannot be written ({error}); give another run_dir"
            ) from error
        self._writer = RecordWriter(self._file)
        self._add(file_version=VERSION)
        if done:
            self._add(step=done + 1, file_version=VERSION)
            self._add(step=done + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, values: Mapping[str, Any]) -> None:
        """Take in the record of an iteration or of an epoch."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        group = "epoch" if "train_loss" in values else "iteration"
        for name, value in _scalars(values):
            summary = Summary(value=[Summary.Value(tag=f"{group}/{name}", simple_value=value)])
            self._add(step=values["iteration"], summary=summary)

    def flush(self) -> None:
        """Let readers see what there is so far."""
        self._file.flush()

    def close(self) -> None:
        """Write what is left."""
        self._file.close()

    def _add(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=wall_time(), **content).SerializeToString())


def _scalars(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _scalars(value, f"{prefix}{name}/")
        elif name not in AXES and name != NOTES and value is not None:
            found.append((prefix + name, float(value)))
    return found
