"""What a run of a method of full batches is asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import yaml

from apts_mpi.errors import require, require_choice, require_fields

# What of each method is tuned, and the values of it that are tried; none where nothing is tuned.
TUNED = {"spring": "damping", "levenberg-marquardt": "damping", "broyden": "", "adam-lbfgs": "rate"}
GRIDS: dict[str, tuple[float, ...]] = {
    "spring": (1e-8, 1e-6, 1e-4),
    "levenberg-marquardt": (1e-6, 1e-3),
    "broyden": (),
    "adam-lbfgs": (1e-3, 3e-3, 1e-2),
}

SOME = "give 1 or more, or null"


@dataclass(frozen=True, kw_only=True)
class FullBatchOptions:
    """A run of a method of full batches.

    Parameters
    ----------
    problem
        As for apts_mpi.train; its loss is a mean of squared errors.
    optimizer
        spring, levenberg-marquardt, broyden or adam-lbfgs.
    setting
        What of the method is tuned: damping, first damping, or learning rate of Adam.
    seed
        Of the initial network.
    epochs
        Iterations, unless seconds end the run before.
    max_seconds, max_cpu_seconds
        Stop after that many seconds of iterations, of the clock and of the processor. null: not by these.
    train_samples
        Use the first that many training samples. null: all.
    data_dir, problem_args
        As for apts_mpi.train.
    dtype
        Of the network and its inputs.
    """

    problem: str
    optimizer: str
    setting: float = 0.0
    seed: int = 0
    epochs: int = 100
    max_seconds: float | None = None
    max_cpu_seconds: float | None = None
    train_samples: int | None = None
    data_dir: str | None = None
    problem_args: tuple[str, ...] = ()
    dtype: Literal["float32", "float64"] = "float64"

    def __post_init__(self) -> None:
        require_fields(self)
        require_choice("optimizer", self.optimizer, tuple(GRIDS))
        require(self.epochs >= 1, "epochs", self.epochs, "give 1 or more")
        require(self.train_samples is None or self.train_samples >= 1, "train_samples", self.train_samples, SOME)
        for name in ("setting", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        for name in ("max_seconds", "max_cpu_seconds"):
            value = getattr(self, name)
            require(value is None or value > 0.0, name, value, "give a number above 0, or null")

    def config(self) -> str:
        """As YAML, for the run directory."""
        given = {name: value for name, value in asdict(self).items() if value != ()}
        return str(yaml.safe_dump(given, sort_keys=False))
