"""What an iteration leaves to the next, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from apts_mpi.options import TrustRegionOptions
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.subproblem import judge


@dataclass
class State:
    """What an iteration leaves to the next besides parameters, buffers and the local solvers' state."""

    iteration: int = 0
    functions: int = 0
    radius: float | None = None
    losses: list[float] = field(default_factory=list)
    gradient_evaluations: float = 0.0
    accepted: int = 0
    rejected: int = 0


@dataclass(frozen=True)
class Judged:
    """One judged step; all numbers are those of rank 0.

    Attributes
    ----------
    loss, trial_loss
        f_k before and after the step.
    predicted_reduction, actual_reduction, rho
        Of the model, of f_k (from the maximum of the window, if any), and their ratio.
    accepted
        Whether the step was taken.
    radius
        Radius of the ball in which the step was looked for.
    next_radius
        Radius of the next step.
    step_norm, gradient_norm
        Norms of the step (in the norm of the ball) and of the gradient (2-norm).
    """

    loss: float
    trial_loss: float
    predicted_reduction: float
    actual_reduction: float
    rho: float
    accepted: bool
    radius: float
    next_radius: float
    step_norm: float
    gradient_norm: float


def judged_of(record: Sequence[float]) -> Judged:
    """A judged step from the numbers of its fields, in their order."""
    loss, trial_loss, predicted, actual, rho, accepted, *rest = record
    return Judged(loss, trial_loss, predicted, actual, rho, bool(accepted), *rest)


def judge_table(
    table: np.ndarray,
    *,
    options: TrustRegionOptions,
    products: InnerProducts,
    radius: float,
    predicted_reduction: float | None,
    earlier_losses: Sequence[float],
    rounding: float,
) -> tuple[float, ...]:
    """Judge a step from what all ranks know of it; on rank 0.

    Parameters
    ----------
    table : ndarray, shape (ranks, 5)
        Of each rank its share of the loss before and after the step, and what `InnerProducts.own` returns.
    options, products
        Of the solver.
    radius
        Of the ball in which the step was looked for.
    predicted_reduction
        Of the model; None for the first-order one, whose reduction is ``-<gradient, step>``.
    earlier_losses
        Of the window.
    rounding
        Relative error of a loss.

    Returns
    -------
    tuple of float
        The numbers of a `Judged`.
    """
    loss, trial_loss = (math.fsum(column) for column in table.T[:2])
    slope, step_norm, gradient_norm = products.of_table(table[:, 2:])
    predicted = -slope if predicted_reduction is None else predicted_reduction
    decision = judge(
        options,
        radius=radius,
        loss=loss,
        trial_loss=trial_loss,
        predicted_reduction=predicted,
        step_norm=step_norm,
        earlier_losses=tuple(earlier_losses),
        noise=options.noise * rounding * abs(loss),
    )
    return (
        loss,
        trial_loss,
        predicted,
        decision.actual_reduction,
        decision.rho,
        decision.accepted,
        radius,
        decision.radius,
        step_norm,
        gradient_norm,
    )


@dataclass(frozen=True)
class StepResult:
    """What one iteration did; the same on every rank.

    Attributes
    ----------
    iteration
        Its number, from 1.
    schwarz
        The judged Schwarz step.
    global_step
        The judged global step, or None without one.
    gradient_evaluations
        Of this iteration, on the rank with most to do, in evaluations of the whole network on a rank's even share of
        the batch. A pass through a part of the network counts as its share, a forward pass alone as a third.
    seconds
        Wall time of this iteration on this rank.
    """

    iteration: int
    schwarz: Judged
    global_step: Judged | None
    gradient_evaluations: float
    seconds: float

    @property
    def accepted(self) -> bool:
        """Whether the parameters changed."""
        return self.schwarz.accepted or (self.global_step is not None and self.global_step.accepted)
