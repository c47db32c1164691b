"""What a comparison is asked for: its options, and the step sizes that it tries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from apts_mpi.compare.full_batch.options import GRIDS as FULL_BATCH_GRIDS
from apts_mpi.errors import InvalidInput, require, require_choice, require_fields
from apts_mpi.train.options import named_values

# All methods, and what they are called in tables, in their order there.
METHODS = {
    "apts": "APTS",
    "adamw-cosine": "AdamW with cosine",
    "schedule-free": "Schedule-Free",
    "muon": "Muon",
    "soap": "SOAP",
    "prodigy": "Prodigy",
    "adam": "Adam",
    "sgd": "SGD with momentum",
    "lbfgs": "L-BFGS",
    "spring": "SPRING",
    "levenberg-marquardt": "Levenberg-Marquardt",
    "broyden": "self-scaled Broyden",
    "adam-lbfgs": "Adam, then L-BFGS",
}

# Those that take part where nothing is said: in problems of squares with full batches, and in others.
OF_SQUARES = ("apts", *FULL_BATCH_GRIDS, "adam", "lbfgs")
OF_OTHERS = ("apts", "adamw-cosine", "adam", "sgd", "lbfgs")


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions:
    """Compare APTS, in its one default configuration, with other optimizers over grids of step sizes.

    Runs that have ended are kept: the same command goes on where it stopped.

    Parameters
    ----------
    problems
        Names of problems of the package, or MODULE:FUNCTION for ones of your own.
    methods
        Those that take part, with commas between: of apts, adamw-cosine, schedule-free, muon, soap, prodigy, adam, sgd
        and lbfgs; for full batches of squares, such as PINNs, also spring, levenberg-marquardt, broyden (self-scaled)
        and adam-lbfgs. Schedule-free to prodigy need the package pytorch_optimizer, as ``pip install
        apts_mpi[compare]`` brings it. null: apts, adam, lbfgs and these four for such problems; for others apts,
        adamw-cosine, adam, sgd and lbfgs.
    equal_seconds
        Processor seconds of the iterations of every run, whatever the epochs: a number; or a method, for as many as
        its runs of ``epochs`` take, in the median; without a value: apts. Then the best step size is that of the least
        error of a solution, or of the best test accuracy, or loss.
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
    problem_args
        Arguments of the problems' functions, as NAME=VALUE; ``--problem.args.NAME VALUE`` gives one.
    dtype
        Of the networks and their inputs. null: float64 for full batches of squares, else float32.
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
    methods: str | None = None
    equal_seconds: str | None = None
    out: str = "comparisons"
    seeds: int = 3
    epochs: int | None = None
    max_seconds: float | None = None
    baseline_epochs_factor: int = 1
    batch_size: int | None = None
    train_samples: int | None = None
    data_dir: str | None = None
    problem_args: tuple[str, ...] = ()
    dtype: Literal["float32", "float64"] | None = None
    subdomains: int | None = None
    ranks: int = 1
    jobs: int = 1
    robustness: bool = False

    def __post_init__(self) -> None:
        require_fields(self)
        for name in ("seeds", "baseline_epochs_factor", "ranks", "jobs"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "give 1 or more")
        for name in ("epochs", "subdomains", "batch_size", "train_samples"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "give 1 or more, or null")
        named_values("problem_args", self.problem_args)
        limit = self.max_seconds
        require(limit is None or limit > 0.0, "max_seconds", limit, "give a number above 0, or null")
        for method in self.names:
            require_choice("methods", method, tuple(METHODS))
        of_squares = [method for method in self.names if self.methods and method in FULL_BATCH_GRIDS]
        if of_squares and self.batch_size is not None:
            raise InvalidInput(f"batch_size: {of_squares[0]} takes full batches; leave out one of them")
        if of_squares and self.ranks > 1:
            raise InvalidInput(f"ranks: {of_squares[0]} has one rank; give 1, or other methods")
        self._check_equal_seconds()

    def _check_equal_seconds(self) -> None:
        if self.equal_seconds is None:
            return
        if self.seconds is None:
            require_choice("equal_seconds", self.equal_seconds, self.names)
        else:
            require(0.0 < self.seconds < math.inf, "equal_seconds", self.equal_seconds, "give a number above 0")
        others = {"max_seconds": None, "baseline_epochs_factor": 1, "robustness": False}
        for name, left_out in others.items():
            if getattr(self, name) != left_out:
                raise InvalidInput(f"{name}: it does not go with equal_seconds; leave out one of them")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods that may take part, each once; where none are given, `names_of` says which do."""
        return tuple(METHODS) if self.methods is None else tuple(dict.fromkeys(self.methods.split(",")))

    def names_of(self, is_of_squares: bool) -> tuple[str, ...]:
        """Those of a problem, which is one of squares with full batches or not."""
        if self.methods is not None:
            return self.names
        return OF_SQUARES if is_of_squares and self.batch_size is None and self.ranks == 1 else OF_OTHERS

    @property
    def seconds(self) -> float | None:
        """Processor seconds of every run, where ``equal_seconds`` is a number."""
        try:
            return None if self.equal_seconds is None else float(self.equal_seconds)
        except ValueError:
            return None

    @property
    def reference(self) -> str | None:
        """The method whose seconds all get, where ``equal_seconds`` names one."""
        return self.equal_seconds if self.seconds is None else None


@dataclass(frozen=True, kw_only=True)
class Grids:
    """Step sizes to try.

    Parameters
    ----------
    learning_rates
        Of each baseline, or what else of it is tuned; those that are not here do not take part.
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
        "adamw-cosine": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "schedule-free": (1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2),
        "muon": (1e-2, 2e-2, 5e-2, 1e-1, 2e-1),
        "soap": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "prodigy": (0.5, 1.0, 2.0),
        "adam": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "sgd": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        "lbfgs": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        **FULL_BATCH_GRIDS,
    },
    sweep_rates=(1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0),
    sweep_factors=(1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0),
)
