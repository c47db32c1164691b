"""Speed-up, efficiency and the share of each event, from the records of scaling studies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apts_mpi.errors import InvalidInput
from apts_mpi.records.directory import SUMMARY
from apts_mpi.scaling.measured import MeasuredRun, check_belong_together, read_measured_run
from apts_mpi.scaling.studies import read_studies

# Options in which the runs of a study may differ: a batch for each size in a weak one, and how long they take.
VARYING = ("batch_size", "seed", "epochs", "max_iterations", "train_samples")


@dataclass(frozen=True)
class Measurement:
    """What the runs of one size came to.

    Attributes
    ----------
    ranks, batch_size
        Of the run.
    seconds
        Of an iteration: the median over all but the first, which allocates and compiles.
    communication
        Share of the time that the rank which waited longest spent waiting for messages.
    train_loss
        At the end; None where it was not finite.
    shares
        Of the time of all ranks together, by event.
    """

    ranks: int
    batch_size: int
    seconds: float
    communication: float
    train_loss: float | None
    shares: dict[str, float]


def measurement(run: MeasuredRun) -> Measurement:
    """What one run came to."""
    summary = run.summary
    communication = summary["seconds_in_communication"] / summary["seconds"]
    shares = {name: event["share"] for name, event in summary["events"].items()}
    return Measurement(run.ranks, run.batch_size, run.median, communication, summary["train_loss"], shares)


def read_sources(paths: Sequence[Path], kind: str | None = None) -> tuple[list[MeasuredRun], list[Path]]:
    """The runs of one HDF5 file or of run directories, and the directories whose run did not come to its end.

    Parameters
    ----------
    paths
        Of the file or the directories.
    kind
        ``strong`` or ``weak``, the study of the directories; None: strong if all have the same batch.

    Raises
    ------
    InvalidInput
        If there is none, files and directories are mixed, or the runs do not belong together or to such a study.
    """
    files = [path for path in paths if path.is_file()]
    if files:
        if len(paths) > 1:
            raise InvalidInput(f"{files[0]} is a file; give one file alone, or directories of runs")
        if kind is not None:
            raise InvalidInput(f"kind: {kind!r} is for directories, and the file {files[0]} has it; leave it out")
        runs = list(read_studies(files[0]).runs)
        if not runs:
            raise InvalidInput(f"{files[0]} has no runs; measure some with apts_mpi.scaling run")
        return runs, []
    unfinished = [path for path in paths if not (path / SUMMARY).exists()]
    runs = [read_measured_run(path) for path in paths if path not in unfinished]
    if not runs:
        names = ", ".join(map(str, unfinished))
        raise InvalidInput(
            f"none of the runs has a {SUMMARY}: {names}; none came to its end. Give directories of finished runs, or "
            "an HDF5 file that is there"
        )
    check_belong_together(runs)
    batch_sizes = sorted({run.batch_size for run in runs})
    if kind == "strong" and len(batch_sizes) > 1:
        raise InvalidInput(f"kind: 'strong', but the runs differ in batch_size: {batch_sizes}; give weak")
    kind = kind or ("strong" if len(batch_sizes) == 1 else "weak")
    return [replace(run, kind=kind) for run in runs], unfinished


def studies_of(runs: Sequence[MeasuredRun]) -> dict[str, list[MeasuredRun]]:
    """For each study by its name one run a number of ranks, of several the median one, in the order of the ranks.

    Raises
    ------
    InvalidInput
        If runs of one size differ in their batch, or runs of one study in their options.
    """
    found = {}
    for study in dict.fromkeys(run.study for run in runs):
        own = [run for run in runs if run.study == study]
        _check_options(own)
        chosen = []
        for ranks in sorted({run.ranks for run in own}):
            same = sorted((run for run in own if run.ranks == ranks), key=lambda run: run.median)
            if len({run.batch_size for run in same}) > 1:
                raise InvalidInput(f"the runs at {ranks} ranks differ in batch_size; give those of one study")
            chosen.append(same[(len(same) - 1) // 2])
        found[", ".join(study)] = chosen
    return found


def _check_options(runs: Sequence[MeasuredRun]) -> None:
    first = runs[0].options
    for options in (run.options for run in runs[1:]):
        for name in first.keys() | options.keys():
            values = first.get(name), options.get(name)
            if name not in VARYING and values[0] != values[1]:
                raise InvalidInput(f"the runs differ in {name}: {values[0]} and {values[1]}; give those of one study")


def rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Measurements with samples a second, and speed-up and efficiency over the smallest number of ranks.

    The speed-up is the ratio of the samples a second: in a strong study, where all have one batch, the ratio of
    the times of an iteration; in a weak one the scaled speed-up (Gustafson), whose efficiency is that ratio.
    """
    table = []
    base = measurements[0]
    for measured in measurements:
        speed = measured.batch_size / measured.seconds
        speed_up = speed / (base.batch_size / base.seconds)
        efficiency = speed_up * base.ranks / measured.ranks
        table.append(asdict(measured) | {"samples_a_second": speed, "speed_up": speed_up, "efficiency": efficiency})
    return table


def print_table(name: str, table: Sequence[dict[str, Any]], console: Console) -> None:
    """Print one line a number of ranks."""
    base = table[0]["ranks"]
    shown = Table(
        title=name, caption=f"Speed-up: samples a second over those at {base} rank(s). Seconds: median of an iteration."
    )
    for heading in ("ranks", "batch", "seconds", "samples/s", "speed-up", "efficiency", "communication", "train loss"):
        shown.add_column(heading, justify="right")
    for row in table:
        loss = "not finite" if row["train_loss"] is None else f"{row['train_loss']:.4g}"
        shown.add_row(
            str(row["ranks"]),
            str(row["batch_size"]),
            f"{row['seconds']:.4g}",
            f"{row['samples_a_second']:.4g}",
            f"{row['speed_up']:.3g}",
            f"{row['efficiency']:.0%}",
            f"{row['communication']:.0%}",
            loss,
        )
    console.print(shown)


def print_shares(name: str, table: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the share of each event, one column a number of ranks."""
    shown = Table(title=f"{name}: share of the time of all ranks")
    shown.add_column("event")
    for row in table:
        shown.add_column(f"{row['ranks']} rank(s)", justify="right")
    for event in dict.fromkeys(event for row in table for event in row["shares"]):
        shown.add_row(event, *(f"{row['shares'].get(event, 0.0):.1%}" for row in table))
    console.print(shown)
