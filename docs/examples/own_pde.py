"""The heat equation u_t = u_xx on 0 < x < π with u(0, x) = sin x and u = 0 at both ends; exact: e⁻ᵗ sin x.

mpirun -n 2 python -m apts_mpi.train --problem own_pde.py:problem --dtype float64 --epochs 100
"""

import math

import torch
from torch import nn
from torch.func import jvp

from apts_mpi.problems import Problem


class Heat(nn.Module):
    """u(t, x) = sin x + t x (π − x) times a network, which has both conditions by construction."""

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1))

    def forward(self, inputs):
        """Values at (t, x), a row a point."""
        t, x = inputs[:, :1], inputs[:, 1:]
        return torch.sin(x) + t * x * (math.pi - x) * self.network(inputs)


def residual(network, inputs):
    """u_t − u_xx at each point."""
    along_t, along_x = torch.zeros_like(inputs), torch.zeros_like(inputs)
    along_t[:, 0], along_x[:, 1] = 1.0, 1.0

    def slope(points):
        return jvp(network, (points,), (along_x,))[1]

    return jvp(network, (inputs,), (along_t,))[1] - jvp(slope, (inputs,), (along_x,))[1]


def error(network):
    """Of the solution, over a grid that training does not see, relative to the exact one."""
    inputs = torch.cartesian_prod(torch.linspace(0, 1, 31), torch.linspace(0, math.pi, 31))
    inputs = inputs.to(next(network.parameters()))
    exact = torch.exp(-inputs[:, :1]) * torch.sin(inputs[:, 1:])
    with torch.no_grad():
        return float((network(inputs) - exact).norm() / exact.norm())


def problem() -> Problem:
    """300 points inside, drawn evenly."""
    points = torch.rand(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.get_default_dtype())
    return Problem(
        name="heat",
        network=Heat(),
        loss=nn.functional.mse_loss,
        train=(points * torch.tensor([1.0, math.pi]), torch.zeros(300, 1)),
        forward=residual,
        metrics={"relative_l2_error": error},
        epochs=100,
    )
