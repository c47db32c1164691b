"""Judging a step and moving the radius, and the minimisers of models in a ball. No communication."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from apts_mpi.network.parameters import clip_to_ball, dots, norm
from apts_mpi.options import TrustRegionOptions

# Of the length of a step that shall reach the boundary, and how often its shift is corrected at most.
LENGTH_TOLERANCE, FACTORISATIONS = 0.1, 12

NormKind = Literal["2", "inf"]

Dots = Callable[..., tuple[float, ...]]


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
    noise: float = 0.0,
) -> Decision:
    """Judge a step. The rule::

        reference = max(loss, earlier losses of the window)
        actual    = reference - trial_loss
        rho       = (actual + noise) / (predicted_reduction + noise)
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
    noise
        Of a loss, absolute: reductions below it are not to be seen (Conn, Gould and Toint, Trust-Region Methods,
        section 17.4.2).
    """
    window = earlier_losses[-options.window :] if options.window else ()
    actual = max(loss, *window) - trial_loss if window else loss - trial_loss
    numbers = (loss, trial_loss, predicted_reduction, step_norm)
    if not all(map(math.isfinite, numbers)) or predicted_reduction <= 0.0:
        return Decision(False, -math.inf, max(options.decrease_factor * radius, options.min_radius), actual)
    rho = (actual + noise) / (predicted_reduction + noise)
    following = radius
    if rho < options.shrink_below:
        following = options.decrease_factor * min(radius, step_norm)
    elif rho >= options.eta2 and step_norm >= (1.0 - BOUNDARY_TOLERANCE) * radius:
        following = options.increase_factor * radius
    following = min(max(following, options.min_radius), options.max_radius)
    return Decision(rho >= options.eta1, rho, following, actual)


# A step that was scaled to the boundary in float32 misses it by rounding.
BOUNDARY_TOLERANCE = 1e-3


def steepest_descent(gradient: torch.Tensor, radius: float | torch.Tensor, kind: NormKind) -> torch.Tensor:
    """Minimiser of ``gradient . step`` in the ball of ``radius``, shape (n,); zero for a zero gradient."""
    if kind == "inf":
        return gradient.sign().mul_(-radius)
    length = norm(gradient, "2")
    return gradient * (-radius / torch.where(length > 0.0, length, torch.ones_like(length)))


def subdomain_radius(radius: float, subdomains: int, kind: NormKind) -> float:
    """Radius of each subdomain's ball such that their steps sum to one within ``radius``.

    In the maximum norm blocks within ``radius`` sum to one within it; in the 2-norm N orthogonal blocks of length
    r sum to one of length sqrt(N) r.
    """
    return radius if kind == "inf" else radius / math.sqrt(subdomains)


def euclidean_radius(radius: float, size: int, kind: NormKind) -> float:
    """Radius of the smallest 2-norm ball in R^size that holds the ball of ``radius``."""
    return radius if kind == "2" else radius * math.sqrt(size)


def minimise_in_ball(
    matrix: np.ndarray, slope: np.ndarray, radius: float, lengths: np.ndarray | None = None
) -> np.ndarray:
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
    lengths : ndarray, shape (k, m), optional
        Where given, the ball in which x shall lie is ``|lengths x| <= radius``, while x is still shortened along
        ``matrix + mu I``; for a positive definite matrix only.
    """
    values, vectors = np.linalg.eigh(matrix)
    stretch = np.eye(len(slope)) if lengths is None else lengths @ vectors
    coefficients = vectors.T @ slope
    scale = max(abs(values[0]), abs(values[-1]), np.finfo(float).tiny)

    def solve(mu: float) -> np.ndarray:
        shifted = values + mu
        regular = shifted > np.finfo(float).eps * scale
        return -np.divide(coefficients, shifted, out=np.zeros_like(coefficients), where=regular)

    low = max(0.0, -values[0])
    point = solve(low)
    if np.linalg.norm(stretch @ point) <= radius:
        # A weaker pull along a direction without curvature would take a shift below rounding to reach the boundary.
        pulled = np.abs(coefficients) > np.finfo(float).eps * max(np.linalg.norm(slope), scale * radius)
        unbounded = pulled & (values + low <= np.finfo(float).eps * scale)
        if not unbounded.any():
            if values[0] < -np.finfo(float).eps * scale:
                point[0] = math.copysign(math.sqrt(max(radius**2 - point @ point, 0.0)), -coefficients[0])
            return vectors @ point
    # |x(mu)| falls from above the radius to below it between low and this.
    high = low + np.linalg.norm(stretch, 2) * np.linalg.norm(slope) / radius
    for _ in range(200):  # bisection to rounding
        middle = 0.5 * (low + high)
        if np.linalg.norm(stretch @ solve(middle)) > radius:
            low = middle
        else:
            high = middle
    return vectors @ solve(high)


