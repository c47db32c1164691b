"""Minimisers of quadratic models in a ball. No communication."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from apts_mpi.trust_region.norms import Dots, clip_to_ball, dots, norm

# Of the length of a step that shall reach the boundary, and how often its shift is corrected at most.
LENGTH_TOLERANCE, FACTORISATIONS = 0.1, 12


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
    rounding = np.finfo(float).eps * scale
    low = max(0.0, -values[0])
    indefinite = values[0] < -rounding
    if indefinite:
        # Counted from the lowest one: where the slope hardly has its direction the shift is far below its rounding.
        values, low = values - values[0], 0.0

    def solve(mu: float, least: float = rounding) -> np.ndarray:
        shifted = values + mu
        return -np.divide(coefficients, shifted, out=np.zeros_like(coefficients), where=shifted > least)

    point = solve(low)
    if np.linalg.norm(stretch @ point) <= radius:
        # A weaker pull along a direction without curvature would take a shift below rounding to reach the boundary.
        pulled = np.abs(coefficients) > np.finfo(float).eps * max(np.linalg.norm(slope), scale * radius)
        unbounded = pulled & (values + low <= rounding)
        if not unbounded.any():
            if indefinite:
                point[0] = math.copysign(math.sqrt(max(radius**2 - point @ point, 0.0)), -coefficients[0])
            return vectors @ point
    # |x(mu)| falls from above the radius to below it between low and this.
    high = low + np.linalg.norm(stretch, 2) * np.linalg.norm(slope) / radius
    least = 0.0 if indefinite else rounding
    for _ in range(200):  # bisection to rounding
        middle = 0.5 * (low + high)
        if np.linalg.norm(stretch @ solve(middle, least)) > radius:
            low = middle
        else:
            high = middle
    return vectors @ solve(high, least)


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
