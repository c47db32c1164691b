"""An inverse problem: the diffusivity of a rod, of which noisy temperatures are known.

    u_t = k u_xx,  0 < x < 1,  0 < t <= 1/2,   u(0, x) = sin(pi x) + 1/2 sin(3 pi x),   u = 0 at x = 0 and x = 1

with k = 0.3 unknown. Coordinates are (t, x). The conditions hold by construction; the measurements are soft conditions:
the exact solution at random points, with normal errors.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from apts_mpi.errors import require
from apts_mpi.problems import pinn
from apts_mpi.problems.hard import HardConditions, WithCoefficients
from apts_mpi.problems.problem import Problem

DIFFUSIVITY, GUESS, DURATION = 0.3, 1.0, 0.5

# Fixes the errors of the measurements: they are data, so not the seed of the run.
_NOISE_SEED = 1


def inverse_diffusion(
    dtype: torch.dtype, *, width: int = 20, depth: int = 3, points: int = 400, noise: float = 0.02
) -> Problem:
    """400 interior points, 200 measurements with errors of deviation ``noise``; network 2-20-20-20-1 and k."""
    require(noise >= 0.0, "--problem.args.noise", noise, "give 0 or more")
    lower, upper = [0.0, 0.0], [DURATION, 1.0]
    measured = pinn.scattered_points(200, lower, upper)
    errors = noise * np.random.default_rng(_NOISE_SEED).standard_normal(len(measured))
    grid = pinn.grid_of(np.linspace(0.0, DURATION, 51), np.linspace(0.0, 1.0, 101))
    temperature = HardConditions(pinn.tanh_network([2] + [width] * depth + [1]), _initial_values, _distance)
    return pinn.least_squares_problem(
        name="inverse-diffusion",
        network=WithCoefficients(temperature, [GUESS]),
        operator=diffusion_operator,
        domain=pinn.Domain(lower, upper, lambda at: pinn.Condition(at, np.zeros(len(at))), points),
        # The temperatures are less than the sources by the scale of the operator.
        boundary=pinn.Condition(measured, solution(measured) + errors, 100.0),
        epochs=100,
        dtype=dtype,
        metrics={
            "relative_l2_error": pinn.solution_error(grid, solution(grid)),
            "coefficient": coefficient,
            "relative_coefficient_error": lambda network: abs(coefficient(network) / DIFFUSIVITY - 1.0),
        },
    )


def diffusion_operator(network: Callable[[Tensor], Tensor], coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The temperatures and ``u_t - k u_xx``, both (b, 1), of a network with values (u, k); see `pinn.Operator`."""
    values, gradients, u_xx = pinn.derivatives(lambda points: network(points)[:, :1], coordinates, second=[1])
    diffusivity = network(coordinates)[:, 1:]
    return values, gradients[:, :1] - diffusivity * u_xx


def coefficient(network: nn.Module) -> float:
    """The diffusivity that has been found."""
    parameter = next(network.parameters())
    with torch.no_grad():
        return float(network(torch.zeros(1, 2).to(parameter))[0, 1])


def solution(points: np.ndarray) -> np.ndarray:
    """The exact temperatures at (m, 2) points, (m,)."""
    time, position = points[:, 0], np.pi * points[:, 1]
    decay = -DIFFUSIVITY * np.pi**2 * time
    return np.exp(decay) * np.sin(position) + 0.5 * np.exp(9.0 * decay) * np.sin(3.0 * position)


def _initial_values(coordinates: Tensor) -> Tensor:
    position = math.pi * coordinates[:, 1:]
    return torch.sin(position) + 0.5 * torch.sin(3.0 * position)


def _distance(coordinates: Tensor) -> Tensor:
    time, position = coordinates[:, :1], coordinates[:, 1:]
    return time * position * (1.0 - position)
