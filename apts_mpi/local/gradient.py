"""Local solvers: a few iterations on a local objective inside the subdomain's ball.

Those of this file do not wait for the device, but for dense Gauss-Newton: what depends on values is written with
tensors, so that a GPU is kept busy. Those with second-order models are in `apts_mpi.local.trust_region`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch

from apts_mpi.curvature.dense import LARGEST_DENSE, gram, of_rows, uses_rows
from apts_mpi.curvature.layer import TINY, Curvature
from apts_mpi.errors import InvalidInput
from apts_mpi.local.kfac import KFAC
from apts_mpi.local.objective import LocalObjective
from apts_mpi.local.solver import LocalState, Memoryless
from apts_mpi.local.trust_region import LSR1TrustRegion, SteihaugTrustRegion
from apts_mpi.network.parameters import clip_to_ball, norm
from apts_mpi.options import LocalOptions, TrustRegionOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror
from apts_mpi.trust_region.subproblem import NormKind, euclidean_radius, newton_in_ball, steepest_descent


class LocalSolver(Protocol):
    """Moves ``local.block`` from R_d theta_k to a better point at a distance of at most ``radius``."""

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """Collective over the team where it evaluates the objective."""

    def state(self) -> LocalState:
        """What it keeps from one iteration to the next."""

    def restore(self, state: LocalState) -> None:
        """Take over the state of a solver of the same kind."""


class SteepestDescent(Memoryless):
    """Steps of length radius / iterations down the gradient."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `LocalSolver`."""
        for gradient in local.gradients(self._iterations):
            local.block.add_(steepest_descent(gradient, radius / self._iterations, kind))


