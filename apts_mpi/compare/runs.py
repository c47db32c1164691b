"""APTS beside tuned optimizers on one problem: which runs there are, and how they are done and resumed."""

from __future__ import annotations

import difflib
import json
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apts_mpi.compare.full_batch.options import TUNED, FullBatchOptions
from apts_mpi.compare.full_batch.squares import Squares, is_of_squares
from apts_mpi.compare.options import GRIDS, ComparisonOptions, Grids
from apts_mpi.errors import InvalidInput, require_choice
from apts_mpi.options import TrustRegionOptions
from apts_mpi.problems import build
from apts_mpi.records.directory import CONFIG
from apts_mpi.records.reading import RunRecords, read_records, read_summary
from apts_mpi.tools import environment
from apts_mpi.tools.jobs import OUTPUT, failure_in
from apts_mpi.train.options import named_values
from apts_mpi.train.parser import parse, written

# Epochs of a run that its seconds end.
UNLIMITED = 1_000_000

# Seconds between two looks at the running processes, and how long one that was told to end may take.
POLL, GRACE = 0.1, 10.0


@dataclass(frozen=True)
class Setting:
    """A method with one step size.

    Attributes
    ----------
    method
        A name in `apts_mpi.compare.options.METHODS`.
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

    @property
    def tuned(self) -> str:
        """What of the method has the value of `step_size`, with that value."""
        if self.learning_rate is None:
            return "-" if self.method in TUNED else "automatic"
        return f"{TUNED.get(self.method, 'rate')} {self.learning_rate:g}"


@dataclass(frozen=True)
class PlannedRun:
    """One process of apts_mpi.train, or of a method of full batches, to do or done.

    Parameters
    ----------
    setting, seed
        What it is in the comparison.
    ranks
        Of MPI.
    path
        Its run directory.
    arguments
        Of the program.
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
            return read_summary(self.path)
        except json.JSONDecodeError:
            return None

    def start(self) -> subprocess.Popen:
        """Start the process; what it prints goes to a file of the run directory."""
        launcher = ["mpirun", "-n", str(self.ranks)] if self.ranks > 1 else []
        if self.setting.method in TUNED:
            program = [sys.executable, "-m", "apts_mpi.compare.full_batch", *self.arguments, f"--run_dir={self.path}"]
        else:
            program = [sys.executable, "-m", "apts_mpi.train", *self.arguments, f"--run-dir={self.path}", "--overwrite"]
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / OUTPUT, "w", encoding="utf-8") as output:
            return subprocess.Popen(
                launcher + program,
                env=environment.of_one_thread(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def failure(self) -> str:
        """Why the run failed, in the last words about an error that it printed."""
        return failure_in(self.path / OUTPUT)

    def records(self) -> RunRecords:
        """What a finished run left behind."""
        return read_records(self.path)

    def final_loss(self) -> float:
        """Of a finished run, on the training samples."""
        return self.records().column("epochs", "train_loss")[-1]


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
        self.epochs, self.methods = self._of_problem()
        self._of_squares = any(method in TUNED for method in self.methods)
        if options.reference is not None:
            require_choice("equal_seconds", options.reference, self.methods)
        self.seconds = options.seconds
        known = [method for method in self.methods if options.reference in (None, method)]
        self.runs = self._runs(known)
        self.sweep: list[PlannedRun] = []
        if options.robustness:
            baselines = [method for method in self.methods if method in grids.learning_rates and method not in TUNED]
            swept = [Setting(method, rate) for method in baselines for rate in grids.sweep_rates]
            self.sweep = [self._run(setting, 0) for setting in swept]

    def _runs(self, methods: Sequence[str]) -> list[PlannedRun]:
        settings: list[Setting] = []
        for method in methods:
            rates = self.grids.learning_rates.get(method, ())
            is_one = method == "apts" or (method in TUNED and not TUNED[method])
            settings += [Setting(method)] if is_one else [Setting(method, rate) for rate in rates]
        return [self._run(setting, seed) for setting in settings for seed in range(self.options.seeds)]

    def _of_problem(self) -> tuple[int, tuple[str, ...]]:
        """Epochs and methods, for which the problem is built where they depend on it."""
        options = self.options
        asked = options.methods is not None and any(method in TUNED for method in options.names)
        if options.epochs is not None and options.methods is not None and not (asked or options.problem_args):
            return options.epochs, options.names
        dtype = getattr(torch, options.dtype or "float32")
        own = build(
            self.problem,
            data_dir=options.data_dir,
            train_samples=options.train_samples,
            dtype=dtype,
            arguments=named_values("problem_args", options.problem_args),
        )
        if asked:
            Squares(own)  # whether these methods can take it
        return options.epochs or own.epochs, options.names_of(options.methods is None and is_of_squares(own))

    def add_others(self) -> list[PlannedRun]:
        """Add the runs that take as many seconds as those of the reference, now that finished ones tell them.

        Returns
        -------
        list of PlannedRun
            What was added.

        Raises
        ------
        InvalidInput
            If no run of the reference came to its end, or their directories hold other runs.
        """
        reference = self.options.reference
        if reference is None:
            return []
        ends = [run.records().column("epochs", "cpu_seconds")[-1] for run in self.runs if run.is_finished()]
        if not ends:
            raise InvalidInput(
                f"equal_seconds: no run of {reference!r} came to its end (see {OUTPUT} in the directories of "
                f"{str(self.path)!r}); give another method, or a number"
            )
        self.seconds = statistics.median(ends)
        before, self.runs = self.runs, self._runs(self.methods)
        return [run for run in self.runs if run not in before]

    def add_radii(self) -> list[PlannedRun]:
        """Add other initial radii than the automatic one to the sweep, now that a finished run tells that one.

        Returns
        -------
        list of PlannedRun
            What was added.

        Raises
        ------
        InvalidInput
            If their directories hold other runs.
        """
        automatic = next((run for run in self.runs if run.setting == Setting("apts")), None)
        if not self.options.robustness or automatic is None or not automatic.is_finished():
            return []
        unit, bounds = automatic.records().iterations[0]["radius"], TrustRegionOptions()
        runs = []
        for factor in self.grids.sweep_factors:
            if factor == 1.0:
                runs.append(automatic)
            elif bounds.min_radius <= factor * unit <= bounds.max_radius:
                runs.append(self._run(Setting("apts", factor=factor, radius=factor * unit), 0))
        self.sweep += runs
        return runs

    def _run(self, setting: Setting, seed: int) -> PlannedRun:
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
            "problem_args": list(options.problem_args) or None,
            "dtype": options.dtype or ("float64" if self._of_squares else "float32"),
        }
        if setting.method in TUNED:
            values["setting"] = setting.learning_rate
        elif setting.method == "apts":
            values["subdomains"] = options.subdomains
            # Few digits: the automatic radius of a repeated run may differ by rounding, and the runs shall be kept.
            values["trust_region.initial_radius"] = None if setting.radius is None else f"{setting.radius:.4g}"
        else:
            values["learning_rate"] = setting.learning_rate
        if setting.method != "apts":
            values["epochs"] *= options.baseline_epochs_factor
        if self.seconds is not None and setting.method != options.reference:
            # Few digits, as above: they may be a median.
            values |= {"epochs": UNLIMITED, "max_cpu_seconds": float(f"{self.seconds:.4g}")}
        given = {name: value for name, value in values.items() if value is not None}
        arguments = tuple(f"--{name}={written(value)}" for name, value in given.items())
        config = FullBatchOptions(**given).config() if setting.method in TUNED else parse(arguments)[1]
        path = self.path / f"{setting.name}-seed{seed}"
        run = PlannedRun(setting, seed, options.ranks, path, arguments, config)
        run.check()
        return run


def missing(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """The runs that are not finished, each once."""
    return [run for run in dict.fromkeys(runs) if not run.is_finished()]


def execute(
    runs: Iterable[PlannedRun], jobs: int, report: Callable[[PlannedRun, str | None], None]
) -> dict[PlannedRun, str]:
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
    running: dict[PlannedRun, subprocess.Popen] = {}
    failures: dict[PlannedRun, str] = {}
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
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
    return failures
