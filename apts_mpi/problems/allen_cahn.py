"""The Allen-Cahn equation, a benchmark of Raissi, Perdikaris, Karniadakis (doi 10.1016/j.jcp.2018.10.045).

    u_t = 0.0001 u_xx + 5 (u - u^3),  -1 < x < 1,  0 < t <= 1,  u(0, x) = x^2 cos(pi x),  periodic in x

Coordinates are (t, x). The initial values and the periodicity hold by construction, as in DeepXDE (Lu et al., doi
10.1137/19M1274067): u(t, x) = u(0, x) + k(t, x) + t N(t, cos(pi x), sin(pi x)). Only the equation is left to learn. The
slope of u(0, x) jumps at x = 1 = -1 and that of the solution does not, for which no network makes up that is periodic
and smooth: k is what diffusion alone makes of the kink, less the kink.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from apts_mpi.problems import pinn
from apts_mpi.problems.problem import Problem

DIFFUSIVITY = 1e-4
REACTION_RATE = 5.0

# A time that is as good as 0, at which nothing is divided by.
EARLIEST = 1e-30


def allen_cahn(dtype: torch.dtype, *, width: int = 30, depth: int = 4, points: int = 2000) -> Problem:
    """2,000 interior points; network 2-3-30-30-30-30-1."""
    return pinn.least_squares_problem(
        name="allen-cahn",
        network=PeriodicFromInitialValues(pinn.tanh_network([3] + [width] * depth + [1])),
        operator=allen_cahn_operator,
        domain=pinn.Domain([0.0, -1.0], [1.0, 1.0], lambda at: pinn.Condition(at, np.zeros(len(at))), points),
        epochs=120,
        dtype=dtype,
        metrics={"relative_l2_error": pinn.solution_error(*_grid_solution())},
    )


class PeriodicFromInitialValues(nn.Module):
    """u(0, x) + k(t, x) + t network(t, cos(pi x), sin(pi x)): (t, x), (b, 2), to (b, 1).

    Near x = 1 = -1 the initial values are -1 + 2 d for the distance d, and k is twice `diffused_kink`.

    Parameters
    ----------
    network
        Maps (b, 3) to (b, 1).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, coordinates: Tensor) -> Tensor:
        time, position = coordinates[:, :1], coordinates[:, 1:]
        angle = torch.pi * position
        features = torch.cat([time, torch.cos(angle), torch.sin(angle)], dim=1)
        kink = 2.0 * diffused_kink(time, 1.0 - position.abs())
        return position.square() * torch.cos(angle) + kink + time * self.network(features)


def diffused_kink(time: Tensor, distance: Tensor) -> Tensor:
    """The solution of ``u_t = 0.0001 u_xx`` with initial values ``d = |x|``, less d, for distances d >= 0.

    That is ``w / sqrt(pi) exp(-(d / w)^2) - d erfc(d / w)`` with ``w^2 = 0.0004 t``; 0 at the start and far away.
    """
    width = (4.0 * DIFFUSIVITY * time.clamp_min(EARLIEST)).sqrt()
    scaled = distance / width
    return width / math.sqrt(math.pi) * torch.exp(-scaled.square()) - distance * torch.erfc(scaled)


def allen_cahn_operator(network: Callable[[Tensor], Tensor], coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """The network's values and ``u_t - 0.0001 u_xx - 5 (u - u^3)``, both (b, 1); see `pinn.Operator`."""
    values, gradients, u_xx = pinn.derivatives(network, coordinates, second=[1])
    u_t = gradients[:, :1]
    return values, u_t - DIFFUSIVITY * u_xx - REACTION_RATE * (values - values**3)


def initial_values(positions: np.ndarray) -> np.ndarray:
    """u(0, x), float64."""
    return positions**2 * np.cos(np.pi * positions)


@functools.cache
def reference_solution(
    nodes: int = 1024, steps: int = 1000, snapshots: int = 50
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Solve the equation on a periodic grid by Strang splitting.

    Diffusion is exact in Fourier space, and the reaction has the closed form
    ``u(t) = u(0) / sqrt(u(0)^2 + (1 - u(0)^2) exp(-10 t))``; the splitting is of second order in time (Strang 1968).

    Parameters
    ----------
    nodes : int
        Equidistant nodes in [-1, 1).
    steps : int
        Time steps; a multiple of `snapshots`.
    snapshots : int
        Number of equal intervals of [0, 1] at whose ends the solution is returned.

    Returns
    -------
    times : ndarray, (snapshots + 1,)
    positions : ndarray, (nodes,)
    values : ndarray, (snapshots + 1, nodes)
        All float64.
    """
    positions = np.linspace(-1.0, 1.0, nodes, endpoint=False)
    step = 1.0 / steps
    wave_numbers = np.pi * np.arange(nodes // 2 + 1)
    half_diffusion = np.exp(-DIFFUSIVITY * wave_numbers**2 * step / 2.0)
    reaction_decay = np.exp(-2.0 * REACTION_RATE * step)

    def diffuse(u: np.ndarray) -> np.ndarray:
        return np.fft.irfft(half_diffusion * np.fft.rfft(u), nodes)

    values = [initial_values(positions)]
    for _ in range(snapshots):
        u = values[-1]
        for _ in range(steps // snapshots):
            u = diffuse(u)
            u = diffuse(u / np.sqrt(u**2 + (1.0 - u**2) * reaction_decay))
        values.append(u)
    return np.linspace(0.0, 1.0, snapshots + 1), positions, np.stack(values)


def _grid_solution() -> tuple[np.ndarray, np.ndarray]:
    times, positions, values = reference_solution()
    # Every fourth node resolves the fronts well enough to measure an error.
    times, positions = np.meshgrid(times, positions[::4], indexing="ij")
    return np.column_stack([times.ravel(), positions.ravel()]), values[:, ::4].ravel()