class Adam:
    """Steps of length radius / iterations along Adam directions (arXiv 1412.6980).

    Attributes
    ----------
    first_moment, second_moment : Tensor, shape (stop - start,)
        Running means of the gradient and its square; they last from one iteration to the next.
    count : int
        Updates of the moments.
    """

    BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8

    def __init__(self, iterations: int, block: torch.Tensor) -> None:
        self._iterations = iterations
        self.first_moment = torch.zeros_like(block)
        self.second_moment = torch.zeros_like(block)
        self.count = 0

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `LocalSolver`."""
        for gradient in local.gradients(self._iterations):
            # A gradient that is not finite leads to a rejected step; it must not stay in the moments.
            gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            self.count += 1
            self.first_moment.lerp_(gradient, 1.0 - self.BETA1)
            self.second_moment.mul_(self.BETA2).addcmul_(gradient, gradient, value=1.0 - self.BETA2)
            scale = (1.0 - self.BETA2**self.count) ** 0.5
            denominator = self.second_moment.sqrt().div_(scale).add_(self.EPSILON)
            direction = self.first_moment.div(denominator)
            length = norm(direction, kind)
            length = torch.where(length > 0.0, length, torch.ones_like(length))
            local.block.add_(direction.mul_(-radius / self._iterations / length))

    def state(self) -> LocalState:
        """See `LocalSolver`."""
        moments = {"first_moment": self.first_moment, "second_moment": self.second_moment}
        return LocalState(numbers={"count": self.count}, vectors=moments)

    def restore(self, state: LocalState) -> None:
        """See `LocalSolver`."""
        self.count = state.numbers["count"]
        self.first_moment.copy_(state.vectors["first_moment"])
        self.second_moment.copy_(state.vectors["second_moment"])


class GaussNewton:
    """Dense Gauss-Newton step of the block within the ball: ``-(J^T H J + mu I)^-1`` times the gradient.

    mu is ``damping`` times the mean diagonal of ``J^T H J``, or larger to end in the ball: a longer step cut to the
    ball is made of directions of little curvature alone, along which it leads nowhere. The matrix is formed in
    float64: it has the square of the Jacobian's condition. Of few rows it is formed in their own span.

    Attributes
    ----------
    shift : float
        By how much the ball raised mu the last time.
    """

    def __init__(self, iterations: int, damping: float, team: Communicator) -> None:
        self._iterations = iterations
        self._damping = damping
        self._team = team
        self.shift = 0.0

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `LocalSolver`.

        Raises
        ------
        InvalidInput
            For a block and a batch that are both too large.
        """
        start = local.block.clone()
        for gradient in local.gradients(self._iterations):
            _check_size(local)
            reach = euclidean_radius(radius, len(gradient), kind)
            local.block += self._step(local, gradient.double(), reach).to(local.block.dtype)
            displacement = local.block - start
            clip_to_ball(displacement, radius, kind)
            torch.add(start, displacement, out=local.block)

    def _step(self, local: LocalObjective, slope: torch.Tensor, reach: float) -> torch.Tensor:
        rows = local.gauss_newton_rows().to(torch.float64, copy=True).mul_(local.weight**0.5)
        rows.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        size, basis = len(slope), None
        if uses_rows(round(len(rows) / local.weight), size):
            basis, rows, slope = of_rows(self._of_team(rows), slope)
        matrix = gram(rows)
        if basis is None and self._team.size > 1:
            self._team.sum(Mirror(matrix.view(-1)))
        matrix.diagonal().add_(self._damping * (matrix.diagonal().sum() / size) + TINY)
        step, self.shift = newton_in_ball(matrix, slope, reach, self.shift)
        return step if basis is None else basis @ step

    def _of_team(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks of the team. Collective over it."""
        if self._team.size == 1:
            return rows
        ends = list(itertools.accumulate(self._team.collect(len(rows)), initial=0))
        ranges = [(first * rows.shape[1], last * rows.shape[1]) for first, last in itertools.pairwise(ends)]
        gathered = rows.new_empty(ends[-1], rows.shape[1])
        gathered[ends[self._team.rank] : ends[self._team.rank + 1]] = rows
        pending = self._team.pending()
        self._team.start_gather(pending, Mirror(gathered.view(-1)), ranges)
        pending.wait()
        return gathered

    def state(self) -> LocalState:
        """See `LocalSolver`."""
        return LocalState(numbers={"shift": self.shift})

    def restore(self, state: LocalState) -> None:
        """See `LocalSolver`."""
        self.shift = state.numbers["shift"]


def _check_size(local: LocalObjective) -> None:
    """Refuse, before there are rows, a matrix that is too large either way."""
    size = len(local.block)
    if size > LARGEST_DENSE and (count := local.count_gauss_newton_rows()) > LARGEST_DENSE:
        raise InvalidInput(
            f"local.solver: 'gauss-newton' cannot be used: a subdomain of {size} parameters and a batch of {count} "
            f"rows (samples times outputs) both exceed {LARGEST_DENSE}; give smaller batches or more subdomains, or "
            "choose kfac or another one"
        )


class TrustRegion(Memoryless):
    """First-order trust region on the local objective; its own radius starts at the ball's.

    The last iteration evaluates the objective without its gradient.
    """

    def __init__(self, iterations: int, options: TrustRegionOptions) -> None:
        self._iterations = iterations
        self._options = options

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `LocalSolver`."""
        options = self._options
        start = local.block.clone()
        local.begin()
        value, gradient = local.start_value, local.gradient
        reach = torch.full_like(value, radius)
        for iteration in range(self._iterations):
            before = local.block.clone()
            displacement = before - start
            displacement.add_(steepest_descent(gradient, reach.to(gradient.dtype), kind))
            clip_to_ball(displacement, radius, kind)
            torch.add(start, displacement, out=local.block)
            if iteration < self._iterations - 1:
                trial, trial_gradient = local.value_and_gradient()
            else:
                trial, trial_gradient = local.value(), gradient
            predicted = -torch.dot(gradient, local.block - before).double()
            rho = torch.where(predicted > 0.0, (value - trial) / predicted, -torch.ones_like(value))
            accepted = rho >= options.eta1  # False for a rho that is not a number
            local.block.copy_(torch.where(accepted, local.block, before))
            gradient = torch.where(accepted, trial_gradient, gradient)
            value = torch.where(accepted, trial, value)
            shrunk = torch.where(rho >= options.shrink_below, reach, options.decrease_factor * reach)
            grown = (options.increase_factor * reach).clamp(max=radius)
            reach = torch.where(rho >= options.eta2, grown, shrunk)


def needs_evaluations(options: LocalOptions) -> bool:
    """Whether the solver evaluates the local objective beyond the global gradient at theta_k."""
    return options.solver in ("tr", "lsr1", "steihaug") or options.iterations > 1


def make_local_solver(
    options: LocalOptions,
    trust_region: TrustRegionOptions,
    block: torch.Tensor,
    layers: Sequence[tuple[Curvature, torch.nn.Module, slice]],
    team: Communicator,
) -> LocalSolver:
    """The local solver of one subdomain.

    Parameters
    ----------
    options, trust_region
        Its options, and those of the ball.
    block : Tensor, shape (stop - start,)
        The subdomain's parameters.
    layers
        The subdomain's layers: curvature, module and range within the block.
    team
        The ranks that share the subdomain's samples.
    """
    if options.solver == "kfac":
        return KFAC(options, layers, team)
    if options.solver == "gauss-newton":
        assert options.damping is not None  # composed
        return GaussNewton(options.iterations, options.damping, team)
    if options.solver == "tr":
        return TrustRegion(options.iterations, trust_region)
    if options.solver == "lsr1":
        return LSR1TrustRegion(options.iterations, trust_region, team)
    if options.solver == "steihaug":
        return SteihaugTrustRegion(options.iterations, options.product, trust_region, team)
    if options.solver == "adam":
        return Adam(options.iterations, block)
    return SteepestDescent(options.iterations)


def ensure_descent(gradient: torch.Tensor, displacement: torch.Tensor, radius: float, kind: NormKind) -> torch.Tensor:
    """``displacement``, or the steepest descent where it does not go down.

    Directions with memory may point uphill after the batch or the point changed. Displacements that each go down have
    a sum with a positive predicted reduction, so that a shrinking radius ends in an accepted step.
    """
    uphill = torch.dot(gradient, displacement) >= 0.0
    return torch.where(uphill, steepest_descent(gradient, radius, kind), displacement)
