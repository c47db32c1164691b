"""Runs that came to their end, as scaling studies measure them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apts_mpi.errors import InvalidInput
from apts_mpi.records.directory import SUMMARY
from apts_mpi.records.reading import SHOWING, UNREADABLE, read_records

# What runs must share to be in one file.
SHARED = ("problem", "optimizer", "parameters")

# What a summary must have.
NEEDED = (
    *(*SHARED, "ranks", "subdomains", "batch_size", "iterations"),
    *("train_loss", "seconds", "seconds_in_communication"),
)

# Options that do not change what is measured.
PLACES = ("run_dir", "resume", *SHOWING)


@dataclass(frozen=True)
class MeasuredRun:
    """One run that came to its end.

    Attributes
    ----------
    kind
        ``strong`` or ``weak``, its study.
    seconds : tuple of float
        Of each iteration but the first, which allocates and compiles.
    summary
        Its ``summary.json``.
    configuration
        Its ``config.yaml`` without `PLACES`.
    cores
        That all ranks shared; 0 where that is not known.
    """

    kind: str
    seconds: tuple[float, ...]
    summary: dict[str, Any]
    configuration: str
    cores: int = 0

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.summary["ranks"]

    @property
    def batch_size(self) -> int:
        """Samples of a batch, over all ranks."""
        return self.summary["batch_size"]

    @property
    def median(self) -> float:
        """Median seconds of an iteration."""
        return statistics.median(self.seconds)

    @property
    def options(self) -> dict[str, Any]:
        """The configuration, nested."""
        return yaml.safe_load(self.configuration) or {}

    @property
    def study(self) -> tuple[str, str]:
        """Kind and layout, which the runs of a study share."""
        return self.kind, self.options.get("layout", "replicated")


def read_measured_run(path: Path, cores: int = 0) -> MeasuredRun:
    """The figures of a finished run, of no study yet.

    Raises
    ------
    InvalidInput
        If it has fewer than two iterations, no events or those of a part of it, or files that cannot be read.
    """
    try:
        run = read_records(path)
        if run.summary is None:
            raise FileNotFoundError(f"it has no {SUMMARY}")
        ends = [record["seconds"] for record in run.iterations]
        configuration = without_places(run.options)
    except UNREADABLE as error:
        raise InvalidInput(f"run: {str(path)!r} cannot be read as a run ({error}); give another directory") from error
    if len(ends) < 2:
        raise InvalidInput(f"{path} has too few iterations to measure; give at least 2, better 20")
    summary = run.summary
    missing = [name for name in NEEDED if name not in summary] + (["events"] if not summary.get("events") else [])
    if missing:
        names = ", ".join(missing)
        raise InvalidInput(f"{path} has no {names} in its {SUMMARY}; run it again with this version of the package")
    _check_whole(path, summary, run.options)
    seconds = tuple(end - start for start, end in itertools.pairwise(ends))
    return MeasuredRun("", seconds, summary, configuration, cores)


def _check_whole(path: Path, summary: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise `InvalidInput` if a run was resumed: its events are those of the last part, its seconds of the whole."""
    if summary["optimizer"] != "apts":
        return
    try:
        calls, iterations = int(summary["events"]["judge"]["calls"]), int(summary["iterations"])
        stepped_globally = (options.get("global_step") or {}).get("model", "none") not in ("auto", "none")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(f"run: {str(path)!r} cannot be read as a run ({error!r}); give another directory") from error
    # A global step is judged as well, so that the calls do not tell.
    if calls < iterations and not stepped_globally:
        raise InvalidInput(
            f"{path} was resumed: its events are of {calls} of its {iterations} iterations; run it again as a whole"
        )


def without_places(options: dict[str, Any]) -> str:
    """A configuration as text, but for where its run is kept: the same for runs that measure the same."""
    return yaml.safe_dump({name: value for name, value in options.items() if name not in PLACES}, allow_unicode=True)


def check_belong_together(runs: Sequence[MeasuredRun]) -> None:
    """Raise `InvalidInput` if the runs differ in what those of one file share."""
    for name in SHARED:
        values = {run.summary[name] for run in runs}
        if len(values) > 1:
            raise InvalidInput(f"the runs differ in {name}: {sorted(values)}; give those of one study")
