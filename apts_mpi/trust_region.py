"""Judging a step and moving the radius, and the minimisers of models in a ball. No communication."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from apts_mpi.options import TrustRegionOptions
from apts_mpi.vector import norm


@dataclass(frozen=True)
class Decision:
    """What `judge` found: whether the step is accepted, its ratio, and the next radius."""

    accepted: bool
    rho: float
    radius: float
    actual_reduction: float


def judge(
    options: TrustRegionOptions,
    *,
    radius: float,
    loss: float,
    trial_loss: float,
    predicted_reduction: float,
    step_norm: float,
    earlier_losses: tuple[float, ...] = (),
) -> Decision:
    """Judge a step. The rule::

        reference = max(loss, earlier losses of the window)
        actual    = reference - trial_loss
        rho       = actual / predicted_reduction
        accept     if rho >= eta1
        next radius = decrease_factor * min(radius, step_norm)   if rho <  shrink_below
                      increase_factor * radius                   if rho >= eta2 and step_norm reached the radius
                      radius                                     otherwise, within [min_radius, max_radius]

    Anything not finite, and a predicted reduction that is not positive, is a rejection with
    ``radius * decrease_factor``, as in PETSc (src/snes/impls/tr/tr.c).

    Parameters
    ----------
    options
        The constants.
    radius, step_norm
        Radius of the ball and norm of the step.
    loss, trial_loss
        Loss before and after the step on one batch.
    predicted_reduction
        Of the model that gave the step.
    earlier_losses
        Losses of earlier iterations; the last ``options.window`` of them count.
    """
    window = earlier_losses[-options.window :] if options.window else ()
    actual = max(loss, *window) - trial_loss if window else loss - trial_loss
    numbers = (loss, trial_loss, predicted_reduction, step_norm)
    if not all(map(math.isfinite, numbers)) or predicted_reduction <= 0.0:
        return Decision(False, -math.inf, max(options.decrease_factor * radius, options.min_radius), actual)
    rho = actual / predicted_reduction
    following = radius
    if rho < options.shrink_below:
        following = options.decrease_factor * min(radius, step_norm)
    elif rho >= options.eta2 and step_norm >= (1.0 - BOUNDARY_TOLERANCE) * radius:
        following = options.increase_factor * radius
    following = min(max(following, options.min_radius), options.max_radius)
    return Decision(rho >= options.eta1, rho, following, actual)


# A step that was scaled to the boundary in float32 misses it by rounding.
BOUNDARY_TOLERANCE = 1e-3


def steepest_descent(gradient: torch.Tensor, radius: float | torch.Tensor, kind: Literal["2", "inf"]) -> torch.Tensor:
    """Minimiser of ``gradient . step`` in the ball of ``radius``, shape (n,); zero for a zero gradient."""
    if kind == "inf":
        return gradient.sign().mul_(-radius)
    length = norm(gradient, "2")
    return gradient * (-radius / torch.where(length > 0.0, length, torch.ones_like(length)))


def subdomain_radius(radius: float, subdomains: int, kind: Literal["2", "inf"]) -> float:
    """Radius of each subdomain's ball such that their steps sum to one within ``radius``.

    In the maximum norm blocks within ``radius`` sum to one within it; in the 2-norm N orthogonal blocks of length
    r sum to one of length sqrt(N) r.
    """
    return radius if kind == "inf" else radius / math.sqrt(subdomains)


def minimise_in_ball(matrix: np.ndarray, slope: np.ndarray, radius: float) -> np.ndarray:
    """Minimiser of ``slope . x + 1/2 x . matrix x`` over ``|x| <= radius``, by eigen-decomposition.

    Solves ``(matrix + mu I) x = -slope`` for the least mu >= 0 with a positive semi-definite left-hand side and x in
    the ball; in the hard case a multiple of the lowest eigenvector completes x (Conn, Gould and Toint, Trust-Region
    Methods, section 7.3).

    Parameters
    ----------
    matrix : ndarray, shape (m, m), float64
        Symmetric, of any definiteness.
    slope : ndarray, shape (m,)
        The linear term.
    radius
        Radius of the ball.
    """
    values, vectors = np.linalg.eigh(matrix)
    coefficients = vectors.T @ slope
    scale = max(abs(values[0]), abs(values[-1]), np.finfo(float).tiny)

    def solve(mu: float) -> np.ndarray:
        shifted = values + mu
        regular = shifted > np.finfo(float).eps * scale
        return -np.divide(coefficients, shifted, out=np.zeros_like(coefficients), where=regular)

    low = max(0.0, -values[0])
    point = solve(low)
    if np.linalg.norm(point) <= radius:
        flat = np.abs(coefficients) > np.finfo(float).eps * np.linalg.norm(slope)
        unbounded = flat & (values + low <= np.finfo(float).eps * scale)
        if not unbounded.any():
            if values[0] < -np.finfo(float).eps * scale:
                point[0] += math.sqrt(max(radius**2 - point @ point, 0.0))
            return vectors @ point
    # |x(mu)| falls from above the radius to below it between low and this.
    high = low + np.linalg.norm(slope) / radius
    for _ in range(200):  # bisection to rounding
        middle = 0.5 * (low + high)
        if np.linalg.norm(solve(middle)) > radius:
            low = middle
        else:
            high = middle
    return vectors @ solve(high)
