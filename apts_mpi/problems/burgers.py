"""The viscous Burgers equation, the benchmark of Raissi, Perdikaris, Karniadakis (doi 10.1016/j.jcp.2018.10.045).

    u_t + u u_x = nu u_xx,  -1 < x < 1,  0 < t <= 1,  u(0, x) = -sin(pi x),  u(t, -1) = u(t, 1) = 0,  nu = 0.01/pi

Coordinates are (t, x). A front forms at x = 0, whose width of about 0.01 holds few of any number of even points: the
residual was then small at the points and the solution wrong between them. Points are therefore denser there, and
weigh as much less, so that the mean over them is that over the domain.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.polynomial.hermite import hermgauss
from torch import Tensor

from apts_mpi.problems import pinn
from apts_mpi.problems.problem import Problem

VISCOSITY = 0.01 / np.pi


def burgers(
    dtype: torch.dtype, *, width: int = 20, depth: int = 5, points: int = 2000, boundary_points: int = 100
) -> Problem:
    """2,000 interior, 100 initial and 100 boundary points; network 2-20-20-20-20-20-1."""
    condition_points, condition_values = _conditions(boundary_points)
    grid = pinn.grid_of(np.linspace(0.0, 1.0, 51), np.linspace(-1.0, 1.0, 201))
    return pinn.least_squares_problem(
        name="burgers",
        network=pinn.tanh_network([2] + [width] * depth + [1]),
        operator=burgers_operator,
        domain=pinn.Domain([0.0, -1.0], [1.0, 1.0], _graded, points),
        epochs=120,
        dtype=dtype,
        boundary=pinn.Condition(condition_points, condition_values),
        metrics={"relative_l2_error": pinn.solution_error(grid, solution(grid))},
    )


def burgers_operator(network: Callable[[Tensor], Tensor], coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The network's values and ``u_t + u u_x - nu u_xx``, both (b, 1); see `pinn.Operator`."""
    values, gradients, u_xx = pinn.derivatives(network, coordinates, second=[1])
    u_t, u_x = gradients[:, :1], gradients[:, 1:]
    return values, u_t + values * u_x - VISCOSITY * u_xx


def solution(points: np.ndarray, quadrature_nodes: int = 100) -> np.ndarray:
    """The solution by the Cole-Hopf transformation and Gauss-Hermite quadrature.

    With ``F(y) = exp(-cos(pi y) / (2 pi nu))`` and y = x - z sqrt(4 nu t),
    ``u(t, x) = -int sin(pi y) F(y) exp(-z^2) dz / int F(y) exp(-z^2) dz``
    (Basdevant et al., doi 10.1016/0045-7930(86)90036-8).

    Parameters
    ----------
    points : ndarray, (m, 2), float64
        Rows (t, x) with t >= 0.
    quadrature_nodes : int

    Returns
    -------
    ndarray, (m,), float64
    """
    nodes, weights = hermgauss(quadrature_nodes)
    times, positions = points[:, :1], points[:, 1:]
    shifted = positions - nodes * np.sqrt(4.0 * VISCOSITY * times)
    exponent = -np.cos(np.pi * shifted) / (2.0 * np.pi * VISCOSITY)
    # The largest factor cancels in the quotient; without it the exponentials span 40 decades.
    kernel = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(kernel * np.sin(np.pi * shifted)).sum(axis=1) / kernel.sum(axis=1)


def _graded(points: np.ndarray) -> pinn.Condition:
    """Points (t, x |x|) for (t, x), and the weights 2 |x| by which x |x| stretches the domain, of mean 1."""
    times, positions = points.T
    weights = 2.0 * np.abs(positions)
    graded = np.column_stack([times, positions * np.abs(positions)])
    return pinn.Condition(graded, np.zeros(len(graded)), weights / weights.mean())


def _conditions(count: int) -> tuple[np.ndarray, np.ndarray]:
    across = np.linspace(-1.0, 1.0, count)
    sides = np.repeat([-1.0, 1.0], count // 2)
    times = np.tile(np.linspace(0.0, 1.0, count // 2), 2)
    points = np.concatenate([np.column_stack([np.zeros(count), across]), np.column_stack([times, sides])])
    return points, np.concatenate([-np.sin(np.pi * across), np.zeros(len(times))])
