"""The configuration of the solver: frozen dataclasses, validated on construction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from apts_mpi.errors import require, require_choice, require_fields, require_name

LocalData = Literal["auto", "shard", "full"]


@dataclass(frozen=True, kw_only=True)
class SchwarzOptions:
    """How the parameters are split into subdomains and the corrections put together.

    Parameters
    ----------
    decomposition
        ``parameters``: a subdomain is a part of the parameters. ``data``: a subdomain is a shard of the batch over all
        parameters, and corrections are averaged, or recombined by the coarse level (arXiv 2502.05133).
    variant
        Local objective. ``exact`` runs the network from the subdomain's first layer to the loss. ``inexact`` runs the
        subdomain's own layers only, against the cached gradient of the loss with respect to their output. ``auto``:
        inexact where the network is called for its outputs alone.
    partition
        ``layer`` cuts between layers, ``index`` cuts the flat parameter vector into equal ranges. ``auto``: layer,
        but for dense Gauss-Newton where layers make blocks of more than 640 parameters.
    cuts
        Where in the flat vector of the parameters the subdomains begin, the first one at 0. null: by the partition,
        or as saved where a run is resumed.
    overlap
        Layers (``layer``) or indices (``index``) that a subdomain takes from each neighbour.
    type
        Prolongation with overlap: ``restrict`` adds a correction on the indices that the subdomain owns alone,
        ``basic`` adds it everywhere, weighted by the number of subdomains that share an index.
    local_data
        Samples of a local objective: the subdomain's ``shard`` of the batch, or the ``full`` batch. ``auto``: full
        for dense Gauss-Newton, which has no running means, else shard.
    damping
        Factor of the sum of the corrections, in (0, 1].
    """

    decomposition: Literal["parameters", "data"] = "parameters"
    variant: Literal["auto", "exact", "inexact"] = "auto"
    partition: Literal["auto", "layer", "index"] = "auto"
    cuts: tuple[int, ...] | None = None
    overlap: int = 0
    type: Literal["basic", "restrict"] = "restrict"
    local_data: LocalData = "auto"
    damping: float = 1.0

    def __post_init__(self) -> None:
        require_fields(self, "schwarz.")
        cuts = self.cuts
        rising = cuts is None or (cuts[:1] == (0,) and sorted({*cuts}) == list(cuts))
        require(rising, "schwarz.cuts", cuts, "give rising numbers from 0 on, such as [0,120,260], or null")
        require(self.overlap >= 0, "schwarz.overlap", self.overlap, "give 0 or more")
        require(0.0 < self.damping <= 1.0, "schwarz.damping", self.damping, "give a number in (0, 1]")


# Names of local solvers, and of the coarse space of the package; besides them there are those of the user's.
LOCAL_SOLVERS = ("auto", "kfac", "gauss-newton", "tr", "lsr1", "steihaug", "sgd", "adam")
SUBDOMAINS = "subdomains"


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """How a subdomain minimises its local objective within its ball.

    Parameters
    ----------
    solver
        ``kfac``: natural gradient by the Kronecker-factored curvature of each layer. ``gauss-newton``: dense
        Gauss-Newton matrix of the block. ``tr``: first-order trust region. ``lsr1``: trust region with a
        limited-memory SR1 model, whose pairs last from one iteration to the next. ``steihaug``: trust region with
        conjugate gradients on products with the curvature. ``sgd``: steepest descent. ``adam``: Adam directions whose
        moments last from one iteration to the next. The last two have steps of 1/iterations of the ball's radius.
        ``auto``: gauss-newton where the network is called for more than its outputs and the blocks are
        small, kfac where subdomains are whole layers, else adam. MODULE:CLASS: one of your own, see
        `apts_mpi.local.LocalSolver`.
    iterations
        Local iterations. The first one uses the global gradient and costs no evaluation of its own.
    damping
        Of the curvature: for kfac relative to the mean eigenvalue of a layer's, for gauss-newton to that of the
        block's. null: 0.3, 0.003 where the loss is quadratic in the outputs, and 1e-7.
    decay
        Of the running means of kfac, an update.
    refresh
        Iterations between updates of kfac's running means and factorisations, after as many at the start.
    product
        Curvature of steihaug: ``gauss-newton``, which needs the exact local objective, or ``hessian``.
    """

    solver: str = "auto"
    iterations: int = 1
    damping: float | None = None
    decay: float = 0.9
    refresh: int = 5
    product: Literal["gauss-newton", "hessian"] = "gauss-newton"

    def __post_init__(self) -> None:
        require_fields(self, "local.")
        require_name("local.solver", self.solver, LOCAL_SOLVERS)
        require(self.iterations >= 1, "local.iterations", self.iterations, "give 1 or more")
        damping = self.damping
        require(damping is None or damping > 0.0, "local.damping", damping, "give a number above 0, or null")
        require(0.0 <= self.decay < 1.0, "local.decay", self.decay, "give a number in [0, 1)")
        require(self.refresh >= 1, "local.refresh", self.refresh, "give 1 or more")


@dataclass(frozen=True, kw_only=True)
class TrustRegionOptions:
    """When a step is accepted and how the radius follows.

    The rule is written out in `apts_mpi.trust_region.subproblem`.

    Parameters
    ----------
    initial_radius
        First radius. None: the length of the Cauchy step of the first batch.
    min_radius
        Lower bound of the radius.
    max_radius
        Upper bound of the radius.
    eta1
        A step is accepted if rho >= eta1.
    eta2
        The radius grows if rho >= eta2 and the step reached the boundary.
    shrink_below
        The radius shrinks if rho is below this.
    decrease_factor
        What the radius, or the length of a shorter step, is multiplied by to shrink.
    increase_factor
        What the radius is multiplied by to grow.
    norm
        Norm of the ball.
    window
        Number of earlier losses with whose maximum a trial is compared as well (non-monotone, arXiv 2605.14860);
        0 is the monotone method.
    noise
        Rounding noise of the loss, relative to it and to the epsilon of its dtype; numerator and denominator of rho
        are both raised by it, so that rho goes to 1 where reductions are below what the dtype can show.
    """

    initial_radius: float | None = None
    min_radius: float = 1e-8
    max_radius: float = 1e4
    eta1: float = 1e-4
    eta2: float = 0.75
    shrink_below: float = 0.25
    decrease_factor: float = 0.25
    increase_factor: float = 2.0
    norm: Literal["2", "inf"] = "2"
    window: int = 0
    noise: float = 1.0

    def __post_init__(self) -> None:
        require_fields(self, "trust_region.")
        name = "trust_region."
        require(
            0.0 < self.min_radius < self.max_radius,
            name + "min_radius, max_radius",
            (self.min_radius, self.max_radius),
            "give 0 < min_radius < max_radius",
        )
        require(
            self.initial_radius is None or self.min_radius <= self.initial_radius <= self.max_radius,
            name + "initial_radius",
            self.initial_radius,
            f"give a number from min_radius {self.min_radius} to max_radius {self.max_radius}, or null for automatic",
        )
        require(
            0.0 <= self.eta1 <= self.shrink_below <= self.eta2 < 1.0,
            name + "eta1, shrink_below, eta2",
            (self.eta1, self.shrink_below, self.eta2),
            "give 0 <= eta1 <= shrink_below <= eta2 < 1",
        )
        small, large = self.decrease_factor, self.increase_factor
        require(0.0 < small < 1.0, name + "decrease_factor", small, "give a number in (0, 1)")
        require(large > 1.0, name + "increase_factor", large, "give a number above 1")
        require(self.window >= 0, name + "window", self.window, "give 0 or more")
        require(self.noise >= 0.0, name + "noise", self.noise, "give 0 or more")


GlobalModelName = Literal["none", "first-order", "lsr1", "steihaug"]


@dataclass(frozen=True, kw_only=True)
class GlobalStepOptions:
    """The trust-region step over all parameters that follows the Schwarz step.

    Parameters
    ----------
    model
        ``none``; the ``first-order`` model, whose step goes down the gradient to the boundary of the ball; ``lsr1``,
        limited-memory SR1 from the steps on one batch; ``steihaug``, conjugate gradients on products with the
        curvature, preconditioned by the kfac of subdomains of parameters where that is the local solver.
    product
        Curvature of steihaug: ``gauss-newton`` or ``hessian``.
    """

    model: GlobalModelName = "none"
    product: Literal["gauss-newton", "hessian"] = "gauss-newton"

    def __post_init__(self) -> None:
        require_fields(self, "global_step.")


# Targets that are enough for the curvature between a few columns of the coarse level. 0.45 of a batch of 256 were not:
# over three seeds the test accuracy fell by 0.001 to 0.009. The cost model of scaling studies, too, reckons with them.
ENOUGH_TARGETS = 512


@dataclass(frozen=True, kw_only=True)
class CoarseOptions:
    """How the coarse level recombines the corrections of the subdomains.

    Parameters
    ----------
    model
        ``none``: their plain sum. ``gauss-newton``: the best combination by the Gauss-Newton model in their span.
    space
        The span: ``subdomains``, of what ``columns`` names; or MODULE:CLASS for one of your own, see
        `apts_mpi.schwarz.CoarseSpace`.
    columns
        What each subdomain gives to the span: its ``correction``, its part of the ``last_step`` that was accepted,
        of the ``gradient``, of the ``last_correction`` before recombination.
    samples
        Share of the batch on which the curvature is measured, in (0, 1]. null: all with local solver gauss-newton,
        else as many as hold 512 targets.
    damping
        Of the reduced model, relative to its curvature in the norm.
    norm
        In which the model is damped and its step cut: ``2``, of the step, where the largest eigenvalue counts;
        ``scaled``, by the curvature along each column, which leaves every column its own scale. Either way the step
        ends in the ball of the trust region. ``auto``: scaled where the local solver is gauss-newton, whose corrections
        of badly conditioned least squares the other would damp away, else 2, which filters the noise of small batches.
    """

    model: Literal["none", "gauss-newton"] = "gauss-newton"
    space: str = SUBDOMAINS
    columns: tuple[Literal["correction", "last_step", "gradient", "last_correction"], ...] = (
        "correction",
        "last_step",
    )
    samples: float | None = None
    damping: float = 0.1
    norm: Literal["auto", "2", "scaled"] = "auto"

    def __post_init__(self) -> None:
        require_fields(self, "coarse.")
        require_name("coarse.space", self.space, (SUBDOMAINS,))
        for column in self.columns:
            require_choice("coarse.columns", column, ("correction", "last_step", "gradient", "last_correction"))
        twice = len(set(self.columns)) < len(self.columns)
        require(not twice, "coarse.columns", self.columns, "give each once")
        require("correction" in self.columns, "coarse.columns", self.columns, "include correction")
        share = self.samples
        require(share is None or 0.0 < share <= 1.0, "coarse.samples", share, "give a number in (0, 1], or null")
        require(self.damping >= 0.0, "coarse.damping", self.damping, "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How layout staged cuts the network into stages and runs them.

    Parameters
    ----------
    micro_batches
        Parts of a replica's share of the batch, which the stages work on at the same time. Batch normalisation takes
        its statistics from each.
    schedule
        ``gpipe``: all forward passes, then all backward passes. ``1f1b``: one of each in turn, which keeps fewer graphs
        at a time.
    cuts
        Names of the modules with which the second stage and those after it begin, with commas between them. null:
        balanced.
    balance
        What balanced stages have equally much of: ``parameters``, or ``cost``, multiplications of a forward pass.
    cache_dtype
        Of the inputs and output gradients that are kept for the local solves; ``auto`` keeps them as they are.
    recompute
        Run a stage forwards once more before each backward pass, instead of keeping the graph until then.
    """

    micro_batches: int = 4
    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    cuts: str | None = None
    balance: Literal["parameters", "cost"] = "parameters"
    cache_dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        require_fields(self, "pipeline.")
        require(self.micro_batches >= 1, "pipeline.micro_batches", self.micro_batches, "give 1 or more")