def newton_in_ball(
    matrix: torch.Tensor, slope: torch.Tensor, radius: float, shift: float = 0.0
) -> tuple[torch.Tensor, float]:
    """Minimiser of ``slope . x + 1/2 x . matrix x`` over ``|x| <= radius``, for a positive definite matrix.

    Newton's method for the shift mu with ``|(matrix + mu I)^-1 slope| = radius``, by Cholesky factors, until the length
    is within a tenth of the radius (More and Sorensen, doi 10.1137/0904038); then the step is scaled into the ball.
    A few factorisations cost much less than one eigen-decomposition. Waits for the device.

    Parameters
    ----------
    matrix : Tensor, shape (n, n), float64
        Changed on its diagonal only, and changed back.
    slope : Tensor, shape (n,), float64
        The linear term.
    radius
        Radius of the ball.
    shift
        Where to start: the shift of a matrix alike saves factorisations.

    Returns
    -------
    step : Tensor, shape (n,), float64
        Zero for a matrix that is not positive definite, not finite for a slope that is not.
    shift : float
    """
    size = float(torch.linalg.matrix_norm(matrix))
    shift = max(shift, float(norm(slope, "2")) / radius - size)
    step, added = torch.zeros_like(slope), 0.0
    for _ in range(FACTORISATIONS):
        matrix.diagonal().add_(shift - added)
        added = shift
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:  # by rounding, as the matrix is positive definite
            shift = max(10.0 * shift, torch.finfo(matrix.dtype).eps * size)
            continue
        step = -torch.cholesky_solve(slope[:, None], factor).squeeze(1)
        length = float(norm(step, "2"))
        too_long, too_short = length > (1.0 + LENGTH_TOLERANCE) * radius, length < (1.0 - LENGTH_TOLERANCE) * radius
        if not too_long and not (too_short and shift > 0.0):
            break
        inverse_root = torch.linalg.solve_triangular(factor, step[:, None], upper=False)
        shift = max(0.0, shift + length**2 / float(inverse_root.square().sum()) * (length - radius) / radius)
    matrix.diagonal().sub_(added)
    clip_to_ball(step, radius, "2")
    return step, shift if math.isfinite(shift) else 0.0


def steihaug(
    product: Callable[[torch.Tensor], torch.Tensor],
    gradient: torch.Tensor,
    radius: float,
    tolerance: float,
    iterations: int,
    preconditioner: Callable[[torch.Tensor], torch.Tensor] | None = None,
    agree: Callable[[bool], bool] = bool,
    dots: Dots = dots,
) -> tuple[torch.Tensor, float]:
    """Conjugate gradients for ``gradient . x + 1/2 x . B x``, cut where they leave the ball (Steihaug 1983).

    They end at the boundary of the 2-norm ball, to which a direction of no positive curvature leads them, or when the
    residual has fallen enough. The model falls along the whole path, with a preconditioner as well; the ball is
    Euclidean all the same, so that a preconditioned path may end where it first meets the boundary, short of a later
    return. Waits for the device once or twice an iteration.

    Parameters
    ----------
    product
        B times a vector, B symmetric of any definiteness.
    gradient : Tensor, shape (n,)
        The linear term.
    radius
        Radius of the ball.
    tolerance
        The residual's norm relative to the gradient's at which to stop.
    iterations
        At most that many products.
    preconditioner
        A symmetric positive definite approximation of B's inverse, times a vector. None is the identity.
    agree
        Where ``product`` is collective: gives every rank one rank's answer whether to stop. All ranks do the same
        otherwise, so that none waits for another that took rounding errors for the boundary.
    dots
        Inner products of pairs of vectors, of which every rank may hold a part.

    Returns
    -------
    step : Tensor, shape (n,)
    predicted_reduction : float
    """
    step, residual = torch.zeros_like(gradient), gradient.clone()
    solved = residual if preconditioner is None else preconditioner(residual)
    direction = -solved
    square, energy = dots((gradient, gradient), (residual, solved))
    goal = tolerance**2 * square
    for _ in range(iterations):
        curved = product(direction)
        length, at_boundary = _length_in_ball(step, direction, energy, curved, radius, dots)
        step = step + length * direction
        residual = residual + length * curved
        if agree(at_boundary or dots((residual, residual))[0] <= goal):
            break
        solved = residual if preconditioner is None else preconditioner(residual)
        previous, (energy,) = energy, dots((residual, solved))
        direction = direction * (energy / previous) - solved
    return step, -0.5 * dots((step, gradient + residual))[0]  # B step = residual - gradient


def _length_in_ball(
    step: torch.Tensor, direction: torch.Tensor, energy: float, curved: torch.Tensor, radius: float, dots: Dots
) -> tuple[float, bool]:
    """How far to go from ``step`` along ``direction``, and whether that is to the boundary."""
    pairs = [(direction, curved), (direction, direction), (step, direction), (step, step)]
    curvature, square, along, inner = dots(*pairs)
    if square == 0.0:
        return 0.0, True
    to_boundary = (math.sqrt(along**2 + square * max(radius**2 - inner, 0.0)) - along) / square
    to_minimiser = energy / curvature if curvature > 0.0 else math.inf
    return min(to_boundary, to_minimiser), not to_minimiser < to_boundary
