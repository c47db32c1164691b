"""Poisson's equation on the unit cube, ``-laplace(u) = f`` with u = 0 on the boundary and a known solution.

The solution is ``u(x) = prod_i sin(pi x_i)``, so that ``f = d pi^2 u``.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from apts_mpi.problems import pinn
from apts_mpi.problems.problem import Problem


def poisson_1d(dtype: torch.dtype, *, width: int = 20, depth: int = 3, points: int = 100) -> Problem:
    """On the unit interval: 100 interior points, 2 boundary points, network 1-20-20-20-1."""
    return _poisson("poisson-1d", 1, points, 1, [width] * depth, 101, dtype)


def poisson_2d(
    dtype: torch.dtype, *, width: int = 30, depth: int = 3, points: int = 400, side_points: int = 20
) -> Problem:
    """On the unit square: 400 interior points, 80 boundary points, network 2-30-30-30-1."""
    return _poisson("poisson-2d", 2, points, side_points, [width] * depth, 51, dtype)


def poisson_3d(
    dtype: torch.dtype, *, width: int = 48, depth: int = 4, points: int = 2000, side_points: int = 100
) -> Problem:
    """On the unit cube: 2,000 interior points, 600 boundary points, network 3-48-48-48-48-1."""
    return _poisson("poisson-3d", 3, points, side_points, [width] * depth, 21, dtype)


def negative_laplacian(network: Callable[[Tensor], Tensor], coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The network's values and ``-sum_i d^2 u / d x_i^2``, both (b, 1); see `pinn.Operator`."""
    values, _, second = pinn.derivatives(network, coordinates, range(coordinates.shape[1]))
    return values, -second.sum(dim=1, keepdim=True)


def solution(points: np.ndarray) -> np.ndarray:
    """The exact solution at (m, d) points, (m,)."""
    return np.prod(np.sin(np.pi * points), axis=1)


def source(points: np.ndarray) -> np.ndarray:
    """The right-hand side f at (m, d) points, (m,)."""
    return points.shape[1] * np.pi**2 * solution(points)


def _poisson(
    name: str,
    dimensions: int,
    interior_count: int,
    face_count: int,
    hidden: list[int],
    grid_size: int,
    dtype: torch.dtype,
) -> Problem:
    boundary = _boundary_points(dimensions, face_count)
    grid = pinn.grid_of(*[np.linspace(0.0, 1.0, grid_size)] * dimensions)
    return pinn.least_squares_problem(
        name=name,
        network=pinn.tanh_network([dimensions, *hidden, 1]),
        operator=negative_laplacian,
        domain=pinn.Domain(
            [0.0] * dimensions, [1.0] * dimensions, lambda x: pinn.Condition(x, source(x)), interior_count
        ),
        # The coefficient balances the two terms, whose residuals differ by the scale pi^2 of the operator.
        boundary=pinn.Condition(boundary, np.zeros(len(boundary)), 10.0),
        epochs=120,
        dtype=dtype,
        metrics={"relative_l2_error": pinn.solution_error(grid, solution(grid))},
    )


def _boundary_points(dimensions: int, face_count: int) -> np.ndarray:
    if dimensions == 1:
        return np.array([[0.0], [1.0]])
    within_face = pinn.scattered_points(face_count, [0.0] * (dimensions - 1), [1.0] * (dimensions - 1))
    faces = [np.insert(within_face, axis, side, axis=1) for axis in range(dimensions) for side in (0.0, 1.0)]
    return np.concatenate(faces)