@dataclass(frozen=True, kw_only=True)
class APTSOptions:
    """The whole configuration of `apts_mpi.APTS`.

    Parameters
    ----------
    subdomains
        Number of subdomains. None: one for each rank of a replica, or as many as the partition can make; for dense
        Gauss-Newton the least multiple of it with at most 640 parameters a subdomain.
    replicas
        Ranks that share the work of one subdomain rank over its samples.
    batch
        What each rank passes to `apts_mpi.APTS.step`: the ``whole`` batch, or its own ``shard`` of it.
    seed
        Seed of the random numbers that the network draws while it trains (dropout).
    autocast
        ``bfloat16``: the network computes in it where torch's autocast holds it to be safe, in loss, gradient, trial
        and local evaluations alike. Parameters, gradients, reductions and curvature stay float32. ``none``: all does.
    layout
        What a rank holds: ``replicated``, the whole network; ``staged``, a stage of it (see `apts_mpi.StagedAPTS`).
    stall_timeout
        Seconds without a sign from a stage after which all ranks raise `apts_mpi.errors.StallError`. None: 10.
    schwarz, local, coarse, trust_region, global_step, pipeline
        Options of the parts; those of the pipeline are for layout staged.
    """

    layout: Literal["replicated", "staged"] = "replicated"
    subdomains: int | None = None
    replicas: int = 1
    batch: Literal["whole", "shard"] = "whole"
    seed: int = 0
    autocast: Literal["none", "bfloat16"] = "none"
    stall_timeout: float | None = None
    schwarz: SchwarzOptions = field(default_factory=SchwarzOptions)
    local: LocalOptions = field(default_factory=LocalOptions)
    coarse: CoarseOptions = field(default_factory=CoarseOptions)
    trust_region: TrustRegionOptions = field(default_factory=TrustRegionOptions)
    global_step: GlobalStepOptions = field(default_factory=GlobalStepOptions)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)

    def __post_init__(self) -> None:
        require_fields(self)
        require(self.subdomains is None or self.subdomains >= 1, "subdomains", self.subdomains, "give 1 or more")
        cuts = self.schwarz.cuts
        alike = self.subdomains is None or cuts is None or self.subdomains == len(cuts)
        require(alike, "subdomains", self.subdomains, f"schwarz.cuts {cuts} has another number; give one of the two")
        require(self.replicas >= 1, "replicas", self.replicas, "give 1 or more")
        # Streams of random numbers are numbered from it in 64 bits.
        require(0 <= self.seed < 2**40, "seed", self.seed, "give 0 or more, below 2**40")
        limit = self.stall_timeout
        require(limit is None or limit > 0.0, "stall_timeout", limit, "give seconds above 0, or null")
