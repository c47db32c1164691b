"""APTS beside tuned optimizers on one problem: which runs there are, and how they are done and resumed."""

from __future__ import annotations

import difflib
import json
import math
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from apts_mpi.errors import InvalidInput, require
from apts_mpi.options import TrustRegionOptions
from apts_mpi.problems import build
from apts_mpi.records.directory import CONFIG, HISTORY, SUMMARY
from apts_mpi.tools import environment
from apts_mpi.train.__main__ import parse

# What a run printed, in its directory.
OUTPUT = "output.txt"

# Seconds between two looks at the running processes, and how long one that was told to end may take.
POLL, PATIENCE = 0.1, 10.0


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """Compare APTS, in its one default configuration, with Adam, SGD with momentum and L-BFGS over grids of step sizes.

    Runs that have ended are kept: the same command goes on where it stopped.

    Parameters
    ----------
    problems
        Names of problems of the package, or MODULE:FUNCTION for ones of your own.
    out
        Directory of the runs, tables and plots, one directory a problem.
    seeds
        Number of seeds: of initial networks and orders of the samples, the same for all methods.
    epochs
        Passes over the training samples. null: the problem's own number.
    max_seconds
        Stop each run after that many seconds of iterations, whatever the epochs: give many of these.
    baseline_epochs_factor
        Give the baselines that many times the epochs, where epochs of equal number are no fair measure.
    batch_size
        Samples a batch, over all ranks. null: the problem's own number.
    train_samples
        Use the first that many training samples. null: all.
    data_dir
        Directory (or text file) of the data, for problems that read some.
    dtype
        Of the networks and their inputs.
    subdomains
        Number of subdomains of APTS. null: its default.
    ranks
        Ranks of each run; more than 1 are started by mpirun.
    jobs
        Runs at once. Their seconds mean little where they share cores.
    robustness
        Also try initial radii and learning rates over six decades, with one seed.
    """

    problems: tuple[str, ...]
    out: str = "comparisons"
    seeds: int = 3
    epochs: int | None = None
    max_seconds: float | None = None
    baseline_epochs_factor: int = 1
    batch_size: int | None = None
    train_samples: int | None = None
    data_dir: str | None = None
    dtype: Literal["float32", "float64"] = "float32"
    subdomains: int | None = None
    ranks: int = 1
    jobs: int = 1
    robustness: bool = False

    def __post_init__(self) -> None:
        for name in ("seeds", "baseline_epochs_factor", "ranks", "jobs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        for name in ("epochs", "subdomains"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "give 1 or more, or null")
        limit = self.max_seconds
        require(limit is None or limit > 0.0, "max_seconds", limit, "give a number above 0, or null")


@dataclass(frozen=True, kw_only=True)
class Grids:
    """Step sizes to try.

    Parameters
    ----------
    learning_rates
        Of each baseline that takes part.
    sweep_rates
        Learning rates of every baseline for the robustness plot.
    sweep_factors
        Initial radii for the robustness plot, in automatic radii.
    """

    learning_rates: Mapping[str, tuple[float, ...]]
    sweep_rates: tuple[float, ...]
    sweep_factors: tuple[float, ...]


GRIDS = Grids(
    learning_rates={
        "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "sgd": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        "lbfgs": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    },
    sweep_rates=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    sweep_factors=(1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0),
)


@dataclass(frozen=True)
class Setting:
    """A method with one step size.

    Attributes
    ----------
    method
        ``apts``, ``adam``, ``sgd`` or ``lbfgs``.
    learning_rate
        Of a baseline.
    factor, radius
        Initial radius of APTS, in automatic radii and by itself; None is the automatic one.
    """

    method: str
    learning_rate: float | None = None
    factor: float = 1.0
    radius: float | None = None

    @property
    def name(self) -> str:
        """For directories."""
        if self.learning_rate is not None:
            return f"{self.method}-{self.learning_rate:g}"
        return self.method if self.radius is None else f"{self.method}-radius-{self.factor:g}"

    @property
    def step_size(self) -> str:
        """For tables."""
        return "automatic" if self.learning_rate is None else f"{self.learning_rate:g}"


@dataclass(frozen=True)
class Run:
    """One process of apts_mpi.train, to do or done.

    Parameters
    ----------
    setting, seed
        What it is in the comparison.
    ranks
        Of MPI.
    path
        Its run directory.
    arguments
        Of apts_mpi.train.
    config
        The configuration that the run directory will hold.
    """

    setting: Setting
    seed: int
    ranks: int
    path: Path
    arguments: tuple[str, ...]
    config: str

    def is_finished(self) -> bool:
        """Whether the run directory holds a run that came to its end."""
        return self._summary() is not None

    def check(self) -> None:
        """Raise `InvalidInput` if the directory holds another run that is finished: its results shall not be lost."""
        summary = self._summary()
        if summary is None:
            return
        there = f"{(self.path / CONFIG).read_text(encoding='utf-8')}ranks: {summary.get('ranks')}"
        here = f"{self.config}ranks: {self.ranks}"
        if there != here:
            lines = difflib.ndiff(there.splitlines(), here.splitlines())
            changes = [" ".join(line.split()) for line in lines if line[0] in "-+"]
            raise InvalidInput(
                f"out: {str(self.path)!r} holds a finished run with other options (- there, + now: "
                f"{'; '.join(changes)}); give another --out, or delete that directory"
            )

    def _summary(self) -> dict[str, Any] | None:
        """What the run came to; None for a run that did not write all of it."""
        try:
            return json.loads((self.path / SUMMARY).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return None

    def start(self) -> subprocess.Popen:
        """Start the process; what it prints goes to a file of the run directory."""
        launcher = ["mpirun", "-n", str(self.ranks)] if self.ranks > 1 else []
        program = [sys.executable, "-m", "apts_mpi.train", *self.arguments, f"--run-dir={self.path}", "--overwrite"]
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / OUTPUT, "w", encoding="utf-8") as output:
            return subprocess.Popen(
                launcher + program, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )

    def failure(self) -> str:
        """Why the run failed, in the last words about an error that it printed."""
        return failure_in(self.path / OUTPUT)

    def history(self) -> History:
        """The records of a finished run."""
        text = (self.path / HISTORY).read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()]
        return History(records[0], tuple(record for record in records if "train_loss" in record))


@dataclass(frozen=True)
class History:
    """The first iteration of a run, and one record an epoch."""

    first: dict[str, Any]
    epochs: tuple[dict[str, Any], ...]

    def column(self, name: str) -> list[float]:
        """One value an epoch; what was not finite is not a number."""
        return [math.nan if record[name] is None else float(record[name]) for record in self.epochs]


class Plan:
    """The runs on one problem.

    Parameters
    ----------
    problem
        Its name.
    options, grids
        What to run.

    Raises
    ------
    InvalidInput
        For a problem or options that cannot be used, and if the directory holds other runs.
    """

    def __init__(self, problem: str, options: ComparisonOptions, grids: Grids = GRIDS) -> None:
        self.problem, self.options, self.grids = problem, options, grids
        self.path = Path(options.out) / problem.replace(":", ".")
        self.epochs = options.epochs or self._own_epochs()
        settings = [Setting("apts")]
        for method, rates in grids.learning_rates.items():
            settings += [Setting(method, rate) for rate in rates]
        self.runs = [self._run(setting, seed) for setting in settings for seed in range(options.seeds)]
        self.sweep: list[Run] = []
        if options.robustness:
            swept = [Setting(method, rate) for method in grids.learning_rates for rate in grids.sweep_rates]
            self.sweep = [self._run(setting, 0) for setting in swept]

    def _own_epochs(self) -> int:
        options = self.options
        dtype = getattr(torch, options.dtype)
        return build(self.problem, data_dir=options.data_dir, train_samples=options.train_samples, dtype=dtype).epochs

    def add_radii(self) -> list[Run]:
        """Add other initial radii than the automatic one to the sweep, now that a finished run tells that one.

        Returns
        -------
        list of Run
            What was added.

        Raises
        ------
        InvalidInput
            If their directories hold other runs.
        """
        automatic = self.runs[0]
        if not self.options.robustness or not automatic.is_finished():
            return []
        unit, bounds = automatic.history().first["radius"], TrustRegionOptions()
        runs = []
        for factor in self.grids.sweep_factors:
            if factor == 1.0:
                runs.append(automatic)
            elif bounds.min_radius <= factor * unit <= bounds.max_radius:
                runs.append(self._run(Setting("apts", factor=factor, radius=factor * unit), 0))
        self.sweep += runs
        return runs

    def _run(self, setting: Setting, seed: int) -> Run:
        options = self.options
        values: dict[str, Any] = {
            "problem": self.problem,
            "optimizer": setting.method,
            "seed": seed,
            "epochs": self.epochs,
            "max_seconds": options.max_seconds,
            "batch_size": options.batch_size,
            "train_samples": options.train_samples,
            "data_dir": options.data_dir,
            "dtype": options.dtype,
        }
        if setting.method == "apts":
            values["subdomains"] = options.subdomains
            # Few digits: the automatic radius of a repeated run may differ by rounding, and the runs shall be kept.
            values["trust_region.initial_radius"] = None if setting.radius is None else f"{setting.radius:.4g}"
        else:
            values["learning_rate"] = setting.learning_rate
            values["epochs"] *= options.baseline_epochs_factor
        arguments = tuple(f"--{name}={value}" for name, value in values.items() if value is not None)
        path = self.path / f"{setting.name}-seed{seed}"
        run = Run(setting, seed, options.ranks, path, arguments, parse(arguments)[1])
        run.check()
        return run


def failure_in(output: Path) -> str:
    """The last words about an error in what a run printed."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.exists() else []
    errors = [line.strip() for line in lines if re.search(r"error\b", line, re.IGNORECASE)]
    return (errors or lines or ["it printed nothing"])[-1]


def missing(runs: Iterable[Run]) -> list[Run]:
    """The runs that are not finished, each once."""
    return [run for run in dict.fromkeys(runs) if not run.is_finished()]


def execute(runs: Iterable[Run], jobs: int, report: Callable[[Run, str | None], None]) -> dict[Run, str]:
    """Do the runs, and return why some failed.

    However this function is left, the processes that it started have ended.

    Parameters
    ----------
    runs
        In this order.
    jobs
        How many at once.
    report
        Called with each run as it ends, and why it failed or None.
    """
    waiting = deque(runs)
    running: dict[Run, subprocess.Popen] = {}
    failures: dict[Run, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.popleft()
                running[run] = run.start()
            environment.pause(POLL)
            for run in [run for run, process in running.items() if process.poll() is not None]:
                if running.pop(run).returncode != 0:
                    failures[run] = run.failure()
                report(run, failures.get(run))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
    return failures
