"""Problems of deepxde's PyTorch backend: its geometry, equations, conditions and network, unchanged.

deepxde minimises a sum over equations and conditions of weight times mean square. Every point of it becomes a sample,
with a weight that makes the mean over all samples that sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from apts_mpi.errors import InvalidInput, require
from apts_mpi.problems.deepxde_conditions import Part, Place, parts_of
from apts_mpi.problems.deepxde_derivatives import OtherDerivative, Values, in_place_of_deepxde
from apts_mpi.problems.losses import weighted_squared_error
from apts_mpi.problems.pinn import solution_error
from apts_mpi.problems.problem import Problem
from apts_mpi.problems.redraw import Redraw
from apts_mpi.tools.environment import kept_draws, seed_draws

# Fixes the order of the samples.
_ORDER_SEED = 0


def from_deepxde(
    data: Any,
    network: nn.Module,
    *,
    loss_weights: Sequence[float] | None = None,
    name: str = "deepxde",
    epochs: int = 100,
) -> Problem:
    """Make a `Problem` of what ``deepxde.Model`` takes.

    The loss is deepxde's total loss with its default, mean squares, and the metric ``relative_l2_error`` is against its
    ``solution`` at its test points. Points of ``num_domain`` can be drawn anew (``--resample``).

    Parameters
    ----------
    data : deepxde.data.PDE or deepxde.data.TimePDE
        Geometry, equations, conditions and points.
    network : deepxde.nn.NN
        Its transforms of inputs and outputs count; it is moved to the CPU.
    loss_weights : sequence of float, optional
        As ``deepxde.Model.compile`` takes them: of the equations, then of the conditions.
    name : str
        How it is called in reports.
    epochs : int
        Default number of iterations.

    Returns
    -------
    Problem

    Raises
    ------
    InvalidInput
        Where deepxde is missing or has another backend, and for what would be another problem here.
    """
    dde = _deepxde()
    _check(dde, data, network)
    if torch.get_default_device().type != "cpu":
        # deepxde's import makes a GPU the place of all new tensors of the program, also of those of no concern to it.
        torch.set_default_device("cpu")
    network.to("cpu")
    parts = [*_equations(dde, data, network), *parts_of(dde, data)]
    terms = sum(len(part.columns) for part in parts)
    weights = [1.0] * terms if loss_weights is None else list(loss_weights)
    require(len(weights) == terms, "loss_weights", weights, f"give {terms}: of each equation and condition")
    inputs, targets = _samples(parts, weights)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(_ORDER_SEED))
    return Problem(
        name=name,
        network=network,
        loss=weighted_squared_error,
        train=(torch.from_numpy(inputs)[order], torch.from_numpy(targets)[order]),
        forward=Residuals(dde, parts, data.geom.dim),
        epochs=epochs,
        metrics={} if data.soln is None else {"relative_l2_error": solution_error(*data.test()[:2])},
        redraw=_redraw(data, order, targets),
    )


class Residuals:
    """The `Problem.forward`: what the part that a sample belongs to makes of the network there, (b, columns).

    Parameters
    ----------
    dde : module
        deepxde.
    parts : sequence of Part
        A sample names its part by the last number of its row.
    dimensions : int
        Of the coordinates.
    """

    def __init__(self, dde: Any, parts: Sequence[Part], dimensions: int) -> None:
        self._dde, self._parts, self._dimensions = dde, parts, dimensions
        self._pairs = any(part.pairs for part in parts)
        self._by_functions = True

    def __call__(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Inputs are rows (point, normal or other point, number of the part)."""
        if self._by_functions:
            try:
                return self._with_functions(network, inputs)
            except OtherDerivative:
                self._by_functions = False
        return self._with_graph(network, inputs)

    def _with_functions(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        point, other = (half.clone() for half in inputs[:, :-1].split(self._dimensions, dim=1))
        known = [Values(network, each) for each in ((point, other) if self._pairs else (point,))]
        with in_place_of_deepxde(self._dde, known):
            place = Place(point, known[0].values, other, known[-1].values)
            return _in_columns(self._parts, inputs[:, -1:], place)

    def _with_graph(self, network: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """The same with deepxde's own derivatives."""
        with torch.enable_grad():
            self._dde.grad.clear()
            point, other = (
                half.detach().clone().requires_grad_() for half in inputs[:, :-1].split(self._dimensions, dim=1)
            )
            values = network(point)
            place = Place(point, values, other, network(other) if self._pairs else values)
            residuals = _in_columns(self._parts, inputs[:, -1:], place)
            # deepxde keeps all derivatives that it was ever asked for.
            self._dde.grad.clear()
        return residuals


def _in_columns(parts: Sequence[Part], numbers: Tensor, place: Place) -> Tensor:
    width = max(sum(part.columns) for part in parts)
    residuals = place.values.new_zeros(len(place.point), width)
    for number, part in enumerate(parts):
        padded = torch.nn.functional.pad(part.left(place), (0, width - sum(part.columns)))
        residuals = torch.where(numbers == number, padded, residuals)
    return residuals


def _samples(parts: Sequence[Part], weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of inputs, see `Residuals`, and of targets, (values, weights)."""
    total = sum(len(part.points) for part in parts)
    width = max(sum(part.columns) for part in parts)
    remaining = iter(weights)
    inputs, targets = [], []
    for number, part in enumerate(parts):
        count = len(part.points)
        # deepxde takes the mean over all columns of an equation.
        scales = np.concatenate([np.full(columns, next(remaining) / columns) for columns in part.columns])
        of_each = np.broadcast_to(scales * total / count, part.values.shape)
        rest = ((0, 0), (0, width - len(scales)))
        inputs.append(np.column_stack([part.points, part.others, np.full(count, number, part.points.dtype)]))
        targets.append(np.column_stack([np.pad(part.values, rest), np.pad(of_each, rest)]).astype(part.points.dtype))
    return np.concatenate(inputs), np.concatenate(targets)


def _equations(dde: Any, data: Any, network: nn.Module) -> list[Part]:
    """The equations as one part, if there are any; how many, and of how many columns, a trial tells."""
    if data.pde is None:
        return []
    points = data.train_x[sum(data.num_bcs) :]
    require(len(points) > 0, "num_domain", data.num_domain, "give the equation some points")
    inputs = torch.from_numpy(points).requires_grad_()
    found = _listed(data.pde(inputs, network(inputs)))
    dde.grad.clear()
    _check_variables(found, network, inputs)

    for index, each in enumerate(found):
        shape = tuple(each.shape)
        remedy = f"give ({len(points)}, 1), a residual a point"
        require(len(shape) == 2 and shape[0] == len(points), f"shape of equation {index}", shape, remedy)
    columns = tuple(each.shape[1] for each in found)

    def left(place: Place) -> Tensor:
        return torch.cat(_listed(data.pde(place.point, place.values)), dim=1)

    return [Part(points, np.zeros_like(points), np.zeros((len(points), sum(columns))), left, columns)]


def _listed(equations: Any) -> list[Tensor]:
    return list(equations) if isinstance(equations, list | tuple) else [equations]


def _check_variables(equations: Sequence[Tensor], network: nn.Module, inputs: Tensor) -> None:
    """See that all that is to be trained is in the network."""
    known = {id(inputs), *map(id, network.parameters())}
    waiting, seen = [each.grad_fn for each in equations], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise InvalidInput(
                f"data: its equations have a variable to be trained, of shape {tuple(variable.shape)}, which is not "
                "in the network and would stay as it is; make it a parameter of the network that is among its values"
            )
        waiting += [following for following, _ in node.next_functions]


def _redraw(data: Any, order: Tensor, targets: np.ndarray) -> Redraw | None:
    """Of the points within the domain, which are the last ones of the equations, and these come first here."""
    if data.pde is None or data.num_domain == 0 or data.exclusions is not None:
        return None
    stop = len(data.train_x) - sum(data.num_bcs)
    start = stop - data.num_domain
    like = torch.from_numpy(targets[start : start + 1])

    def draw(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
        with kept_draws():
            seed_draws(int(torch.randint(2**62, (), generator=generator)))
            points = torch.from_numpy(data.geom.random_points(count, random="pseudo")).to(like.dtype)
        rest = torch.zeros(count, points.shape[1] + 1, dtype=like.dtype)
        return torch.cat([points, rest], dim=1), like.expand(count, -1).clone()

    return Redraw(draw, ((order >= start) & (order < stop)).nonzero().squeeze(1))


def _deepxde() -> Any:
    try:
        import deepxde
    except ModuleNotFoundError as error:
        raise InvalidInput("from_deepxde needs deepxde, which is missing; pip install apts_mpi[deepxde]") from error
    backend = deepxde.backend.backend_name
    require(backend == "pytorch", "backend of deepxde", backend, "set DDE_BACKEND=pytorch in the environment")
    return deepxde


def _check(dde: Any, data: Any, network: nn.Module) -> None:
    kinds = (dde.data.PDE, dde.data.TimePDE)
    require(type(data) in kinds, "data", type(data).__name__, "give a deepxde.data.PDE or TimePDE")
    require(isinstance(network, nn.Module), "network", type(network).__name__, "give a torch.nn.Module")
    require(dde.config.autodiff == "reverse", "autodiff of deepxde", dde.config.autodiff, "leave it at reverse")
    regularizer = getattr(network, "regularizer", None)
    require(regularizer is None, "regularization of the network", regularizer, "leave it out, or use --weight-decay")
    auxiliary = data.auxiliary_var_fn
    require(auxiliary is None, "auxiliary_var_function", auxiliary, "compute it in the equation instead")
