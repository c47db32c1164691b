"""The lid-driven cavity: steady Navier-Stokes equations with three outputs, at the Reynolds number of Ghia et al.

    u u_x + v u_y + p_x = laplace(u) / Re,   u v_x + v v_y + p_y = laplace(v) / Re,   u_x + v_y = 0   on the unit square

with (u, v) = (1, 0) on the lid at y = 1 and (0, 0) on the other walls, and p = 0 in the corner at the origin. The
velocities are measured against those of `cavity_flow`, which agree with the tables of Ghia, Ghia and Shin (doi
10.1016/0021-9991(82)90058-4) to the accuracy of these.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from apts_mpi.errors import require
from apts_mpi.problems import pinn
from apts_mpi.problems.cavity_flow import cavity_flow, interpolated
from apts_mpi.problems.problem import Problem


def lid_driven_cavity(
    dtype: torch.dtype, *, width: int = 30, depth: int = 3, points: int = 800, reynolds: float = 100.0
) -> Problem:
    """800 interior points with three equations each, 240 on the walls; network 2-30-30-30-3."""
    require(0.0 < reynolds <= 400.0, "--problem.args.reynolds", reynolds, "give a number above 0, up to 400")
    return pinn.least_squares_problem(
        name="lid-driven-cavity",
        network=pinn.tanh_network([2] + [width] * depth + [3]),
        operator=partial(navier_stokes_operator, reynolds=reynolds),
        domain=pinn.Domain([0.0, 0.0], [1.0, 1.0], lambda at: pinn.Condition(at, np.zeros((len(at), 3))), points),
        boundary=_walls(60),
        epochs=320,
        dtype=dtype,
        metrics={"relative_l2_error": partial(_velocity_error, reynolds=reynolds)},
    )


def navier_stokes_operator(
    network: Callable[[Tensor], Tensor], coordinates: Tensor, reynolds: float
) -> tuple[Tensor, Tensor]:
    """The network's values (u, v, p) and momentum and mass with all on one side, both (b, 3); see `pinn.Operator`."""
    values, gradients, second = pinn.derivatives_of_all(network, coordinates, second=[0, 1])
    velocity = values[:, None, :2]
    transport = (gradients[:, :2] * velocity).sum(dim=2)
    momentum = transport + gradients[:, 2] - second[:, :2].sum(dim=2) / reynolds
    mass = gradients[:, 0, :1] + gradients[:, 1, 1:]
    return values, torch.cat([momentum, mass], dim=1)


def _walls(count: int) -> pinn.Condition:
    """Velocities at ``count`` points of each wall, the corners among those at rest, and the pressure in one of them."""
    along = np.linspace(0.0, 1.0, count)
    ends, middles = np.zeros(count), (np.arange(count) + 0.5) / count
    points = np.concatenate(
        [
            np.column_stack([middles, np.ones(count)]),
            *(np.column_stack(wall) for wall in ((along, ends), (ends, along), (ends + 1.0, along))),
        ]
    )
    values, weights = np.zeros((4 * count, 3)), np.ones((4 * count, 3))
    values[:count, 0] = 1.0
    weights[:, 2] = 0.0
    weights[count, 2] = count
    return pinn.Condition(points, values, weights)


def _velocity_error(network: nn.Module, reynolds: float) -> float:
    # In the corners beside the lid the velocity has no value.
    axis = np.linspace(0.0, 1.0, 51)[1:-1]
    nodes, u, v = cavity_flow(reynolds)
    flow = np.column_stack([interpolated(nodes, each, axis, axis).ravel() for each in (u, v)])
    return pinn.solution_error(pinn.grid_of(axis, axis), flow)(network)
