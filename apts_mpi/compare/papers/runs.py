"""The runs that try the claims of the papers: a method with some subdomains, or an optimizer with a step size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apts_mpi.compare.options import GRIDS
from apts_mpi.compare.runs import PlannedRun, Setting
from apts_mpi.errors import LARGEST, require, require_choice, require_fields
from apts_mpi.options.methods import METHODS
from apts_mpi.records.reading import RunRecords
from apts_mpi.train.parser import parse

OPTIMIZERS = ("adam", "sgd")


@dataclass(frozen=True, kw_only=True)
class PapersOptions:
    """What is compared.

    Parameters
    ----------
    problems
        Names of problems, or MODULE:FUNCTION for ones of your own.
    methods
        With commas between: of two-level, apts, iapts, apts-data and napts. Adam and SGD, over grids of step sizes,
        always take part.
    subdomains
        Numbers of subdomains, with commas between; those of which a problem's network has too few layers fail, and the
        table says so.
    seeds
        Number of seeds.
    epochs, batch_size, train_samples
        As in apts_mpi.train. null: the problem's own.
    data_dir
        Directory (or text file) of the data, for problems that read some.
    jobs
        Runs at once.
    out
        Directory of runs and tables, one directory a problem.
    """

    problems: tuple[str, ...]
    methods: str = ",".join(METHODS)
    subdomains: str = "2,4,6"
    seeds: int = 3
    epochs: int | None = None
    batch_size: int | None = None
    train_samples: int | None = None
    data_dir: str | None = None
    jobs: int = 1
    out: str = "papers"

    def __post_init__(self) -> None:
        require_fields(self)
        for name in ("seeds", "jobs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        for method in self.method_names:
            require_choice("methods", method, tuple(METHODS))
        for name in ("epochs", "batch_size", "train_samples"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "give 1 or more, or null")
        for number in self.subdomains.split(","):
            valid = number.isdecimal() and len(number) < len(str(LARGEST)) and int(number) > 0
            require(valid, "subdomains", number, "give numbers with commas between")

    @property
    def method_names(self) -> tuple[str, ...]:
        """The methods, each once."""
        return tuple(dict.fromkeys(self.methods.split(",")))

    @property
    def numbers(self) -> tuple[int, ...]:
        """Of subdomains, each once."""
        return tuple(dict.fromkeys(map(int, self.subdomains.split(","))))


@dataclass(frozen=True)
class Variant:
    """What has a row of the table: its runs differ in their seeds alone.

    Attributes
    ----------
    name
        Of the method or the optimizer.
    choice
        Number of subdomains, or learning rate.
    runs
        A run a seed.
    """

    name: str
    choice: float
    runs: tuple[PlannedRun, ...]

    def records(self) -> list[RunRecords]:
        """Of the runs that came to their end."""
        return [run.records() for run in self.runs if run.is_finished()]

    def end(self, metric: str) -> float:
        """The median over the seeds of a value of the summary; not a number where a run failed or has none."""
        records = self.records()
        values = [record.summary.get(metric) for record in records if record.summary is not None]
        if len(values) < len(self.runs) or None in values:
            return float("nan")
        return statistics.median(float(value) for value in values if value is not None)


def variants(problem: str, options: PapersOptions) -> list[Variant]:
    """All rows of a problem, methods first.

    Raises
    ------
    InvalidInput
        For options that cannot be used, and if the directory holds other runs.
    """
    common = {
        "problem": problem,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "train_samples": options.train_samples,
        "data_dir": options.data_dir,
    }
    directory = Path(options.out) / problem.replace(":", ".")
    found = [
        _variant(name, number, common | {"method": name, "subdomains": number}, options.seeds, directory)
        for name in options.method_names
        for number in options.numbers
    ]
    return found + [
        _variant(name, rate, common | {"optimizer": name, "learning_rate": rate}, options.seeds, directory)
        for name in OPTIMIZERS
        for rate in GRIDS.learning_rates[name]
    ]


def _variant(name: str, choice: float, values: Mapping[str, Any], seeds: int, directory: Path) -> Variant:
    setting = Setting(str(values.get("optimizer", "apts")), values.get("learning_rate"))
    runs = []
    for seed in range(seeds):
        given = {option: value for option, value in {**values, "seed": seed}.items() if value is not None}
        arguments = tuple(f"--{option}={value}" for option, value in given.items())
        path = directory / f"{name}-{choice:g}-seed{seed}"
        runs.append(PlannedRun(setting, seed, 1, path, arguments, parse(arguments)[1]))
        runs[-1].check()
    return Variant(name, choice, tuple(runs))


def all_runs(rows: Sequence[Variant]) -> list[PlannedRun]:
    """Of all rows."""
    return [run for row in rows for run in row.runs]
