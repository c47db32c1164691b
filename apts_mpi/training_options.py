"""The configuration of a training run: what ``python -m apts_mpi.train`` takes."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from apts_mpi.options import (
    APTSOptions,
    CoarseOptions,
    GlobalStepOptions,
    LocalOptions,
    SchwarzOptions,
    TrustRegionOptions,
    require,
    require_choice,
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Train a network over MPI ranks.

    Parameters
    ----------
    problem
        Name of a problem of the package, or MODULE:FUNCTION for one of your own.
    data_dir
        Directory (or text file) of the data, for problems that read some.
    train_samples
        Use the first that many training samples. null: all.
    epochs
        Passes over the training samples. null: the problem's own number.
    max_iterations
        Stop after that many iterations, whatever the epochs.
    batch_size
        Samples a batch, over all ranks. null: the problem's own number.
    seed
        Seed of the initial network, of the order of the samples and of dropout.
    dtype
        Of the network and its inputs.
    device
        ``auto`` takes one GPU a rank where there is one.
    optimizer
        ``apts``, or one of torch's own, data-parallel, on the same initial network and the same batches.
    learning_rate
        Of torch's optimizers.
    subdomains
        Number of subdomains. null: one for each rank of a replica, or as many as the partition can make.
    replicas
        Ranks that share the work of one subdomain rank over its samples.
    run_dir
        Directory that keeps the records. null: a new one under ``runs``.
    overwrite
        Replace the records of an earlier run in ``run_dir``.
    view
        Print the composed solver before training.
    monitor
        Print one line an iteration.
    schwarz, local, coarse, trust_region, global_step
        Options of the solver's parts.
    """

    problem: str = "digits"
    data_dir: str | None = None
    train_samples: int | None = None
    epochs: int | None = None
    max_iterations: int | None = None
    batch_size: int | None = None
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    optimizer: Literal["apts", "adam", "sgd", "lbfgs"] = "apts"
    learning_rate: float = 1e-3
    subdomains: int | None = None
    replicas: int = 1
    run_dir: str | None = None
    overwrite: bool = False
    view: bool = False
    monitor: bool = False
    schwarz: SchwarzOptions = field(default_factory=SchwarzOptions)
    local: LocalOptions = field(default_factory=LocalOptions)
    coarse: CoarseOptions = field(default_factory=CoarseOptions)
    trust_region: TrustRegionOptions = field(default_factory=TrustRegionOptions)
    global_step: GlobalStepOptions = field(default_factory=GlobalStepOptions)

    def __post_init__(self) -> None:
        for name in ("train_samples", "epochs", "max_iterations", "batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "give 1 or more, or null")
        require_choice("dtype", self.dtype, ("float32", "float64"))
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_choice("optimizer", self.optimizer, ("apts", "adam", "sgd", "lbfgs"))
        require(self.learning_rate > 0.0, "learning_rate", self.learning_rate, "give a number above 0")
        self.solver_options()

    def solver_options(self) -> APTSOptions:
        """The part that configures `apts_mpi.APTS`."""
        shared = {option.name for option in fields(APTSOptions)} & {option.name for option in fields(self)}
        return APTSOptions(**{name: getattr(self, name) for name in shared})
