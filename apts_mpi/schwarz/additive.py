"""Additive Schwarz over the parameters: local solves in parallel, and their corrections put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from apts_mpi.curvature.linearisation import Column
from apts_mpi.curvature.rows import GaussNewtonRows
from apts_mpi.local.layer_sums import LayerSums
from apts_mpi.local.objective import LocalObjective
from apts_mpi.local.registry import solver_class
from apts_mpi.local.solver import LocalSetting, LocalSolver, displacement_of, ensure_descent
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.partition import Subdomain
from apts_mpi.objective.batch import Batch
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Cache
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.nonblocking import Pending
from apts_mpi.parallel.transport import BUCKET_BYTES, Mirror
from apts_mpi.schwarz.division_of_work import can_be_divided, divide_work
from apts_mpi.schwarz.local_reductions import LocalReductions
from apts_mpi.schwarz.plateau import Plateau
from apts_mpi.schwarz.shares import handed_out, led_range, led_rows, local_radius, weights_of
from apts_mpi.schwarz.whole_layers import whole_layers
from apts_mpi.tools.events import Stopwatch
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.norms import subdomain_radius
from apts_mpi.trust_region.same_function import NEW, SameFunction

# Makes the rows of the subdomains of a rank from their caches of one pass.
MakeRows = Callable[[Objective, Sequence[Cache]], GaussNewtonRows]


class AdditiveSchwarz:
    """The preconditioner: s = sum over d of R_d^T W_d (theta_d* - R_d theta_k).

    Parameters
    ----------
    options
        Of the whole solver, composed.
    objective
        The global objective.
    decomposition
        The subdomains, and who carries them.
    inner
        Of vectors of all parameters.
    make_rows
        What computes the rows of dense local solvers.
    plateau
        Gives the corrections where the local solver leads nowhere.

    Attributes
    ----------
    decomposition
        As given.
    local_solver : str
        Name of the local solver.
    correction : Tensor, shape (n,)
        The assembled correction, once the pending operation has completed.
    solvers : dict of int to LocalSolver
        Local solvers of the subdomains that this rank carries, with their state.
    kept : dict of int to LocalSolver
        These and those of which this rank computes a part of the directions.
    solving : Stopwatch
        Seconds of the local solves of this rank, without statistics that all ranks measure together.
    rows : list of GaussNewtonRows
        Those of each pass at the point of the last correction; computed if a local solver has asked for them.
    reach : float
        Share of the radius from which on the balls of subdomains may have cut the sum of their corrections.
    """

    def __init__(
        self,
        options: APTSOptions,
        objective: Objective,
        decomposition: Decomposition,
        inner: InnerProducts,
        make_rows: MakeRows = GaussNewtonRows,
        plateau: Plateau | None = None,
    ) -> None:
        schwarz = options.schwarz
        self._inner, self._options = inner, options
        self.local_solver = options.local.solver
        self._objective = objective
        self._comm, self._team, self._events = decomposition.comm, decomposition.team, objective.events
        self._kind = solver_class(options.local.solver)
        self._damping, self._norm = schwarz.damping, options.trust_region.norm
        self._data = data = schwarz.decomposition == "data"
        # A mean of steps within a ball lies in it.
        self._is_mean = data and schwarz.assembly == "mean"
        self._count = 1 if self._is_mean else decomposition.count
        # In the space of the residuals the coarse level finds each subdomain's correction, from the rows alone.
        self._solves = options.coarse.model != "residual"
        self._is_sum = data and not self._is_mean
        of_ball = 1.0 / decomposition.count if self._is_sum else subdomain_radius(1.0, decomposition.count, self._norm)
        self.reach = schwarz.damping * of_ball
        each = 1.0 / decomposition.count if self._is_mean else 1.0
        self._reductions = LocalReductions(decomposition, each) if schwarz.prediction == "local" else None
        self._values = objective.vector.values
        self._is_noisy = options.noise == "batches"
        self.solving = Stopwatch(objective.events)
        # Where statistics are shared every rank measures for all subdomains, and solves for its own.
        self._shared = schwarz.local_data == "shared" and self._kind.whole_layers
        self._divides = can_be_divided(options, self._kind, decomposition, self._shared)
        self._make_rows, self.plateau = make_rows, plateau
        self.rows: list[GaussNewtonRows] = []
        self.correction = torch.zeros_like(self._values)
        self._mirror = Mirror(self.correction)
        self._disjoint = not data and (schwarz.overlap == 0 or schwarz.type == "restrict")
        self.divide(decomposition)
        self._stack: torch.Tensor | None = None
        if data and options.coarse.model != "none":
            # Columns over all parameters cannot share one vector: every rank holds all of them.
            size = self._values.numel()
            self._stack = self._values.new_zeros(len(decomposition.subdomains) * size)
            self._mirror = Mirror(self._stack)
            self._ranges = [led_rows(decomposition, size, rank) for rank in range(self._comm.size)]

    def divide(self, decomposition: Decomposition) -> None:
        """Have these subdomains, with local solvers that know nothing yet; as many on the same ranks as before."""
        self.decomposition, objective, self._largest_batch = decomposition, self._objective, 0
        measured = decomposition.subdomains if self._shared else decomposition.carried
        self._measuring = {part.index: self._make_solver(part) for part in measured}
        self.solvers = {part.index: self._measuring[part.index] for part in decomposition.carried}
        if self._kind.takes_sums:
            objective.summaries = LayerSums(self._measuring, next(iter(self.solvers.values())))
        # Those that only measure never count an iteration.
        objective.observes = lambda: any(self._measuring[part.index].observes for part in decomposition.carried)
        self._weights = {} if self._disjoint else weights_of(decomposition, self._values, self._is_sum)
        self.kept, self._ranges = self.solvers, [led_range(decomposition, rank) for rank in range(self._comm.size)]
        if self._divides:
            network, refresh = objective.network, self._options.local.refresh or 1
            self._ranges, touched = divide_work(decomposition, network, refresh, self._measuring)
            self.kept = self.solvers | touched

    def _make_solver(self, subdomain: Subdomain) -> LocalSolver:
        block = self._values[subdomain.start : subdomain.stop]
        layers = whole_layers(self.decomposition, self._objective.network, subdomain) if self._kind.whole_layers else []
        team = self._comm if self._shared else self._team
        return self._kind(LocalSetting(self._options.local, self._options.trust_region, block, layers, team))

    def start_correction(
        self,
        batch: Batch,
        caches: Sequence[Sequence[Cache]],
        gradient: torch.Tensor,
        radius: float,
        same: SameFunction = NEW,
    ) -> Pending:
        """Solve this rank's local problems and start to assemble the corrections. Collective.

        The network's parameters are afterwards as before.

        Parameters
        ----------
        batch
            The samples.
        caches
            Caches of each pass of this rank.
        gradient : Tensor, shape (n,)
            The global gradient.
        radius
            Radius of the ball that will hold the assembled correction.
        same
            What is known of the function.

        Raises
        ------
        SharedInvalidInput
            On every rank, for what a local solver cannot do.
        """
        # On noisy batches the sum of all corrections is scaled to the ball, so that it is the same however it is split.
        own_radius = math.inf if self._is_noisy else local_radius(radius, self._count, self._norm, self._data)
        for solver in self._measuring.values():
            solver.same = same
        self._mirror.tensor.zero_()
        if self._reductions is not None:
            self._reductions.begin()
        self.open_rows(caches := self._fresh(batch, caches))
        if not self._solves:
            return self._comm.pending()
        useful = self._is_of_use(gradient)
        # What cannot be done shows the first time, or with a larger batch.
        tried = batch.size <= self._largest_batch
        if useful:
            self._largest_batch = max(batch.size, self._largest_batch)
        relief = self.plateau if self.plateau and self.plateau.leads else None
        if relief and useful:
            relief.see(gradient)
        refusals = nullcontext() if tried else self._comm.shared_refusals()
        # What is run again in a backward pass (checkpointing) must not move statistics.
        with self._events.timed("local solves"), self._objective.buffers.copied(), refusals:
            for weight, of_pass, rows in zip(batch.shares, caches, self.rows, strict=True):
                if useful and not relief and self._is_measuring:
                    self._measure(of_pass, weight, gradient)
                for cache in of_pass if useful else ():
                    if cache.subdomain.index in self.kept:
                        with self.solving:
                            self._solve(cache, rows, weight, gradient, own_radius)
        with self._events.timed("assembly"):
            return self._start_assembly()

    def _fresh(self, batch: Batch, caches: Sequence[Sequence[Cache]]) -> Sequence[Sequence[Cache]]:
        """The caches, of micro-batches anew the second time: sums of the layers are for one solve. Collective."""
        if self._kind.takes_sums and caches[0][0].is_used and batch.passes[0].most is not None:
            caches = self._objective.evaluate(batch.passes).caches
        caches[0][0].is_used = True
        return caches

    @property
    def _is_measuring(self) -> bool:
        """Whether all ranks measure together in this iteration."""
        return self._shared and next(iter(self.solvers.values())).is_due

    def _measure(self, caches: Sequence[Cache], weight: float, gradient: torch.Tensor) -> None:
        """Measure the layers of all subdomains on this rank's samples, and sum over the ranks. Collective."""
        key = next(iter(self.solvers.values())).updates
        for cache in caches:
            part = cache.subdomain
            local = LocalObjective(self._objective, cache, gradient[part.start : part.stop], self._comm, weight)
            fresh = self._measuring[part.index].measure(local, key)
            if part.index in self.kept:
                with self.solving:
                    self.kept[part.index].take_in(fresh)

    def _is_of_use(self, gradient: torch.Tensor) -> bool:
        """Whether the batch can teach the local solvers anything, whose state lasts. Collective."""
        useful = self._inner.is_direction(gradient)
        # A team solves together, and all measure together.
        together = self._comm if self._is_measuring else self._team
        if together.size > 1 and not self._inner.spread:
            useful = bool(together.decide(lambda: [useful])[0])
        return useful

    def open_rows(self, caches: Sequence[Sequence[Cache]]) -> None:
        """Have `rows` ready to be computed at the present parameters, for the caches of each pass there."""
        self.rows = [self._make_rows(self._objective, of_pass) for of_pass in caches]

    def reuse(self, correction: torch.Tensor, caches: Sequence[Sequence[Cache]]) -> None:
        """Take a saved correction for that of the present point, which has these caches."""
        self.assembled.copy_(correction)
        self.open_rows(caches)

    def _solve(
        self,
        cache: Cache,
        rows: GaussNewtonRows,
        weight: float,
        gradient: torch.Tensor,
        radius: float,
    ) -> None:
        subdomain = cache.subdomain
        own = gradient[subdomain.start : subdomain.stop]
        local = LocalObjective(self._objective, cache, own, self._team, weight, rows)
        solver = self.kept[subdomain.index]
        if self._reductions is not None:
            local.begin()
        if self.plateau and self.plateau.leads:
            displacement = self.plateau.displacement(subdomain.start, subdomain.stop, radius, self._norm)
        elif self._is_noisy:
            displacement = solver.unbounded(local)
        else:
            displacement = displacement_of(solver, local, radius, self._norm)
        own_part = solver.own_part if self._divides else None
        place, inner = handed_out(subdomain, displacement, own_part)
        self._objective.vector.still(displacement, subdomain.start if own_part is None else place.start)
        if self._reductions is not None:
            self._reductions.add(local, displacement)
        if self._stack is not None:
            size = len(displacement)
            descent = self._downhill(local.gradient, displacement, radius)
            self._stack[subdomain.index * size : (subdomain.index + 1) * size] = descent
        elif self._disjoint:
            self.correction[place] = self._downhill(gradient[place], inner, radius)
        elif self.decomposition.leads:
            weights = self._weights[subdomain.index]
            weighted = self._downhill(local.gradient * weights, displacement * weights, radius)
            self.correction[subdomain.start : subdomain.stop] += weighted

    def _downhill(self, gradient: torch.Tensor, displacement: torch.Tensor, radius: float) -> torch.Tensor:
        """See `ensure_descent`; on noisy batches the sum has to go down, or local reductions where they predict."""
        free = self._is_noisy or self._reductions is not None
        return displacement if free else ensure_descent(gradient, displacement, radius, self._norm)

    def is_known_in(self, radius: float, before: float) -> bool:
        """Whether the correction of a ball of radius ``before`` serves in this one: scaled down, unless it predicts."""
        return radius <= before and self._reductions is None

    def predicted_reduction(self) -> float | None:
        """Of the assembled correction by local reductions; None: of the first order. Collective where they predict."""
        return None if self._reductions is None else self._damping * self._reductions.total()

    @property
    def assembled(self) -> torch.Tensor:
        """What the pending operation completes: the correction, or one after the other those of all data subdomains."""
        return self._mirror.tensor

    def columns(self) -> list[Column]:
        """The corrections one by one, for the coarse level: of each subdomain's own parameters, or all of them."""
        parts = [(part.owned_start, part.owned_stop) for part in self.decomposition.subdomains]
        if self._stack is None:
            return [Column(start, stop, self.correction[start:stop]) for start, stop in parts]
        rows = self._stack.view(len(parts), -1)
        return [Column(start, stop, row) for (start, stop), row in zip(parts, rows, strict=True)]

    @property
    def preconditions(self) -> bool:
        """Whether `precondition` knows the curvature, in blocks of parameters."""
        return not self._data and self._kind.preconditions

    def precondition(self, residual: torch.Tensor, solved: Mirror) -> None:
        """Put the inverse curvature of each subdomain times its part of ``residual`` into ``solved``. Collective.

        The additive Schwarz preconditioner, of local solvers that precondition: with kfac's blocks of the layers that
        each subdomain owns it is symmetric positive definite.

        Parameters
        ----------
        residual : Tensor, shape (n,)
            A vector that is the same on all ranks, up to rounding.
        solved : Mirror of a tensor of shape (n,)
            Where the result goes.
        """
        for subdomain in self.decomposition.carried:
            direction = self.solvers[subdomain.index].direction(residual[subdomain.start : subdomain.stop])
            place, inner = handed_out(subdomain, direction)
            torch.neg(inner, out=solved.tensor[place])
        pending = self._comm.pending()
        self._comm.start_gather(pending, solved, self._ranges)
        pending.wait()

    def _start_assembly(self) -> Pending:
        """Gather disjoint corrections, which moves half of what a sum does; sum overlapping ones bucket by bucket."""
        pending = self._comm.pending()
        if self._damping != 1.0:
            self._mirror.tensor.mul_(self._damping)
        if self._disjoint or self._stack is not None:
            self._comm.start_gather(pending, self._mirror, self._ranges)
            return pending
        bucket = BUCKET_BYTES // self.correction.element_size()
        size = self.correction.numel()
        for start in range(0, size, bucket):
            stop = min(start + bucket, size)
            self._comm.start_sum(pending, self._mirror, self._mirror, start, stop)
        return pending
