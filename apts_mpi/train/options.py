"""The configuration of a training run: what ``python -m apts_mpi.train`` takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

from apts_mpi.errors import require, require_fields, require_name
from apts_mpi.options import (
    APTSOptions,
    CoarseOptions,
    GlobalStepOptions,
    LocalOptions,
    PipelineOptions,
    SchwarzOptions,
    TrustRegionOptions,
)
from apts_mpi.options.methods import MethodName, check_method

# The optimizers that APTS is set beside. `PEERS` are those of the package pytorch_optimizer.
Optimizer = Literal["apts", "adam", "sgd", "lbfgs", "adamw-cosine", "schedule-free", "muon", "soap", "prodigy"]
PEERS = ("schedule-free", "muon", "soap", "prodigy")

# Those of `apts_mpi.train.loggers.KINDS`.
LOGGERS = ("csv", "tensorboard", "mlflow", "wandb")

# When the line of a run that is rewritten in its place is shown.
ProgressName = Literal["auto", "always", "never"]

# The value of --resume that asks for the latest checkpoint in the run directory.
LATEST_OF_RUN = "latest"


@dataclass(frozen=True, kw_only=True)
class BaselineOptions:
    """An optimizer that APTS is set beside.

    Parameters
    ----------
    optimizer
        A name in `apts_mpi.train.optimizers.OPTIMIZERS`.
    learning_rate
        Its step size.
    seed
        Of dropout.
    autocast
        See `apts_mpi.APTSOptions`.
    group
        Number of consecutive samples that the loss takes together; None: all.
    most
        Samples that a rank runs the network over at a time, at most; None: as many as there is memory for.
    """

    optimizer: str
    learning_rate: float
    seed: int = 0
    autocast: Literal["none", "bfloat16"] = "none"
    group: int | None = 1
    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Train a network over MPI ranks.

    Parameters
    ----------
    problem
        Name of a problem of the package, MODULE:FUNCTION for one of your own, or hdf5:FILE for samples in a file.
        Several with commas are tasks that come one after the other.
    problem_args
        Arguments of the problem's function, as NAME=VALUE; ``--problem.args.NAME VALUE`` gives one. Those of the
        package's problems are listed below.
    network
        MODULE:FUNCTION that returns the network, for hdf5:FILE.
    network_args
        Arguments of that function, as NAME=VALUE; ``--network.args.NAME VALUE`` gives one.
    loss
        MODULE:FUNCTION of (outputs, targets), for hdf5:FILE. null: cross entropy for integers, else the mean square.
    data_dir
        Directory (or text file) of the data, for problems that read some.
    train_samples
        Use the first that many training samples. null: all.
    epochs
        Passes over the training samples. null: the problem's own number.
    max_iterations
        Stop after that many iterations, whatever the epochs.
    max_seconds
        Stop after that many seconds of iterations, whatever the epochs; metrics and checkpoints do not count.
    max_cpu_seconds
        The same of the processor time of rank 0, which other programs on the machine do not lengthen.
    stop_on
        Metric of the epochs that is watched, such as test_loss; with min: or max: before it where its name does not
        say which is better.
    patience
        Stop after that many epochs in which it got no better. null: never.
    keep_best
        Keep the checkpoint of the best epoch so far, ``run_dir``/checkpoints/best, beside the last ones.
    target_loss
        Stop when the training loss at the end of an epoch is at most this.
    gradient_tolerance
        Stop when the gradients of as many batches in a row as an epoch has are at most so long.
    relative_gradient_tolerance
        The same as a share of the length of the first gradient.
    average
        Decay, such as 0.98, of an exponential average of the iterates, which is evaluated and saved beside them. null:
        none.
    batch_size
        Samples a batch, over all ranks. null: the problem's own number.
    replay
        Of a sequence of tasks: stored samples of each earlier task, of which as many join a batch as it has of its own.
    resample
        Draw the points of a physics-informed problem, or other samples that a problem can draw, anew after that many
        iterations, and so on. null: never.
    resample_by
        ``uniform``: as the problem draws them. ``residual``: of ten times as many candidates those whose residual is
        large are taken more often, in proportion to 1 plus its share of the mean (Wu et al., arXiv 2207.10289).
    micro_batch_size
        Samples that a rank runs the network over at a time, at most; ``auto``: as many as there is memory for.
    seed
        Seed of the initial network, of the points that are drawn anew, of the order of the samples and of dropout.
    dtype
        Of the network and its inputs.
    autocast
        ``bfloat16``: the network computes in it where torch's autocast holds it to be safe; parameters, gradients,
        reductions and curvature stay float32. Metrics are computed in float32.
    device
        ``auto`` takes one GPU a rank where there is one.
    transport
        How tensors of a GPU come to MPI: ``staged``, through pinned host memory; ``direct``, in their own memory, for a
        GPU-aware MPI. ``auto``: direct where a trial in processes of its own is right, as ``apts_mpi.doctor`` makes it.
    optimizer
        ``apts``, or another one, data-parallel, on the same initial network and the same batches: ``adam``, ``sgd``
        (momentum 0.9), ``lbfgs`` (strong Wolfe line search) and ``adamw-cosine`` are torch's; ``schedule-free``
        (AdamW), ``muon``, ``soap`` and ``prodigy`` need the package pytorch_optimizer.
    learning_rate
        Of an optimizer other than ``apts``, the largest one where it has a schedule; ``prodigy`` takes 1.
    method
        ``two-level``, or one of the papers, with the options that make it: ``apts`` (exact local objectives), ``iapts``
        (inexact ones), ``apts-data`` (subdomains of data), ``napts`` (non-monotone, with a coarse space). Options that
        are given beside it change it; those that contradict it are refused.
    layout
        What a rank holds: ``replicated``, the whole network; ``staged``, a stage of it, for networks larger than one
        device.
    subdomains
        Number of subdomains. null: one for each rank of a replica, or as many as the partition can make; for dense
        Gauss-Newton the least multiple of it with at most 640 parameters a subdomain.
    replicas
        Ranks that share the work of one subdomain rank over its samples.
    noise
        ``batches``: for many steps on small batches, each judged by the next one, with a radius that goes to zero at
        the end of the run. ``none``: each batch is minimised for itself. ``auto``: batches where kfac makes 100 steps
        or more, with 20 batches or more an epoch (12 in runs that their time ends).
    run_dir
        Directory that keeps the records. null: a new one under ``runs``.
    overwrite
        Replace the records of an earlier run in ``run_dir``.
    resume
        Go on with an earlier run, with its configuration but for the options that are given: ``latest`` (or nothing)
        for the latest checkpoint in ``run_dir``, where a run without one begins anew; or the path of a checkpoint, or
        of a directory with some.
    checkpoint_every
        Iterations (a number) or time (such as 10min) between checkpoints in ``run_dir``/checkpoints. null: only at
        the end, and when the run is stopped: by SIGTERM, SIGUSR1, SIGHUP, Ctrl-C or ``walltime``.
    checkpoint_keep_last
        How many checkpoints to keep.
    checkpoint_keep_every
        Also keep those of iterations that are multiples of this; 0: none.
    checkpoint_in_background
        Train on while a checkpoint is written, from a copy in memory.
    walltime
        [DAYS-]HH:MM:SS from the start of the program, in which the run saves and stops, with exit status 75.
    stall_timeout
        Seconds that a rank waits for another, in layout staged for a sign of it, before it ends the run. It has to be
        longer than what a rank does alone, such as writing a checkpoint. null: 600, and 10 for a sign of a stage; 3600
        for a rank that does nothing with others, such as a single one.
    drift_check_every
        Iterations between checks that all ranks have the same parameters and state; each save checks, too. 0: no
        others.
    view
        Print the composed solver before training.
    monitor
        Print one line an iteration.
    progress
        A line below those of the epochs that is rewritten in its place. ``auto``: on a terminal alone. ``always``: also
        where a launcher passes on what the ranks print, as most do through pipes.
    log_view
        Print at the end what time, messages and work went into which part of the iterations.
    trace
        Write what each rank did when to ``run_dir``/trace.json, for ui.perfetto.dev.
    torch_profiler
        Iterations, after the first two, of which each rank's torch.profiler writes what torch did to
        ``run_dir``/torch-profile, for ui.perfetto.dev; 0: none.
    tensorboard
        Write event files for TensorBoard to ``run_dir``/tensorboard while training: a logger, as those that follow.
    logger
        What takes the records while training, with commas between several: ``csv``, ``tensorboard``, ``mlflow``,
        ``wandb`` (offline), all into ``run_dir``, or MODULE:CLASS for one of your own.
    schwarz, local, coarse, trust_region, global_step, pipeline
        Options of the solver's parts.
    """

    problem: str = "digits"
    problem_args: tuple[str, ...] = ()
    network: str | None = None
    network_args: tuple[str, ...] = ()
    loss: str | None = None
    data_dir: str | None = None
    train_samples: int | None = None
    epochs: int | None = None
    max_iterations: int | None = None
    max_seconds: float | None = None
    max_cpu_seconds: float | None = None
    stop_on: str | None = None
    patience: int | None = 3
    keep_best: bool = False
    target_loss: float | None = None
    gradient_tolerance: float | None = None
    relative_gradient_tolerance: float | None = None
    average: float | None = None
    batch_size: int | None = None
    replay: int = 0
    resample: int | None = None
    resample_by: Literal["uniform", "residual"] = "uniform"
    micro_batch_size: int | Literal["auto"] = "auto"
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"
    autocast: Literal["none", "bfloat16"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    transport: Literal["auto", "staged", "direct"] = "auto"
    optimizer: Optimizer = "apts"
    learning_rate: float = 1e-3
    method: MethodName = "two-level"
    layout: Literal["replicated", "staged"] = "replicated"
    subdomains: int | None = None
    replicas: int = 1
    noise: Literal["auto", "none", "batches"] = "auto"
    run_dir: str | None = None
    overwrite: bool = False
    resume: str | None = None
    checkpoint_every: int | str | None = "10min"
    checkpoint_keep_last: int = 2
    checkpoint_keep_every: int = 0
    checkpoint_in_background: bool = False
    walltime: str | None = None
    stall_timeout: float | None = None
    drift_check_every: int = 100
    view: bool = False
    monitor: bool = False
    progress: ProgressName = "auto"
    log_view: bool = False
    trace: bool = False
    torch_profiler: int = 0
    tensorboard: bool = False
    logger: str | None = None
    schwarz: SchwarzOptions = field(default_factory=SchwarzOptions)
    local: LocalOptions = field(default_factory=LocalOptions)
    coarse: CoarseOptions = field(default_factory=CoarseOptions)
    trust_region: TrustRegionOptions = field(default_factory=TrustRegionOptions)
    global_step: GlobalStepOptions = field(default_factory=GlobalStepOptions)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)

    def __post_init__(self) -> None:
        require_fields(self)
        for name in ("train_samples", "epochs", "max_iterations", "batch_size", "resample", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "give 1 or more, or null")
        for name in ("max_seconds", "max_cpu_seconds"):
            limit = getattr(self, name)
            require(limit is None or limit > 0.0, name, limit, "give a number above 0, or null")
        for name in ("problem_args", "network_args"):
            named_values(name, getattr(self, name))
        drawn = self.resample is not None or self.resample_by == "uniform"
        require(drawn, "resample_by", self.resample_by, "give --resample with a number of iterations, too")
        self._check_end()
        both = self.autocast == "none" or self.dtype == "float32"
        require(both, "autocast", self.autocast, f"with dtype {self.dtype} choose none, or --dtype float32")
        self._check_survival()
        remedy = "it is for optimizer apts; choose that, or --layout replicated"
        require(self.layout == "replicated" or self.optimizer == "apts", "layout", self.layout, remedy)
        require(self.learning_rate > 0.0, "learning_rate", self.learning_rate, "give a number above 0")
        decay = self.trust_region.weight_decay
        remedy = "it is for optimizer apts; choose that, or give 0"
        require(self.optimizer == "apts" or decay == 0.0, "trust_region.weight_decay", decay, remedy)
        remedy = "it is for optimizer apts; choose that, or two-level"
        require(self.optimizer == "apts" or self.method == "two-level", "method", self.method, remedy)
        check_method(self.method, self)
        self.solver_options()

    def arguments(self, of: Literal["problem_args", "network_args"]) -> dict[str, str]:
        """Arguments of a function of the user's by their names; the last of a name counts."""
        return named_values(of, getattr(self, of))

    def _check_end(self) -> None:
        best = self.stop_on is not None or not self.keep_best
        require(best, "keep_best", self.keep_best, "give --stop-on with the metric that is to be best")
        for name in ("gradient_tolerance", "relative_gradient_tolerance"):
            tolerance = getattr(self, name)
            require(tolerance is None or tolerance >= 0.0, name, tolerance, "give 0 or more, or null")
        average = self.average
        require(average is None or 0.0 <= average < 1.0, "average", average, "give a number in [0, 1), or null")
        for name in self.loggers():
            require_name("logger", name, LOGGERS)

    def loggers(self) -> list[str]:
        """Names of the loggers."""
        return [] if self.logger is None else [name.strip() for name in self.logger.split(",")]

    def _check_survival(self) -> None:
        every = self.checkpoint_every
        interval = as_seconds(every) if isinstance(every, str) else every
        valid = every is None or (interval is not None and interval > 0 and not isinstance(every, bool))
        remedy = "give a number of iterations above 0, a time such as 10min or 01:30:00, or null"
        require(valid, "checkpoint_every", every, remedy)
        require(self.checkpoint_keep_last >= 1, "checkpoint_keep_last", self.checkpoint_keep_last, "give 1 or more")
        for name in ("checkpoint_keep_every", "drift_check_every", "replay", "torch_profiler"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "give 0 or more")
        time = self.walltime
        require(time is None or bool(as_seconds(time)), "walltime", time, "give HH:MM:SS, such as 01:30:00")

    def baseline_options(self) -> BaselineOptions:
        """The part that configures an optimizer other than APTS."""
        return BaselineOptions(
            optimizer=self.optimizer, learning_rate=self.learning_rate, seed=self.seed, autocast=self.autocast
        )

    def solver_options(self) -> APTSOptions:
        """The part that configures `apts_mpi.APTS`; noise is none as long as it is left open."""
        shared = {option.name for option in fields(APTSOptions)} & {option.name for option in fields(self)}
        known = {name: getattr(self, name) for name in shared}
        return APTSOptions(**known | ({"noise": "none"} if self.noise == "auto" else {}))


def as_seconds(text: str) -> float | None:
    """Seconds of a time such as 90s, 10min, 1.5h, 01:30:00 or 2-00:00:00 (days first); None for another text."""
    if match := re.fullmatch(r"(\d{1,9}(?:\.\d{0,9})?) *(s|min|h)", text):
        return float(match[1]) * {"s": 1.0, "min": 60.0, "h": 3600.0}[match[2]]
    if match := re.fullmatch(r"(?:(\d{1,9})-)?(\d{1,9}):([0-5]\d):([0-5]\d)", text):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
    return None


def named_values(option: str, pairs: Sequence[str]) -> dict[str, str]:
    """Values by their names, of NAME=VALUE; the last of a name counts, and `InvalidInput` names other text."""
    for pair in pairs:
        require(re.match(r"[A-Za-z_]\w*=", pair) is not None, option, pair, "give NAME=VALUE")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}
