"""What a run leaves behind: the run directory and the table at the end."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apts_mpi.errors import InvalidInput
from apts_mpi.records.lasting import LastingFile, make_file

CONFIG, HISTORY, SUMMARY = "config.yaml", "history.jsonl", "summary.json"

# What a run writes that was asked to: a file, and directories.
TRACE, TENSORBOARD, TORCH_PROFILE = "trace.json", "tensorboard", "torch-profile"


def make_directory(path: Path) -> Path:
    """Make a run directory, unless it is there, and return it; raise `InvalidInput` if it cannot be made."""
    with explained(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def make_new_directory(path: Path) -> Path:
    """Make a directory that nobody else has, and return it: ``path``, or that with -2, -3 and so on.

    Raises
    ------
    InvalidInput
        If it cannot be made.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        names = itertools.chain([path.name], (f"{path.name}-{number}" for number in itertools.count(2)))
        return next(place for place in map(path.with_name, names) if makes(place))


def makes(path: Path) -> bool:
    """Make a directory unless it is there, and say which: of several runs the file system lets one make it."""
    try:
        path.mkdir()
    except FileExistsError:
        return False
    return True


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors of the file system into `InvalidInput`."""
    try:
        yield
    except OSError as error:
        raise InvalidInput(f"run_dir: {str(path)!r} cannot be written ({error}); give another one") from error


class RunDirectory:
    """Directory of one run: ``config.yaml``, ``history.jsonl`` and ``summary.json``. For rank 0 alone.

    Once it is made, it raises nothing: a run goes on whatever becomes of its records. See `LastingFile`.

    Parameters
    ----------
    path
        Made if it does not exist.
    config
        The configuration, in a form that ``--config`` reads.
    tell
        Shows a message.
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

    def __init__(
        self,
        path: Path,
        config: str,
        tell: Callable[[str], None],
        overwrite: bool,
        history: bytes = b"",
        in_place: bool = False,
    ) -> None:
        self.path = path
        self._place = path.absolute()
        self._config = config
        make_directory(path)
        earlier = [name for name in (CONFIG, HISTORY, SUMMARY) if (path / name).exists()]
        if earlier and not overwrite:
            raise InvalidInput(
                f"run_dir: {str(path)!r} already holds a run ({', '.join(earlier)}); "
                "give another directory, or --overwrite to replace it"
            )
        with explained(path):
            for name in earlier:
                (path / name).unlink()
            (path / TRACE).unlink(missing_ok=True)
            shutil.rmtree(path / TORCH_PROFILE, ignore_errors=True)
            if not in_place and (path / TENSORBOARD).exists():
                shutil.rmtree(path / TENSORBOARD)
            self._history = LastingFile(path / HISTORY, tell, history)
            self._write(CONFIG, config)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one object to the history."""
        self._history.write(json.dumps(finite(values)).encode() + b"\n")

    def flush(self) -> None:
        """Let readers see the history so far, and the configuration where it is gone."""
        if self._history.flush() and not (self._place / CONFIG).exists():
            # What fails here is tried again with the next records.
            with suppress(OSError):
                self._write(CONFIG, self._config)

    def history(self) -> bytes:
        """All records so far."""
        return self._history.contents()

    def close(self) -> None:
        """End the history."""
        self.flush()
        self._history.close()

    def is_gone(self) -> bool:
        """Whether the directory is not there any more, or somebody else's by now."""
        try:
            return not self._history.is_in_place()
        except OSError:
            return True

    def write_summary(self, summary: Mapping[str, Any]) -> str:
        """Write the summary; return why there is none, empty if there is one."""
        reason = "its directory is gone, or somebody else's"
        try:
            if not self.is_gone():
                self._write(SUMMARY, json.dumps(finite(summary), indent=2) + "\n")
                return ""
        except OSError as error:
            reason = str(error.strerror)
        return f"{str(self.path / SUMMARY)!r} cannot be written ({reason})"

    def _write(self, name: str, text: str) -> None:
        os.close(make_file(self._place / name, text.encode()))


def finite(value: Any) -> Any:
    """The same value with None for numbers that JSON cannot hold (infinities, not a number)."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def print_summary(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the table at the end of a run."""
    ranks = "1 rank" if summary["ranks"] == 1 else f"{summary['ranks']} ranks"
    table = Table(title=f"{summary['problem']}, {summary['optimizer']}, {ranks}")
    table.add_column("result")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        if value is not None and not isinstance(value, (Mapping, str)):
            table.add_row(name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
