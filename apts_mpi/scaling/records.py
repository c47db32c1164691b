"""What scaling studies measured, read from run directories and kept in one HDF5 file.

The file has the attributes ``format`` and ``version``, a dataset ``runs/NUMBER/seconds`` of each run with the seconds
of its iterations and, as attributes of that group, ``kind`` (strong or weak), ``cores`` and as text ``summary`` (JSON)
and ``configuration`` (YAML). ``reduced_model`` has one row a size: its columns, and seconds.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import statistics
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
import yaml

from apts_mpi.curvature.linearisation import Column
from apts_mpi.errors import InvalidInput
from apts_mpi.records.directory import CONFIG, HISTORY, SUMMARY
from apts_mpi.schwarz.coarse import ReducedModel, inner_products
from apts_mpi.tools.environment import seconds

FORMAT, VERSION = "apts_mpi scaling studies", 1

# What runs must share to be in one file.
SHARED = ("problem", "optimizer", "parameters")

# What a summary must have.
NEEDED = (
    *(*SHARED, "ranks", "subdomains", "batch_size", "iterations"),
    *("train_loss", "seconds", "seconds_in_communication"),
)

# Options that do not change what is measured.
PLACES = ("run_dir", "overwrite", "resume", "view", "monitor", "log_view", "trace", "tensorboard")

# Columns of the reduced models that are timed, and how often; the least counts, as other programs only add to it.
REDUCED_MODELS, REPEATS = (16, 32, 64, 128, 256), 5


@dataclass(frozen=True)
class RunRecord:
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


@dataclass(frozen=True)
class Studies:
    """What a file holds.

    Attributes
    ----------
    runs
        In their order.
    reduced_model : dict of int to float
        Seconds of forming and solving reduced models, by their numbers of columns.
    """

    runs: tuple[RunRecord, ...] = ()
    reduced_model: dict[int, float] = field(default_factory=dict)


def read_run(path: Path, cores: int = 0) -> RunRecord:
    """The record of a finished run, of no study yet.

    Raises
    ------
    InvalidInput
        If it has fewer than two iterations, no events or those of a part of it, or files that cannot be read.
    """
    try:
        summary = dict(json.loads((path / SUMMARY).read_text(encoding="utf-8")))
        records = [json.loads(line) for line in (path / HISTORY).read_text(encoding="utf-8").splitlines()]
        # Records of epochs repeat the seconds of the iteration before.
        ends = [record["seconds"] for record in records if "train_loss" not in record]
        options = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
        configuration = without_places(options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InvalidInput(f"run: {str(path)!r} cannot be read as a run ({error}); give another directory") from error
    if len(ends) < 2:
        raise InvalidInput(f"{path} has too few iterations to measure; give at least 2, better 20")
    missing = [name for name in NEEDED if name not in summary] + (["events"] if not summary.get("events") else [])
    if missing:
        names = ", ".join(missing)
        raise InvalidInput(f"{path} has no {names} in its {SUMMARY}; run it again with this version of the package")
    _check_whole(path, summary, options)
    return RunRecord("", tuple(end - start for start, end in itertools.pairwise(ends)), summary, configuration, cores)


def _check_whole(path: Path, summary: dict[str, Any], options: dict[str, Any]) -> None:
    """Raise `InvalidInput` if a run was resumed: its events are those of the last part, its seconds of the whole."""
    if summary["optimizer"] != "apts":
        return
    try:
        calls, iterations = int(summary["events"]["judge"]["calls"]), int(summary["iterations"])
        stepped_globally = (options.get("global_step") or {}).get("model", "none") != "none"
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


def check_shared(runs: Sequence[RunRecord]) -> None:
    """Raise `InvalidInput` if the runs differ in what those of one file share."""
    for name in SHARED:
        values = {run.summary[name] for run in runs}
        if len(values) > 1:
            raise InvalidInput(f"the runs differ in {name}: {sorted(values)}; give those of one study")


def read_studies(path: Path) -> Studies:
    """What a file holds.

    Raises
    ------
    InvalidInput
        If it cannot be read, or is no file of scaling studies.
    """
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise InvalidInput(f"{path} is an HDF5 file of something else; give one that apts_mpi.scaling has made")
            if file.attrs["version"] != VERSION:
                raise InvalidInput(f"{path} is of version {file.attrs['version']}, not {VERSION}; measure again")
            runs = tuple(_read(file["runs"][name]) for name in sorted(file["runs"]))
            return Studies(runs, {int(columns): float(time) for columns, time in file["reduced_model"][()]})
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        words = re.search("error message = '(.*?)'", str(error))  # HDF5's text is long, and of several lines
        reason = words[1] if words else " ".join(str(error).split())
        raise InvalidInput(f"{path} cannot be read as an HDF5 file of scaling studies ({reason}); give one") from error


def _read(group: h5py.Group) -> RunRecord:
    attributes = group.attrs
    return RunRecord(
        attributes["kind"],
        tuple(group["seconds"][()].tolist()),
        json.loads(attributes["summary"]),
        attributes["configuration"],
        int(attributes["cores"]),
    )


def write_studies(path: Path, studies: Studies) -> None:
    """Write a file anew: complete, or as it was before.

    Raises
    ------
    InvalidInput
        If it cannot be written.
    """
    # In memory: on a full disk HDF5 ends the process by a segmentation fault.
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.attrs.update({"format": FORMAT, "version": VERSION})
        file["reduced_model"] = np.array(list(studies.reduced_model.items()), dtype=float).reshape(-1, 2)
        runs = file.create_group("runs")
        for number, run in enumerate(studies.runs):
            group = runs.create_group(f"{number:06}")
            group["seconds"] = np.array(run.seconds)
            group.attrs.update({"kind": run.kind, "cores": run.cores, "configuration": run.configuration})
            group.attrs["summary"] = json.dumps(run.summary)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written ({error}); give another file") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def add_runs(path: Path, runs: Iterable[RunRecord]) -> Studies:
    """Put runs into a file, which is made if it does not exist; those that it has already count once.

    Raises
    ------
    InvalidInput
        If they do not belong together with those of the file, or it cannot be read or written.
    """
    earlier = read_studies(path) if path.exists() else Studies((), time_reduced_models())
    studies = Studies(tuple({_key(run): run for run in (*earlier.runs, *runs)}.values()), earlier.reduced_model)
    check_shared(studies.runs)
    write_studies(path, studies)
    return studies


def _key(run: RunRecord) -> tuple[Any, ...]:
    return run.kind, run.configuration, run.ranks, run.seconds


def time_reduced_models() -> dict[int, float]:
    """Seconds on this machine of forming and solving reduced models, by their numbers of columns.

    The columns lie side by side, as those of the corrections do. Runs have few columns, whose eigen-decomposition
    nobody sees; with thousands it is all that one sees.
    """
    generator = np.random.default_rng(0)
    found = {}
    for count in REDUCED_MODELS:
        columns = [Column(index, index + 1, torch.ones(1)) for index in range(count)]
        factor = generator.standard_normal((count, count))
        curvature, slope = factor @ factor.T, generator.standard_normal(count)
        times = []
        for _ in range(REPEATS):
            start = seconds()
            model = ReducedModel(slope, curvature, inner_products(columns).numpy())
            model.minimise(1.0, 0.1, "2")
            times.append(seconds() - start)
        found[count] = min(times)
    return found
