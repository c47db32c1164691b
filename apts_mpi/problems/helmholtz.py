"""Helmholtz's equation with several waves, as Wang, Teng and Perdikaris posed it (doi 10.1137/20M1318043).

    laplace(u) + k^2 u = f on [-1, 1]^2,   u = 0 on the boundary,   k = 1

The solution is ``u(x, y) = sin(pi x) sin(a pi y)``, with a waves across the square in y, one in x.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from apts_mpi.problems import pinn
from apts_mpi.problems.problem import Problem

WAVE_NUMBER = 1.0


def helmholtz_2d(dtype: torch.dtype, *, width: int = 40, depth: int = 3, points: int = 1000, waves: int = 4) -> Problem:
    """1,000 interior points, 160 boundary points, network 2-40-40-40-1."""

    def condition(at: np.ndarray) -> pinn.Condition:
        return pinn.Condition(at, source(at, waves))

    boundary = _boundary_points(40)
    axis = np.linspace(-1.0, 1.0, 101)
    grid = pinn.grid_of(axis, axis)
    return pinn.least_squares_problem(
        name="helmholtz-2d",
        network=pinn.tanh_network([2] + [width] * depth + [1]),
        operator=helmholtz_operator,
        domain=pinn.Domain([-1.0, -1.0], [1.0, 1.0], condition, points),
        # The residuals differ by the scale of the operator.
        boundary=pinn.Condition(boundary, np.zeros(len(boundary)), 100.0),
        epochs=150,
        dtype=dtype,
        metrics={"relative_l2_error": pinn.solution_error(grid, solution(grid, waves))},
    )


def helmholtz_operator(network: Callable[[Tensor], Tensor], coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The network's values and ``u_xx + u_yy + k^2 u``, both (b, 1); see `pinn.Operator`."""
    values, _, second = pinn.derivatives(network, coordinates, second=[0, 1])
    return values, second.sum(dim=1, keepdim=True) + WAVE_NUMBER**2 * values


def solution(points: np.ndarray, waves: int) -> np.ndarray:
    """The exact solution at (m, 2) points, (m,)."""
    return np.sin(np.pi * points[:, 0]) * np.sin(waves * np.pi * points[:, 1])


def source(points: np.ndarray, waves: int) -> np.ndarray:
    """The right-hand side f at (m, 2) points, (m,)."""
    return (WAVE_NUMBER**2 - np.pi**2 * (1 + waves**2)) * solution(points, waves)


def _boundary_points(count: int) -> np.ndarray:
    along = pinn.scattered_points(count, [-1.0], [1.0])
    return np.concatenate([np.insert(along, axis, side, axis=1) for axis in (0, 1) for side in (-1.0, 1.0)])
