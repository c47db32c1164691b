"""APTS beside tuned optimizers on one problem: the runs, how they resume, and what they came to."""

from __future__ import annotations

import difflib
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from apts_mpi import environment
from apts_mpi.errors import InvalidInput
from apts_mpi.options import TrustRegionOptions, require
from apts_mpi.problems import build
from apts_mpi.records import CONFIG, HISTORY, SUMMARY
from apts_mpi.train import parse

METHODS = {"apts": "APTS", "adam": "Adam", "sgd": "SGD with momentum", "lbfgs": "L-BFGS"}

# What a run printed, in its directory.
OUTPUT = "output.txt"

# Seconds between two looks at the running processes, and how long one that was told to end may take.
POLL, PATIENCE = 0.1, 10.0

# Entries of an epoch's record that say where it was, not how good.
POSITIONS = ("epoch", "iteration", "gradient_evaluations", "seconds")


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
    baseline_epochs_factor
        Give the baselines that many times the epochs, where epochs of equal number are no fair measure.
    batch_size, train_samples, data_dir, dtype, subdomains
        As for apts_mpi.train.
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
        Key of `METHODS`.
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

    Raises
    ------
    InvalidInput
        For arguments that apts_mpi.train would refuse.
    """

    setting: Setting
    seed: int
    ranks: int
    path: Path
    arguments: tuple[str, ...]

    def __post_init__(self) -> None:
        self.config  # noqa: B018

    @cached_property
    def config(self) -> str:
        """The configuration that the run directory will hold."""
        return parse(self.arguments)[1]

    def is_finished(self) -> bool:
        """Whether the run directory holds this run, to its end.

        Raises
        ------
        InvalidInput
            If it holds another run, which took its time and shall not be lost.
        """
        summary = self._summary()
        if summary is None:
            return False
        ranks, config = summary.get("ranks"), (self.path / CONFIG).read_text(encoding="utf-8")
        if config == self.config and ranks == self.ranks:
            return True
        there, here = f"{config}ranks: {ranks}\n".splitlines(), f"{self.config}ranks: {self.ranks}\n".splitlines()
        changes = [line for line in difflib.ndiff(there, here) if line[0] in "-+"]
        raise InvalidInput(
            f"out: {str(self.path)!r} holds a finished run with other options than now (- there, + now: "
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
        path = self.path / OUTPUT
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        errors = [line.strip() for line in lines if re.search(r"error\b", line, re.IGNORECASE)]
        return (errors or lines or ["it printed nothing"])[-1]

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
        self.sweep = [self._run(setting, 0) for setting in self._swept_baselines()] if options.robustness else []
        for run in self.runs + self.sweep:
            run.is_finished()

    def _own_epochs(self) -> int:
        options = self.options
        dtype = getattr(torch, options.dtype)
        return build(self.problem, data_dir=options.data_dir, train_samples=options.train_samples, dtype=dtype).epochs

    def _swept_baselines(self) -> list[Setting]:
        return [Setting(method, rate) for method in self.grids.learning_rates for rate in self.grids.sweep_rates]

    def swept_radii(self) -> list[Run]:
        """Runs with other initial radii than the automatic one, once that is known from a finished run."""
        automatic = self.runs[0]
        if not self.options.robustness or not automatic.is_finished():
            return []
        bounds = TrustRegionOptions()
        runs = []
        for factor in self.grids.sweep_factors:
            radius = factor * automatic.history().first["radius"]
            if factor == 1.0:
                runs.append(automatic)
            elif bounds.min_radius <= radius <= bounds.max_radius:
                runs.append(self._run(Setting("apts", factor=factor, radius=radius), 0))
        return runs

    def _run(self, setting: Setting, seed: int) -> Run:
        options = self.options
        values: dict[str, Any] = {
            "problem": self.problem,
            "optimizer": setting.method,
            "seed": seed,
            "epochs": self.epochs,
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
        return Run(setting, seed, options.ranks, self.path / f"{setting.name}-seed{seed}", arguments)


def check_launcher(ranks: int) -> None:
    """Raise `InvalidInput` if runs with that many ranks cannot be started from this process."""
    launched = environment.launcher()
    if launched is not None and launched[0] > 1:
        raise InvalidInput("apts_mpi.compare starts mpirun itself; start it as one process, and give --ranks")
    require(
        ranks == 1 or shutil.which("mpirun") is not None, "ranks", ranks, "mpirun is not in PATH; add it, or give 1"
    )


def execute(runs: Iterable[Run], jobs: int, report: Callable[[Run, str | None], None]) -> dict[Run, str]:
    """Do the runs that are not finished, and return why some failed.

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
    waiting = deque(run for run in dict.fromkeys(runs) if not run.is_finished())
    running: dict[Run, subprocess.Popen] = {}
    failures: dict[Run, str] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.popleft()
                running[run] = run.start()
            time.sleep(POLL)
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


