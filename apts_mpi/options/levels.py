"""Options of the two levels of the Schwarz method, and of the local solvers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apts_mpi.errors import require, require_choice, require_fields, require_name
from apts_mpi.options.trust_region import require_krylov

LocalData = Literal["auto", "shared", "shard", "full"]
PartitionName = Literal["auto", "layer", "index", "adaptive", "adaptive-timed"]


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
        ``layer`` cuts between layers, ``index`` cuts the flat parameter vector into equal ranges. ``adaptive`` cuts
        between layers, and moves the cuts while it trains: by the coupling between layers, and so that they balance
        what local solves cost by a model. ``adaptive-timed`` balances by the measured seconds of the ranks, so that no
        two runs are the same to the bit. ``auto``: layer, but for dense Gauss-Newton where layers make blocks of more
        than 640 parameters.
    repartition_every
        Iterations from one look at the cuts to the next, of a partition that moves them.
    cuts
        Where in the flat vector of the parameters the subdomains begin, the first one at 0. null: by the partition,
        or as saved where a run is resumed.
    overlap
        Layers (``layer``) or indices (``index``) that a subdomain takes from each neighbour.
    type
        Prolongation with overlap: ``restrict`` adds a correction on the indices that the subdomain owns alone,
        ``basic`` adds it everywhere, weighted by the number of subdomains that share an index.
    local_data
        Samples that local solvers see. ``shared``: each rank runs the network over its share of the batch once, and
        statistics are summed over all ranks; for solvers that do not evaluate the local objective. ``shard``: the
        local objective is of the subdomain's shard of the batch. ``full``: of the whole batch, over which every team
        then runs the network. ``auto``: full for dense Gauss-Newton, which has no running means; shared for kfac, adam
        and sgd with one local iteration; else shard.
    damping
        Factor of the sum of the corrections, in (0, 1].
    assembly
        Of the corrections of subdomains of data: their ``mean``, each in the ball of the whole step, or their ``sum``,
        each in a ball of 1/N of its radius (arXiv 2502.05133).
    prediction
        By what the plain sum of the corrections is judged: ``first-order``, -<gradient, step>; or ``local``, the
        reductions of the local objectives put together as the corrections are, for which each is evaluated once more
        (arXiv 2502.05133).
    """

    decomposition: Literal["parameters", "data"] = "parameters"
    variant: Literal["auto", "exact", "inexact"] = "auto"
    partition: PartitionName = "auto"
    repartition_every: int = 20
    cuts: tuple[int, ...] | None = None
    overlap: int = 0
    type: Literal["basic", "restrict"] = "restrict"
    local_data: LocalData = "auto"
    damping: float = 1.0
    assembly: Literal["mean", "sum"] = "mean"
    prediction: Literal["first-order", "local"] = "first-order"

    def __post_init__(self) -> None:
        require_fields(self, "schwarz.")
        cuts = self.cuts
        rising = cuts is None or (cuts[:1] == (0,) and sorted({*cuts}) == list(cuts))
        require(rising, "schwarz.cuts", cuts, "give rising numbers from 0 on, such as [0,120,260], or null")
        require(self.overlap >= 0, "schwarz.overlap", self.overlap, "give 0 or more")
        require(0.0 < self.damping <= 1.0, "schwarz.damping", self.damping, "give a number in (0, 1]")
        of_data = self.decomposition == "data" or self.assembly == "mean"
        require(of_data, "schwarz.assembly", self.assembly, "it is for schwarz.decomposition data; choose mean")
        every, remedy = self.repartition_every, "it is for schwarz.decomposition parameters; choose layer"
        require(every >= 1, "schwarz.repartition_every", every, "give 1 or more")
        of_parameters = self.decomposition == "parameters" or not self.is_adaptive
        require(of_parameters, "schwarz.partition", self.partition, remedy)

    @property
    def is_adaptive(self) -> bool:
        """Whether cuts move while it trains."""
        return self.partition in ("adaptive", "adaptive-timed")

    @property
    def unit(self) -> Literal["auto", "layer", "index"]:
        """Between what the partition cuts."""
        partition = self.partition
        return "layer" if partition == "adaptive" or partition == "adaptive-timed" else partition


# Names of local solvers, and of the coarse space of the package; besides them there are those of the user's.
LOCAL_SOLVERS = ("auto", "kfac", "muon", "gauss-newton", "tr", "lsr1", "steihaug", "sgd", "adam")
SUBDOMAINS = "subdomains"


