"""Event files for TensorBoard, written while a run trains."""

from __future__ import annotations

import os
from typing import Any

from apts_mpi.errors import InvalidInput
from apts_mpi.records.directory import TENSORBOARD
from apts_mpi.records.lasting import LastingFile
from apts_mpi.tools.environment import host, wall_time
from apts_mpi.train.logger import Logger, LoggerSetting, Record, tagged

# Of the format of event files.
VERSION = "brain.Event:2"


def check_tensorboard() -> None:
    """Raise `InvalidInput` where the package that writes event files is missing."""
    try:
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError as error:
        raise InvalidInput(
            f"tensorboard: its package cannot be imported ({error}); pip install apts_mpi[tensorboard], or choose "
            "another logger"
        ) from error


class TensorBoard(Logger):
    """Writes the records of a run as scalars to ``tensorboard`` in its directory; the event files there stay.

    What they say of iterations after those that the run has done no longer counts.
    """

    # Not by torch's SummaryWriter: its thread ends with a traceback at the first write that fails.

    @classmethod
    def check(cls) -> None:
        """See `Logger`."""
        check_tensorboard()

    def __init__(self, setting: LoggerSetting) -> None:
        super().__init__(setting)
        path, done = setting.directory / TENSORBOARD, setting.iteration
        # Optional, and a second to import.
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        # TensorBoard reads the files of a directory in the order of their names.
        name = f"events.out.tfevents.{int(wall_time()):010d}.{host()}.{os.getpid()}.0"
        try:
            self._file = LastingFile(path / name, setting.tell)
        except OSError as error:
            raise InvalidInput(
                f"tensorboard: {str(path)!r} cannot be written ({error}); give another run_dir"
            ) from error
        self._writer = RecordWriter(self._file)
        self._add(file_version=VERSION)
        if done:
            self._add(step=done + 1, file_version=VERSION)
            self._add(step=done + 1, session_log=SessionLog(status=SessionLog.START))

    def on_iteration(self, record: Record) -> None:
        """See `Logger`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for tag, value in tagged(record).items():
            self._add(step=record["iteration"], summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))

    def on_epoch(self, record: Record) -> None:
        """See `Logger`."""
        self.on_iteration(record)
        self._file.flush()

    def close(self) -> None:
        """See `Logger`."""
        self._file.close()

    def _add(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.write(Event(wall_time=wall_time(), **content).SerializeToString())
