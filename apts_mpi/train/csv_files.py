"""The records of a run as tables: ``iterations.csv`` and ``epochs.csv``."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from apts_mpi.errors import InvalidInput
from apts_mpi.records.lasting import LastingFile
from apts_mpi.train.logger import Logger, LoggerSetting, Record, is_epoch, scalars

NAMES = ("iterations.csv", "epochs.csv")


class Table:
    """A file of comma-separated values, whose columns are the numbers of its records.

    Parameters
    ----------
    path, tell
        See `apts_mpi.records.lasting.LastingFile`.
    """

    def __init__(self, path: Path, tell: Any) -> None:
        self._path, self._tell = path, tell
        self._columns: list[str] = []
        self._file = LastingFile(path, tell)

    def write(self, record: Record) -> None:
        """Append a row; a number that is new gets a column, empty in the rows before."""
        row = {"iteration": record["iteration"], "epoch": record["epoch"], **dict(scalars(record))}
        if new := [name for name in row if name not in self._columns]:
            rows = list(csv.DictReader(io.StringIO(self._file.contents().decode())))
            self._columns += new
            self._file.close()
            self._file = LastingFile(self._path, self._tell, self._text(self._header(), *rows))
        self._file.write(self._text(row))

    def _header(self) -> dict[str, str]:
        return dict(zip(self._columns, self._columns, strict=True))

    def _text(self, *rows: Record) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue().encode()

    def flush(self) -> None:
        """Let readers see what there is so far."""
        self._file.flush()

    def close(self) -> None:
        """Write what is left."""
        self._file.close()


class CsvFiles(Logger):
    """Writes the two tables to the directory of the run; those of an earlier run there are replaced.

    A resumed run has all rows again.
    """

    def __init__(self, setting: LoggerSetting) -> None:
        super().__init__(setting)
        try:
            self._iterations, self._epochs = (Table(setting.directory / name, setting.tell) for name in NAMES)
        except OSError as error:
            raise InvalidInput(
                f"logger: csv cannot write to {str(setting.directory)!r} ({error}); give another run_dir"
            ) from error
        for record in setting.earlier:
            (self._epochs if is_epoch(record) else self._iterations).write(record)

    def on_iteration(self, record: Record) -> None:
        """See `Logger`."""
        self._iterations.write(record)

    def on_epoch(self, record: Record) -> None:
        """See `Logger`."""
        self._epochs.write(record)
        self._iterations.flush()
        self._epochs.flush()

    def close(self) -> None:
        """See `Logger`."""
        self._iterations.close()
        self._epochs.close()
