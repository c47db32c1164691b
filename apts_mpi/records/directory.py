"""What a run leaves behind: the run directory and the table at the end."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from apts_mpi.errors import InvalidInput

CONFIG, HISTORY, SUMMARY = "config.yaml", "history.jsonl", "summary.json"

# What a run writes that was asked to: a file, and a directory.
TRACE, TENSORBOARD = "trace.json", "tensorboard"


def make_directory(path: Path) -> None:
    """Make a run directory, unless it is there; raise `InvalidInput` if it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(f"run_dir: {str(path)!r} cannot be written ({error}); give another one") from error


class RunDirectory:
    """Directory of one run: ``config.yaml``, ``history.jsonl`` and ``summary.json``. For rank 0 alone.

    Parameters
    ----------
    path
        Made if it does not exist.
    overwrite
        Whether the records of an earlier run may be replaced.
    history
        Records with which the history begins, of the run that is resumed.
    in_place
        Whether that run is the one in the directory.

    Raises
    ------
    InvalidInput
        If the directory holds a run already, or cannot be written.
    """

    def __init__(self, path: Path, overwrite: bool, history: bytes = b"", in_place: bool = False) -> None:
        self.path = path
        make_directory(path)
        earlier = [name for name in (CONFIG, HISTORY, SUMMARY) if (path / name).exists()]
        if earlier and not overwrite:
            raise InvalidInput(
                f"run_dir: {str(path)!r} already holds a run ({', '.join(earlier)}); "
                "give another directory, or --overwrite to replace it"
            )
        try:
            for name in earlier:
                (path / name).unlink()
            (path / TRACE).unlink(missing_ok=True)
            if not in_place and (path / TENSORBOARD).exists():
                shutil.rmtree(path / TENSORBOARD)
            (path / HISTORY).write_bytes(history)
            self._history: IO[str] = open(path / HISTORY, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise InvalidInput(f"run_dir: {str(path)!r} cannot be written ({error}); give another one") from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidInput(f"run_dir: {str(self.path)!r} cannot be written any more ({error.strerror})") from error

    def write_config(self, text: str) -> None:
        """Keep the configuration, in a form that ``--config`` reads."""
        with self._explained():
            (self.path / CONFIG).write_text(text, encoding="utf-8")

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one object to the history."""
        with self._explained():
            self._history.write(json.dumps(finite(values)) + "\n")

    def flush(self) -> None:
        """Let readers see the history so far."""
        with self._explained():
            self._history.flush()

    def history(self) -> bytes:
        """All records so far, as the file has them."""
        self.flush()
        return (self.path / HISTORY).read_bytes()

    def close(self, summary: Mapping[str, Any]) -> None:
        """Write the summary and end the history."""
        with self._explained():
            self._history.close()
            (self.path / SUMMARY).write_text(json.dumps(finite(summary), indent=2) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same value with None for numbers that JSON cannot hold (infinities, not a number)."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the table at the end of a run."""
    table = Table(title=f"{summary['problem']}, {summary['optimizer']}, {summary['ranks']} ranks")
    table.add_column("result")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        if value is not None and not isinstance(value, (Mapping, str)):
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
