"""What training runs left behind, read back and put together by configuration."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apts_mpi.errors import InvalidInput
from apts_mpi.records.directory import CONFIG, HISTORY, SUMMARY

Records = tuple[dict[str, Any], ...]

# Options of what a run shows and writes beside its records.
SHOWING = ("overwrite", "view", "monitor", "progress", "log_view", "trace", "torch_profiler", "tensorboard", "logger")

# Options that change nothing of what a run does in its iterations, and the seed.
APART = {
    *SHOWING,
    *("seed", "walltime", "drift_check_every", "keep_best"),
    *(f"checkpoint_{name}" for name in ("every", "keep_last", "keep_every", "in_background")),
}


# What `read_records` meets files with that are not those of a run.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError)


@dataclass(frozen=True)
class RunRecords:
    """The records of one run.

    Attributes
    ----------
    path
        The run directory.
    options
        Its configuration, nested.
    summary
        What it came to; None for a run that has not come to its end.
    iterations, epochs
        The records of each, in their order.
    """

    path: Path
    options: dict[str, Any]
    summary: dict[str, Any] | None
    iterations: Records
    epochs: Records

    @property
    def config(self) -> dict[str, Any]:
        """The options by their full names, such as ``local.solver``."""
        return _flat(self.options)

    @property
    def ranks(self) -> int | None:
        """Of MPI; None for a run that has not come to its end."""
        return None if self.summary is None else self.summary["ranks"]

    def column(self, kind: str, name: str) -> list[float]:
        """A value of each record, not a number where it has none.

        Parameters
        ----------
        kind
            ``iterations`` or ``epochs``.
        name
            Of an entry of the records.
        """
        return [_number(record.get(name)) for record in getattr(self, kind)]


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone.

    Attributes
    ----------
    label
        What sets them apart from the other groups.
    runs
        At least one.
    """

    label: str
    runs: tuple[RunRecords, ...]

    def columns(self, kind: str, name: str) -> list[list[float]]:
        """`RunRecords.column` of each run, as far as the shortest reaches."""
        columns = [run.column(kind, name) for run in self.runs]
        length = min(map(len, columns))
        return [column[:length] for column in columns]


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def read_records(path: Path) -> RunRecords:
    """The records of a run, also of one that is under way or was interrupted.

    Raises
    ------
    Exception
        One of `UNREADABLE` for files that are not those of a run, or are not there.
    """
    options = dict(yaml.safe_load((path / CONFIG).read_text(encoding="utf-8")))
    # A run under way writes in blocks: the last line may be there in part.
    lines = (path / HISTORY).read_text(encoding="utf-8").split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    epochs = tuple(record for record in records if "train_loss" in record)
    iterations = tuple(record for record in records if "train_loss" not in record)
    return RunRecords(path, options, read_summary(path), iterations, epochs)


def read_summary(path: Path) -> dict[str, Any] | None:
    """What a run came to; None for one that has not come to its end. Raises as `read_records` does."""
    file = path / SUMMARY
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def read_run(path: Path) -> RunRecords:
    """`read_records` of a run that has begun.

    Raises
    ------
    InvalidInput
        If the directory holds no run, or one that has not recorded anything, or files that cannot be read.
    """
    try:
        run = read_records(path)
        # What sets it apart has to be there, too.
        _identity(run)
    except OSError as error:
        raise InvalidInput(
            f"run: {str(path)!r} is no run directory, as its {Path(error.filename).name} cannot be read ({error}); "
            "give a directory that apts_mpi.train has written"
        ) from error
    except UNREADABLE as error:
        raise InvalidInput(f"run: the files in {str(path)!r} are not those of a run ({error}); give another") from error
    if not run.iterations:
        raise InvalidInput(f"run: {str(path)!r} has no iteration in its {HISTORY} yet; wait, or give another run")
    return run


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in options.items():
        values |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return values


def group(runs: Iterable[RunRecords]) -> list[Group]:
    """Put runs together that differ in the seed alone, in the order of their first; a run given twice counts once."""
    found: dict[str, list[RunRecords]] = {}
    for run in {run.path.resolve(): run for run in runs}.values():
        found.setdefault(json.dumps(_identity(run), sort_keys=True, default=str), []).append(run)
    groups = list(found.values())
    return [Group(label, tuple(runs)) for label, runs in zip(_labels(groups), groups, strict=True)]


def _identity(run: RunRecords) -> dict[str, Any]:
    """What sets a run apart from others but for its seed. The number of ranks matters for seconds and evaluations."""
    without = APART | ({"learning_rate"} if run.config.get("optimizer") == "apts" else set())
    options = {name: value for name, value in run.config.items() if name not in without and value is not None}
    return options | {"ranks": run.ranks}


def _labels(groups: Sequence[Sequence[RunRecords]]) -> list[str]:
    """Of each group, the options in which the groups differ, or else its problem and optimizer."""
    identities = [_identity(runs[0]) for runs in groups]
    names = dict.fromkeys(["problem", "optimizer", *(name for identity in identities for name in identity)])
    differing = [name for name in names if any(other.get(name) != identities[0].get(name) for other in identities)]
    labels = []
    for identity in identities:
        own = [name for name in differing if name in identity] or ["problem", "optimizer"]
        labels.append(", ".join(_part(name, identity.get(name)) for name in own))
    return labels


def _part(name: str, value: Any) -> str:
    if name == "ranks" and value is None:
        return "not finished"
    return str(value) if name in ("problem", "optimizer") else f"{name.replace('_', ' ')} {value}"