@dataclass(frozen=True)
class Row:
    """The finished runs of one setting, over the seeds.

    Attributes
    ----------
    setting
        The method and its step size.
    histories
        Of the runs that finished.
    failures
        How many did not.
    """

    setting: Setting
    histories: tuple[History, ...]
    failures: int

    def final(self, name: str) -> list[float]:
        """A metric at the end of each run."""
        return [history.column(name)[-1] for history in self.histories]

    def mean(self, name: str) -> list[float]:
        """The mean over the runs, one value an epoch."""
        columns = [history.column(name) for history in self.histories]
        return [statistics.fmean(values) for values in zip(*columns, strict=True)]

    @property
    def rank(self) -> float:
        """The mean final training loss; infinite if a run failed or diverged."""
        loss = statistics.fmean(self.final("train_loss")) if self.histories and not self.failures else math.nan
        return loss if math.isfinite(loss) else math.inf


class Comparison:
    """What the runs on one problem came to.

    Parameters
    ----------
    plan
        The runs, done.
    failures
        Why some failed.
    """

    def __init__(self, plan: Plan, failures: Mapping[Run, str]) -> None:
        self.plan = plan
        self.failures = failures
        self.rows = self._rows(plan.runs)
        self.sweep = self._rows([*plan.swept_radii(), *plan.sweep])

    def _rows(self, runs: Sequence[Run]) -> list[Row]:
        rows = []
        for setting in dict.fromkeys(run.setting for run in runs):
            own = [run for run in runs if run.setting == setting]
            finished = tuple(run.history() for run in own if run.is_finished())
            rows.append(Row(setting, finished, len(own) - len(finished)))
        return rows

    @property
    def metrics(self) -> list[str]:
        """Names of the losses and of the problem's other metrics."""
        records = [history.epochs[-1] for row in self.rows for history in row.histories]
        return [name for name in records[0] if name not in POSITIONS] if records else []

    def best(self) -> dict[str, Row]:
        """Of each method, the step size with the least training loss; without methods that never came to an end."""
        best: dict[str, Row] = {}
        for row in sorted(self.rows, key=lambda row: row.rank):
            if row.rank < math.inf:
                best.setdefault(row.setting.method, row)
        return {method: best[method] for method in METHODS if method in best}

    def note(self) -> str:
        """What the numbers of the table mean."""
        options, epochs = self.plan.options, self.plan.epochs
        return (
            f"{epochs} epochs of APTS, {epochs * options.baseline_epochs_factor} of the baselines; {options.ranks} "
            f"rank(s); mean ± sample standard deviation over {options.seeds} seed(s) of the values at the end. Gradient "
            "evaluations are those on the critical path. A step size is best by its training loss."
        )

    def header(self) -> list[str]:
        """Headings of the table."""
        names = [*self.metrics, "gradient_evaluations", "seconds"]
        return ["method", "step size", *(name.replace("_", " ") for name in names)]

    def table(self) -> list[list[str]]:
        """Cells of the table, a line a setting."""
        best = self.best().values()
        lines = []
        for row in self.rows:
            mark = " (best)" if row in best and row.setting.method != "apts" else ""
            cells = [cell(row, name) for name in [*self.metrics, "gradient_evaluations", "seconds"]]
            lines.append([METHODS[row.setting.method], row.setting.step_size + mark, *cells])
        return lines

    def verdict(self) -> str:
        """When APTS passes what the best baseline comes to."""
        best = self.best()
        apts = best.pop("apts", None)
        if apts is None or not best:
            return "APTS and the baselines cannot be compared: too many runs failed or diverged."
        rival = min(best.values(), key=lambda row: row.rank)
        name = f"{METHODS[rival.setting.method]} at {rival.setting.step_size}"
        end = f"{rival.mean('gradient_evaluations')[-1]:.4g} evaluations and {rival.mean('seconds')[-1]:.4g} s"
        target = f"the final training loss of the best baseline ({name}: {rival.rank:.4g} after {end})"
        passed = [epoch for epoch, loss in enumerate(apts.mean("train_loss")) if loss < rival.rank]
        if not passed:
            return f"APTS does not pass {target}; its own is {apts.rank:.4g}."
        first = passed[0]
        return (
            f"APTS first passes {target} in epoch {first + 1} of {self.plan.epochs}, after "
            f"{apts.mean('gradient_evaluations')[first]:.4g} gradient evaluations and "
            f"{apts.mean('seconds')[first]:.4g} s."
        )

    def reasons(self) -> list[str]:
        """A line for each run that failed."""
        return [f"{run.path} failed: {reason} (see {OUTPUT} there)" for run, reason in self.failures.items()]

    def markdown(self) -> str:
        """The table and what belongs to it."""
        lines = [self.header(), ["---"] * 2 + ["---:"] * (len(self.header()) - 2), *self.table()]
        table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
        failures = "\n".join(f"- {reason}" for reason in self.reasons())
        parts = [f"# {self.plan.problem}", self.note(), table, self.verdict(), failures]
        return "\n\n".join(part for part in parts if part) + "\n"


def cell(row: Row, name: str) -> str:
    """Mean and standard deviation of a metric at the end, and how many runs have none."""
    values = row.final(name)
    diverged = sum(math.isnan(value) for value in values)
    parts = []
    if values and not diverged:
        parts.append(f"{statistics.fmean(values):.4g}")
        if len(values) > 1:
            parts[0] += f" ± {statistics.stdev(values):.2g}"
    elif diverged:
        parts.append(f"{diverged} diverged")
    if row.failures:
        parts.append(f"{row.failures} failed")
    return ", ".join(parts)
