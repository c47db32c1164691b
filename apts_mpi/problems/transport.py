"""The wave and the advection equation, with the initial values by construction and known solutions.

    wave:       u_tt = c^2 u_xx,  0 < x < 1,     u(0, x) = sin(pi x) + 1/2 sin(4 pi x),  u_t(0, x) = 0,  u = 0 at 0, 1
    advection:  u_t + c u_x = 0,  0 < x < 2 pi,  u(0, x) = sin(x),  periodic in x

for 0 < t <= 1; coordinates are (t, x). The first is that of Wang, Yu and Perdikaris (doi 10.1016/j.jcp.2021.110768),
the second that of Krishnapriyan et al. (arXiv 2109.01050), who found networks to fail on it from c = 20 on.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.func import vjp

from apts_mpi.errors import require
from apts_mpi.problems import pinn
from apts_mpi.problems.hard import HardConditions
from apts_mpi.problems.problem import Problem


def wave(dtype: torch.dtype, *, width: int = 40, depth: int = 3, points: int = 1000, speed: float = 1.0) -> Problem:
    """1,000 interior points; network 2-40-40-40-1."""
    require(speed > 0.0, "--problem.args.speed", speed, "give a number above 0")
    grid = pinn.grid_of(np.linspace(0.0, 1.0, 101), np.linspace(0.0, 1.0, 101))
    return pinn.least_squares_problem(
        name="wave",
        network=HardConditions(pinn.tanh_network([2] + [width] * depth + [1]), _two_waves, _at_rest_and_fixed),
        operator=partial(wave_operator, speed=speed),
        domain=pinn.Domain([0.0, 0.0], [1.0, 1.0], _no_source, points),
        epochs=150,
        dtype=dtype,
        metrics={"relative_l2_error": pinn.solution_error(grid, wave_solution(grid, speed))},
    )


def advection(
    dtype: torch.dtype, *, width: int = 40, depth: int = 3, points: int = 1000, speed: float = 10.0
) -> Problem:
    """1,000 interior points; network 3-40-40-40-1."""
    require(speed > 0.0, "--problem.args.speed", speed, "give a number above 0")
    grid = pinn.grid_of(np.linspace(0.0, 1.0, 101), np.linspace(0.0, 2.0 * np.pi, 101))
    network = HardConditions(pinn.tanh_network([3] + [width] * depth + [1]), _one_wave, lambda z: z[:, :1], _around)
    return pinn.least_squares_problem(
        name="advection",
        network=network,
        operator=partial(advection_operator, speed=speed),
        domain=pinn.Domain([0.0, 0.0], [1.0, 2.0 * np.pi], _no_source, points),
        epochs=150,
        dtype=dtype,
        metrics={"relative_l2_error": pinn.solution_error(grid, advection_solution(grid, speed))},
    )


def wave_operator(network: Callable[[Tensor], Tensor], coordinates: Tensor, speed: float) -> tuple[Tensor, Tensor]:
    """The network's values and ``u_tt - c^2 u_xx``, both (b, 1); see `pinn.Operator`."""
    values, _, second = pinn.derivatives(network, coordinates, second=[0, 1])
    return values, second[:, :1] - speed**2 * second[:, 1:]


def advection_operator(network: Callable[[Tensor], Tensor], coordinates: Tensor, speed: float) -> tuple[Tensor, Tensor]:
    """The network's values and ``u_t + c u_x``, both (b, 1); see `pinn.Operator`."""
    values, pull_back = vjp(network, coordinates)  # type: ignore[misc]
    (gradients,) = pull_back(torch.ones_like(values))
    return values, gradients[:, :1] + speed * gradients[:, 1:]


def wave_solution(points: np.ndarray, speed: float) -> np.ndarray:
    """The exact solution at (m, 2) points, (m,): two standing waves."""
    time, position = np.pi * points.T
    second = np.sin(4.0 * position) * np.cos(4.0 * speed * time)
    return np.sin(position) * np.cos(speed * time) + 0.5 * second


def advection_solution(points: np.ndarray, speed: float) -> np.ndarray:
    """The exact solution at (m, 2) points, (m,)."""
    return np.sin(points[:, 1] - speed * points[:, 0])


def _no_source(points: np.ndarray) -> pinn.Condition:
    return pinn.Condition(points, np.zeros(len(points)))


def _two_waves(coordinates: Tensor) -> Tensor:
    position = math.pi * coordinates[:, 1:]
    return torch.sin(position) + 0.5 * torch.sin(4.0 * position)


def _at_rest_and_fixed(coordinates: Tensor) -> Tensor:
    time, position = coordinates[:, :1], coordinates[:, 1:]
    return time.square() * position * (1.0 - position)


def _one_wave(coordinates: Tensor) -> Tensor:
    return torch.sin(coordinates[:, 1:])


def _around(coordinates: Tensor) -> Tensor:
    """The time, and the place on a circle."""
    time, position = coordinates[:, :1], coordinates[:, 1:]
    return torch.cat([time, torch.cos(position), torch.sin(position)], dim=1)