@dataclass(frozen=True, kw_only=True)
class LocalOptions:
    """How a subdomain minimises its local objective within its ball.

    Parameters
    ----------
    solver
        ``kfac``: natural gradient by the Kronecker-factored curvature of each layer. ``muon``: orthogonal factors of
        mean gradients of each matrix. ``gauss-newton``: dense
        Gauss-Newton matrix of the block. ``tr``: first-order trust region. ``lsr1``: trust region with a
        limited-memory SR1 model, whose pairs last from one iteration to the next. ``steihaug``: trust region with
        conjugate gradients on products with the curvature. ``sgd``: steepest descent. ``adam``: Adam directions whose
        moments last from one iteration to the next. The last two have steps of 1/iterations of the ball's radius.
        ``auto``: gauss-newton where the network is called by a function and the blocks are small, kfac where subdomains
        are whole layers (with noise batches muon for networks with embeddings, or layers that kfac does not know), else
        adam. MODULE:CLASS: one of your own, see `apts_mpi.local.LocalSolver`.
    iterations
        Local iterations. The first one uses the global gradient and costs no evaluation of its own.
    damping
        Of the curvature: for kfac relative to the mean eigenvalue of a layer's, for gauss-newton to that of the
        block's. null: 0.3, 0.003 where the loss is quadratic in the outputs, 1 with noise batches, and 1e-7.
    relax
        Whether kfac's damping follows rho where the function stays the same (a full batch), down to 1e-8 and up again.
        null: where the loss is quadratic in the outputs. Of other losses the factors are known too little.
    decay
        Of the running means of kfac, an update.
    refresh
        Iterations between updates of kfac's running means and factorisations; more at the start. null: 5, or 20 with
        noise batches.
    momentum
        Of kfac and muon: the direction is that of a running mean of gradients which keeps so much of itself. null: 0,
        or 0.9 with noise batches.
    product
        Curvature of steihaug: ``gauss-newton``, which needs the exact local objective, or ``hessian``.
    krylov_tolerance
        Of steihaug, as that of the global step.
    krylov_products
        Of steihaug, as that of the global step.
    """

    solver: str = "auto"
    iterations: int = 1
    damping: float | None = None
    relax: bool | None = None
    decay: float = 0.9
    refresh: int | None = None
    momentum: float | None = None
    product: Literal["gauss-newton", "hessian"] = "gauss-newton"
    krylov_tolerance: float | None = None
    krylov_products: int | None = None

    def __post_init__(self) -> None:
        require_fields(self, "local.")
        require_name("local.solver", self.solver, LOCAL_SOLVERS)
        require(self.iterations >= 1, "local.iterations", self.iterations, "give 1 or more")
        damping = self.damping
        require(damping is None or damping > 0.0, "local.damping", damping, "give a number above 0, or null")
        require(0.0 <= self.decay < 1.0, "local.decay", self.decay, "give a number in [0, 1)")
        require(self.refresh is None or self.refresh >= 1, "local.refresh", self.refresh, "give 1 or more, or null")
        momentum = self.momentum
        remedy = "give a number in [0, 1), or null"
        require(momentum is None or 0.0 <= momentum < 1.0, "local.momentum", momentum, remedy)
        require_krylov("local.", self.krylov_tolerance, self.krylov_products)


# Targets that are enough for the curvature between a few columns of the coarse level. 0.45 of a batch of 256 were not:
# over three seeds the test accuracy fell by 0.001 to 0.009. The cost model of scaling studies, too, reckons with them.
ENOUGH_TARGETS = 512

# Columns of the coarse level where nothing is said: 64 subdomains have one of each kind.
USUAL_LARGEST = 128


@dataclass(frozen=True, kw_only=True)
class CoarseOptions:
    """How the coarse level recombines the corrections of the subdomains.

    Parameters
    ----------
    model
        ``none``: their plain sum. ``gauss-newton``: the best combination by the Gauss-Newton model in their span.
        ``residual``: the damped Gauss-Newton step of all parameters, from the equations of the residuals, whatever the
        number of subdomains; for local solver gauss-newton, which then gives its rows alone.
        ``auto``: residual where auto makes gauss-newton the local solver and nothing else is asked of the two levels,
        else gauss-newton, but none with noise batches; and where the network or the loss cannot be differentiated
        twice, differences of their values in the place of derivatives, or the plain sum, which is said once.
    space
        The span: ``subdomains``, of what ``columns`` names; or MODULE:CLASS for one of your own, see
        `apts_mpi.schwarz.CoarseSpace`.
    columns
        What each subdomain gives to the span: its ``correction``, its part of the ``last_step`` that was accepted,
        of the ``gradient``, of the ``last_correction`` before recombination.
    largest
        Number of columns, at most: neighbouring subdomains are grouped, so that a group gives as many as a subdomain
        else does. null: 128, or one group a stage where that is more.
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
    acceleration
        Of residual: largest length of the second-order part of a step (geodesic acceleration), relative to the first;
        a longer one is left out. 0: none. null: 0.75, or 0 with layout staged.
    momentum
        Of residual: share of the last step to which the damping draws the present one (SPRING).
    """

    model: Literal["auto", "none", "gauss-newton", "residual"] = "auto"
    space: str = SUBDOMAINS
    columns: tuple[Literal["correction", "last_step", "gradient", "last_correction"], ...] = (
        "correction",
        "last_step",
    )
    largest: int | None = None
    samples: float | None = None
    damping: float = 0.1
    norm: Literal["auto", "2", "scaled"] = "auto"
    acceleration: float | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        require_fields(self, "coarse.")
        limit, momentum = self.acceleration, self.momentum
        require(limit is None or limit >= 0.0, "coarse.acceleration", limit, "give 0 or more, or null")
        require(0.0 <= momentum < 1.0, "coarse.momentum", momentum, "give a number in [0, 1)")
        require_name("coarse.space", self.space, (SUBDOMAINS,))
        for column in self.columns:
            require_choice("coarse.columns", column, ("correction", "last_step", "gradient", "last_correction"))
        twice = len(set(self.columns)) < len(self.columns)
        require(not twice, "coarse.columns", self.columns, "give each once")
        require("correction" in self.columns, "coarse.columns", self.columns, "include correction")
        largest, share = self.largest, self.samples
        require(largest is None or largest >= 1, "coarse.largest", largest, "give 1 or more, or null")
        require(share is None or 0.0 < share <= 1.0, "coarse.samples", share, "give a number in (0, 1], or null")
        require(self.damping >= 0.0, "coarse.damping", self.damping, "give 0 or more")
