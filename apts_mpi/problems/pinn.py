"""What physics-informed networks share: points, derivatives and the least-squares form of the loss.

Every point is a sample, so that batches and shards of a problem are those of any other. An interior point gives the
residual of the differential equation, a boundary or initial point that of its condition (Raissi, Perdikaris,
Karniadakis, doi 10.1016/j.jcp.2018.10.045):

    f(theta) = 1/M_I sum_interior w(x) (operator(u)(x) - source(x))^2 + coefficient/M_B sum_boundary (u(x) - value(x))^2

with weights w of mean 1, all 1 unless given. Rows of the inputs are (coordinates, kind), rows of the targets (sources
or values, weights), k of each for a system of k equations; these weights turn f into a mean over all M_I + M_B samples.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from apts_mpi.problems.layers import mlp
from apts_mpi.problems.losses import weighted_squared_error
from apts_mpi.problems.problem import Problem
from apts_mpi.problems.redraw import Redraw

INTERIOR, BOUNDARY = 0.0, 1.0

# Fixes the points of every problem: they are its data, so not the seed of the run.
_POINTS_SEED = 0

# operator(network, coordinates) -> the network's values that conditions are for, and what the differential equation
# makes of them, both (b, k).
Operator = Callable[[Callable[[Tensor], Tensor], Tensor], tuple[Tensor, Tensor]]


class Condition(NamedTuple):
    """What is asked of the network at some points.

    Attributes
    ----------
    points : ndarray, (m, d)
        The points.
    values : ndarray, (m,) or (m, k)
        What the equations, or the network, are to be there.
    weights : ndarray that can be broadcast to the values, or float
        Of the points in their mean square; 0 where a value does not matter.
    """

    points: np.ndarray
    values: np.ndarray
    weights: np.ndarray | float = 1.0

    def targets(self, scale: float) -> np.ndarray:
        """Rows (values, weights), (m, 2 k), with ``scale`` samples in all for each of these points."""
        return np.column_stack([self.values, np.broadcast_to(self.weights, self.values.shape) * scale])


class Domain(NamedTuple):
    """A box in which the differential equation is to hold.

    Attributes
    ----------
    lower, upper : list of float
        Its corners.
    condition : callable
        Maps points, (m, d), spread evenly over the box, to what is asked of the equation there: at these points, or at
        others that are denser where more happens, and weigh as much less.
    points : int
        How many there are to be, unless others are drawn.
    """

    lower: list[float]
    upper: list[float]
    condition: Callable[[np.ndarray], Condition]
    points: int

    def scattered(self) -> Condition:
        """At points that are always the same, see `scattered_points`."""
        return self.condition(scattered_points(self.points, self.lower, self.upper))

    def drawn(self, generator: torch.Generator, count: int) -> Condition:
        """At random points."""
        unit = torch.rand(count, len(self.lower), dtype=torch.float64, generator=generator).numpy()
        return self.condition(_in_box(unit, self.lower, self.upper))


def least_squares_problem(
    *,
    name: str,
    network: nn.Module,
    operator: Operator,
    domain: Domain,
    epochs: int,
    dtype: torch.dtype,
    boundary: Condition | None = None,
    metrics: Mapping[str, Callable[[nn.Module], float]],
) -> Problem:
    """Put a physics-informed problem together.

    Parameters
    ----------
    name, network, epochs, metrics
        As in `Problem`; the network maps (b, d) coordinates to (b, k) values.
    operator : callable
        Left-hand sides of the differential equations.
    domain : Domain
        Where they hold, and the right-hand sides there; the weights w are of mean 1.
    dtype : torch.dtype
    boundary : Condition, optional
        Points and prescribed values there, and the coefficient of their mean square; None where the network has them by
        construction.

    Returns
    -------
    Problem
    """
    parts = [(INTERIOR, domain.scattered())] + ([] if boundary is None else [(BOUNDARY, boundary)])
    samples = sum(len(part.points) for _, part in parts)
    inputs = np.concatenate([_inputs(part, kind) for kind, part in parts])
    targets = np.concatenate([part.targets(samples / len(part.points)) for _, part in parts])
    # Mixed, so that a batch or a shard of consecutive samples has interior and boundary points.
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(_POINTS_SEED))

    def draw(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        part = domain.drawn(generator, count)
        drawn = _inputs(part, INTERIOR), part.targets(samples / domain.points)
        return torch.from_numpy(drawn[0]).to(dtype), torch.from_numpy(drawn[1]).to(dtype)

    return Problem(
        name=name,
        network=network.to(dtype),
        loss=weighted_squared_error,
        train=(torch.from_numpy(inputs)[order].to(dtype), torch.from_numpy(targets)[order].to(dtype)),
        forward=residual_forward(operator),
        epochs=epochs,
        metrics=metrics,
        redraw=Redraw(draw, (order < domain.points).nonzero().squeeze(1)),
    )


def _inputs(part: Condition, kind: float) -> np.ndarray:
    """Rows (coordinates, kind)."""
    return np.column_stack([part.points, np.full(len(part.points), kind)])


def residual_forward(operator: Operator) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    """The `Problem.forward` that gives the operator at interior samples and the network's values at the others."""

    def forward(network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        coordinates, kind = inputs[:, :-1], inputs[:, -1:]
        values, left_hand_sides = operator(network, coordinates)
        return torch.where(kind == INTERIOR, left_hand_sides, values)

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


def derivatives_of_all(
    function: Callable[[Tensor], Tensor], coordinates: Tensor, second: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """What `derivatives` gives, of a function with k values; see there.

    Parameters
    ----------
    function : callable
        Maps each row of (b, d) coordinates to a row of (b, k) values, independently of the other rows.
    coordinates : Tensor, (b, d)
    second : sequence of int

    Returns
    -------
    values : Tensor, (b, k)
    gradients : Tensor, (b, k, d)
    second_derivatives : Tensor, (b, k, len(second))
    """

    def gradients_and_values(points: Tensor) -> tuple[Tensor, Tensor]:
        values, pull_back = vjp(function, points)  # type: ignore[misc]
        units = torch.eye(values.shape[1], dtype=points.dtype, device=points.device)
        return vmap(lambda unit: pull_back(unit.expand_as(values))[0], out_dims=1)(units), values

    (gradients, values), pull_back = vjp(gradients_and_values, coordinates)  # type: ignore[misc]
    no_values = torch.zeros_like(values)
    units = torch.eye(coordinates.shape[1], dtype=coordinates.dtype, device=coordinates.device)
    outputs = torch.eye(values.shape[1], dtype=coordinates.dtype, device=coordinates.device)

    def along(axis: int) -> Tensor:
        unit = units[axis]
        entries = (outputs[:, :, None] * unit)[:, None]
        return vmap(lambda entry: pull_back((entry.expand_as(gradients), no_values))[0] @ unit, out_dims=1)(entries)

    return values, gradients, torch.stack([along(axis) for axis in second], dim=2)


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
    return _in_box(sequence.draw(count, dtype=torch.float64).numpy(), lower, upper)


def _in_box(unit: np.ndarray, lower: list[float], upper: list[float]) -> np.ndarray:
    return np.array(lower) + unit * (np.array(upper) - np.array(lower))


def grid_of(*axes: np.ndarray) -> np.ndarray:
    """Points of a grid, (m, d), the last coordinate the fastest."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))


def solution_error(points: np.ndarray, solution: np.ndarray) -> Callable[[nn.Module], float]:
    """The metric ``||u - solution||_2 / ||solution||_2`` over points, evaluated in float64.

    Parameters
    ----------
    points : ndarray, (m, d)
    solution : ndarray, (m,) or (m, k)
        Of the first k values of the network.
    """
    columns = solution.reshape(len(points), -1)

    def relative_l2_error(network: nn.Module) -> float:
        parameter = next(network.parameters())
        with torch.no_grad():
            values = network(torch.from_numpy(points).to(parameter))
        difference = values[:, : columns.shape[1]].double().cpu().numpy() - columns
        return float(np.linalg.norm(difference) / np.linalg.norm(columns))

    return relative_l2_error
