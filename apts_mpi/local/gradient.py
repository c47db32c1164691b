"""Local solvers that know gradients alone. They do not wait for the device: what depends on values is in tensors."""

from __future__ import annotations

import torch

from apts_mpi.local.adam import adam_direction
from apts_mpi.local.objective import LocalObjective
from apts_mpi.local.solver import LocalSetting, LocalSolver, LocalState, SavedState
from apts_mpi.tools.schema import whole
from apts_mpi.trust_region.norms import NormKind, clip_to_ball, norm, steepest_descent


class SteepestDescent(LocalSolver):
    """Steps of length radius / iterations down the gradient."""

    local_data = "shared"

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        iterations = self.setting.options.iterations
        for gradient in local.gradients(iterations):
            local.block.add_(steepest_descent(gradient, radius / iterations, kind))


class Adam(LocalSolver):
    """Steps of length radius / iterations along Adam directions (arXiv 1412.6980).

    Attributes
    ----------
    first_moment, second_moment : Tensor, shape (stop - start,)
        Running means of the gradient and its square; they last from one iteration to the next.
    count : int
        Updates of the moments.
    """

    local_data = "shared"

    def __init__(self, setting: LocalSetting) -> None:
        super().__init__(setting)
        self.first_moment = torch.zeros_like(setting.block)
        self.second_moment = torch.zeros_like(setting.block)
        self.count = 0

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        iterations = self.setting.options.iterations
        for gradient in local.gradients(iterations):
            self.count += 1
            direction = adam_direction(self.first_moment, self.second_moment, self.count, gradient)
            length = norm(direction, kind)
            length = torch.where(length > 0.0, length, torch.ones_like(length))
            local.block.add_(direction.mul_(-radius / iterations / length))

    def state(self) -> LocalState:
        """See `apts_mpi.local.LocalSolver`."""
        moments = {"first_moment": self.first_moment, "second_moment": self.second_moment}
        return LocalState(numbers={"count": self.count}, vectors=moments)

    def check_saved(self, saved: SavedState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        self.check_numbers_and_vectors(saved, {"count": whole()}, lambda numbers: ("first_moment", "second_moment"))

    def restore(self, state: LocalState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        self.count = state.numbers["count"]
        self.first_moment.copy_(state.vectors["first_moment"])
        self.second_moment.copy_(state.vectors["second_moment"])


class FirstOrderTrustRegion(LocalSolver):
    """First-order trust region on the local objective; its own radius starts at the ball's.

    The last iteration evaluates the objective without its gradient.
    """

    evaluates = True

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        options, iterations = self.setting.trust_region, self.setting.options.iterations
        start = local.block.clone()
        local.begin()
        value, gradient = local.start_value, local.gradient
        reach = torch.full_like(value, radius)
        for iteration in range(iterations):
            before = local.block.clone()
            displacement = before - start
            displacement.add_(steepest_descent(gradient, reach.to(gradient.dtype), kind))
            clip_to_ball(displacement, radius, kind)
            torch.add(start, displacement, out=local.block)
            if iteration < iterations - 1:
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
