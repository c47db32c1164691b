"""What physics-informed networks share: points, derivatives and the least-squares form of the loss.

Every point is a sample, so that batches and shards of a problem are those of any other. An interior point gives the
residual of the differential equation, a boundary or initial point that of its condition (Raissi, Perdikaris,
Karniadakis, doi 10.1016/j.jcp.2018.10.045):

    f(theta) = 1/M_I sum_interior w(x) (operator(u)(x) - source(x))^2 + coefficient/M_B sum_boundary (u(x) - value(x))^2

with weights w of mean 1, all 1 unless given. Rows of the inputs are (coordinates, kind), rows of the targets (source or
value, weight); these weights turn f into a mean over all M_I + M_B samples.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from apts_mpi.problems.layers import mlp
from apts_mpi.problems.losses import weighted_squared_error
from apts_mpi.problems.problem import Problem

INTERIOR, BOUNDARY = 0.0, 1.0

# Fixes the points of every problem: they are its data, so not the seed of the run.
_POINTS_SEED = 0

# operator(network, coordinates) -> the network's values and what the differential equation makes of them, both (b, 1).
Operator = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor]]


class Condition(NamedTuple):
    """What is asked of the network at some points.

    Attributes
    ----------
    points : ndarray, (m, d)
        The points.
    values : ndarray, (m,)
        What the equation, or the network, is to be there.
    weights : ndarray, (m,), or float
        Of the points in their mean square.
    """

    points: np.ndarray
    values: np.ndarray
    weights: np.ndarray | float = 1.0

    def targets(self, samples: int) -> np.ndarray:
        """Rows (value, weight), (m, 2), whose mean square over ``samples`` is that over the points."""
        count = len(self.points)
        return np.column_stack([self.values, np.full(count, self.weights) * (samples / count)])


def least_squares_problem(
    *,
    name: str,
    network: nn.Module,
    operator: Operator,
    interior: Condition,
    reference: tuple[np.ndarray, np.ndarray],
    epochs: int,
    dtype: torch.dtype,
    boundary: Condition | None = None,
) -> Problem:
    """Put a physics-informed problem together.

    Parameters
    ----------
    name, network, epochs
        As in `Problem`; the network maps (b, d) coordinates to (b, 1) values.
    operator : callable
        Left-hand side of the differential equation.
    interior : Condition
        Points and right-hand side there; the weights w are of mean 1: where points are denser than elsewhere, less.
    reference : (ndarray (m, d), ndarray (m,))
        Points and the solution there, for the metric ``relative_l2_error``.
    dtype : torch.dtype
    boundary : Condition, optional
        Points and prescribed values there, and the coefficient of their mean square; None where the network has them by
        construction.

    Returns
    -------
    Problem
    """
    parts = [(INTERIOR, interior)] + ([] if boundary is None else [(BOUNDARY, boundary)])
    samples = sum(len(part.points) for _, part in parts)
    inputs = np.concatenate([np.column_stack([part.points, np.full(len(part.points), kind)]) for kind, part in parts])
    targets = np.concatenate([part.targets(samples) for _, part in parts])
    # Mixed, so that a batch or a shard of consecutive samples has interior and boundary points.
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(_POINTS_SEED))
    return Problem(
        name=name,
        network=network.to(dtype),
        loss=weighted_squared_error,
        train=(torch.from_numpy(inputs)[order].to(dtype), torch.from_numpy(targets)[order].to(dtype)),
        forward=residual_forward(operator),
        epochs=epochs,
        metrics={"relative_l2_error": solution_error(*reference)},
    )


def residual_forward(operator: Operator) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    """The `Problem.forward` that gives the operator at interior samples and the network's value at the others."""

    def forward(network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        coordinates, kind = inputs[:, :-1], inputs[:, -1:]
        value, left_hand_side = operator(network, coordinates)
        return torch.where(kind == INTERIOR, left_hand_side, value)

    return forward


def derivatives(
    function: Callable[[Tensor], Tensor], coordinates: Tensor, second: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, gradients and unmixed second derivatives of a function of the coordinates.

    Reverse mode twice. Forward mode over forward mode would be the shorter program, but took three times as long for
    these small networks, and `torch.func.linearize` over the parameters admits no forward mode inside.

    Parameters
    ----------
    function : callable
        Maps each row of (b, d) coordinates to a row of (b, 1) values, independently of the other rows.
    coordinates : Tensor, (b, d)
    second : sequence of int
        The coordinates along which second derivatives are wanted.

    Returns
    -------
    values : Tensor, (b, 1)
    gradients : Tensor, (b, d)
    second_derivatives : Tensor, (b, len(second))
    """

    # The annotation of vjp allows for three results, which come with has_aux only.
    def gradients_and_values(points: Tensor) -> tuple[Tensor, Tensor]:
        values, pull_back = vjp(function, points)  # type: ignore[misc]
        return pull_back(torch.ones_like(values))[0], values

    (gradients, values), pull_back = vjp(gradients_and_values, coordinates)  # type: ignore[misc]
    no_values = torch.zeros_like(values)
    units = torch.eye(coordinates.shape[1], dtype=coordinates.dtype, device=coordinates.device)
    # Indexed by a list, torch would copy the list to the device, and wait.
    units = torch.stack([units[axis] for axis in second])

    def along(unit: Tensor) -> Tensor:
        return pull_back((unit.expand_as(coordinates), no_values))[0] @ unit

    return values, gradients, vmap(along, out_dims=1)(units)


def tanh_network(widths: list[int]) -> nn.Sequential:
    """A multilayer perceptron with tanh, Xavier-normal weights (Glorot and Bengio 2010) and zero biases."""
    network = mlp(widths, nn.Tanh)
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


def scattered_points(count: int, lower: list[float], upper: list[float]) -> np.ndarray:
    """Points of a scrambled Sobol sequence in a box, ndarray (count, len(lower)) of float64; always the same."""
    sequence = torch.quasirandom.SobolEngine(len(lower), scramble=True, seed=_POINTS_SEED)
    unit = sequence.draw(count, dtype=torch.float64).numpy()
    return np.array(lower) + unit * (np.array(upper) - np.array(lower))


def solution_error(points: np.ndarray, solution: np.ndarray) -> Callable[[nn.Module], float]:
    """The metric ``||u - solution||_2 / ||solution||_2`` over points, (m, d) and (m,), evaluated in float64."""

    def relative_l2_error(network: nn.Module) -> float:
        parameter = next(network.parameters())
        with torch.no_grad():
            values = network(torch.from_numpy(points).to(parameter))
        difference = values.squeeze(1).double().cpu().numpy() - solution
        return float(np.linalg.norm(difference) / np.linalg.norm(solution))

    return relative_l2_error
