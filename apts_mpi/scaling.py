"""``python -m apts_mpi.scaling report RUN…``: speed-up and efficiency from the records of finished runs."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from apts_mpi.errors import InvalidInput
from apts_mpi.records import HISTORY, SUMMARY
from apts_mpi.train import FAILED, USAGE

# Columns of a table that goes to a file: enough for its cells to stay on one line.
FILE_WIDTH = 120

# What runs must share to be compared.
SHARED = ("problem", "optimizer", "parameters")


@dataclass(frozen=True)
class Measurement:
    """What one run, or the runs of one size, came to.

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
    """

    ranks: int
    batch_size: int
    seconds: float
    communication: float
    train_loss: float | None


def read(run: Path) -> tuple[dict[str, Any], Measurement]:
    """The summary of a run and what was measured.

    Raises
    ------
    InvalidInput
        If the run has fewer than two iterations.
    """
    summary = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    records = [json.loads(line) for line in (run / HISTORY).read_text(encoding="utf-8").splitlines()]
    # Records of epochs repeat the seconds of the iteration before.
    ends = [record["seconds"] for record in records if "train_loss" not in record]
    if len(ends) < 2:
        raise InvalidInput(f"{run} has too few iterations to measure; give at least 2, better 20")
    seconds = statistics.median(end - start for start, end in itertools.pairwise(ends))
    communication = summary["seconds_in_communication"] / summary["seconds"]
    return summary, Measurement(summary["ranks"], summary["batch_size"], seconds, communication, summary["train_loss"])


def collect(runs: Sequence[Path]) -> list[Measurement]:
    """One measurement a number of ranks, of several runs the median one, in the order of the ranks.

    Raises
    ------
    InvalidInput
        If the runs are not of one study.
    """
    pairs = [read(run) for run in runs]
    for name in SHARED:
        values = {summary[name] for summary, _ in pairs}
        if len(values) > 1:
            raise InvalidInput(f"the runs differ in {name}: {sorted(values)}; give those of one study")
    measurements = []
    for ranks in sorted({measurement.ranks for _, measurement in pairs}):
        same = sorted((m for _, m in pairs if m.ranks == ranks), key=lambda measurement: measurement.seconds)
        if len({measurement.batch_size for measurement in same}) > 1:
            raise InvalidInput(f"the runs at {ranks} ranks differ in batch_size; give those of one study")
        measurements.append(same[(len(same) - 1) // 2])
    return measurements


def rows(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Measurements with samples a second, and speed-up and efficiency over the smallest number of ranks.

    The speed-up is the ratio of the samples a second: in a strong study, where all have one batch, the ratio of
    the times of an iteration; in a weak one the scaled speed-up (Gustafson), whose efficiency is that ratio.
    """
    table = []
    base = measurements[0]
    for measurement in measurements:
        speed = measurement.batch_size / measurement.seconds
        speed_up = speed / (base.batch_size / base.seconds)
        efficiency = speed_up * base.ranks / measurement.ranks
        table.append(asdict(measurement) | {"samples_a_second": speed, "speed_up": speed_up, "efficiency": efficiency})
    return table


def report(runs: Sequence[Path], target: Path | None, console: Console) -> int:
    """Print the table of a study, and write it as JSON; return the exit status.

    Raises
    ------
    InvalidInput
        If no run ended, or the runs do not belong together.
    """
    finished = [run for run in runs if (run / SUMMARY).exists()]
    unfinished = [str(run) for run in runs if run not in finished]
    if not finished:
        raise InvalidInput(f"none of the runs has a {SUMMARY}: {', '.join(unfinished)}; none came to its end")
    table = rows(collect(finished))
    print_table(table, console)
    for run in unfinished:
        console.print(f"{run} has no {SUMMARY}: it did not come to its end", markup=False, soft_wrap=True)
    if target is not None:
        text = json.dumps({"sizes": table, "unfinished": unfinished}, indent=2)
        target.write_text(text + "\n", encoding="utf-8")
    return FAILED if unfinished else 0


def print_table(table: Sequence[dict[str, Any]], console: Console) -> None:
    """Print one line a number of ranks."""
    base = table[0]["ranks"]
    shown = Table(caption=f"Speed-up: samples a second over those at {base} rank(s). Seconds: median of an iteration.")
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exit status 1 if a run did not come to its end."""
    parser = argparse.ArgumentParser(prog="apts_mpi.scaling", description="Scaling studies.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    command = subparsers.add_parser("report", help="speed-up and efficiency of finished runs")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="directory of a run")
    command.add_argument("--json", type=Path, metavar="FILE", help="also write the table to FILE")
    options = parser.parse_args(arguments)
    try:
        console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
        status = report(options.runs, options.json, console)
    except InvalidInput as error:
        print(f"apts_mpi.scaling: error: {error}", file=sys.stderr)
        sys.exit(USAGE)
    sys.exit(status)


if __name__ == "__main__":
    main()
