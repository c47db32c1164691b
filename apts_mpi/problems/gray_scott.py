"""The Gray-Scott equations (doi 10.1126/science.261.5118.189) in one dimension: two substances, one feeds the other.

    u_t = 2 d u_xx - r u v^2 + f (1 - u),   v_t = d v_xx + r u v^2 - (f + k) v,   -1 < x < 1,  0 < t <= 1,  periodic

from a bump, with d = 0.002, r = 60 and Pearson's rates f = 0.04 r, k = 0.06 r. Coordinates are (t, x). Initial values
and periodicity hold by construction; the two equations are left to learn.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from apts_mpi.problems import etdrk4, pinn
from apts_mpi.problems.hard import HardConditions
from apts_mpi.problems.problem import Problem

DIFFUSIVITY, REACTION_RATE = 0.002, 60.0
FEED_RATE, KILL_RATE = 0.04 * REACTION_RATE, 0.06 * REACTION_RATE


def gray_scott(dtype: torch.dtype, *, width: int = 30, depth: int = 3, points: int = 1000) -> Problem:
    """1,000 interior points, with two equations each; network 3-30-30-30-2."""
    return pinn.least_squares_problem(
        name="gray-scott",
        network=HardConditions(pinn.tanh_network([3] + [width] * depth + [2]), _initial, lambda z: z[:, :1], _around),
        operator=gray_scott_operator,
        domain=pinn.Domain([0.0, -1.0], [1.0, 1.0], lambda at: pinn.Condition(at, np.zeros((len(at), 2))), points),
        epochs=120,
        dtype=dtype,
        metrics={"relative_l2_error": pinn.solution_error(*_grid_solution())},
    )


def gray_scott_operator(network: Callable[[Tensor], Tensor], coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The network's values (u, v) and the two equations with all on one side, both (b, 2); see `pinn.Operator`."""
    values, gradients, second = pinn.derivatives_of_all(network, coordinates, second=[1])
    u, v = values[:, :1], values[:, 1:]
    u_xx, v_xx = second[:, 0], second[:, 1]
    reaction = REACTION_RATE * u * v.square()
    of_u = 2.0 * DIFFUSIVITY * u_xx - reaction + FEED_RATE * (1.0 - u)
    of_v = DIFFUSIVITY * v_xx + reaction - (FEED_RATE + KILL_RATE) * v
    return values, gradients[:, :, 0] - torch.cat([of_u, of_v], dim=1)


@functools.cache
def reference_solution(nodes: int = 256, steps: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solve the equations by `etdrk4.march`.

    Parameters
    ----------
    nodes : int
        Equidistant nodes in [-1, 1).
    steps : int
        Time steps; a multiple of 50.

    Returns
    -------
    times : ndarray, (51,)
    positions : ndarray, (nodes,)
    values : ndarray, (51, 2, nodes)
        Of u and v. All float64.
    """
    positions = np.linspace(-1.0, 1.0, nodes, endpoint=False)
    bump = np.exp(-10.0 * (1.0 - np.cos(np.pi * positions)))
    squares = (np.pi * np.arange(nodes // 2 + 1)) ** 2
    linear = np.stack([-2.0 * DIFFUSIVITY * squares - FEED_RATE, -DIFFUSIVITY * squares - FEED_RATE - KILL_RATE])

    def nonlinear(values: np.ndarray) -> np.ndarray:
        reaction = REACTION_RATE * values[0] * values[1] ** 2
        return np.stack([FEED_RATE - reaction, reaction])

    start = np.stack([1.0 - 0.5 * bump, 0.5 * bump])
    values = etdrk4.march(start, linear, nonlinear, 1.0, steps, 50)
    return np.linspace(0.0, 1.0, 51), positions, values


def _grid_solution() -> tuple[np.ndarray, np.ndarray]:
    times, positions, values = reference_solution()
    return pinn.grid_of(times, positions), np.moveaxis(values, 1, 2).reshape(-1, 2)


def _initial(coordinates: Tensor) -> Tensor:
    bump = torch.exp(-10.0 * (1.0 - torch.cos(math.pi * coordinates[:, 1:])))
    return torch.cat([1.0 - 0.5 * bump, 0.5 * bump], dim=1)


def _around(coordinates: Tensor) -> Tensor:
    """The time, and the place on a circle."""
    time, angle = coordinates[:, :1], math.pi * coordinates[:, 1:]
    return torch.cat([time, torch.cos(angle), torch.sin(angle)], dim=1)
