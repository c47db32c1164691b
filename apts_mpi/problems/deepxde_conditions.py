"""Conditions of deepxde as left-hand sides at any points, and values there.

deepxde gives each condition a slice of all points, and keeps values by the identity of their array. Here a batch may
have any samples: so what depends on the points alone is computed once, from deepxde's own functions, and what depends
on the network is computed everywhere and counts where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from apts_mpi.errors import InvalidInput, require


class Place(NamedTuple):
    """What is known at some samples: points, (b, d), and the network's values there, (b, k).

    Attributes
    ----------
    point, values : Tensor
        Of the samples.
    other : Tensor
        The outer normal, or the point that a periodic condition compares with.
    values_of_other : Tensor
        Of that point.
    """

    point: Tensor
    values: Tensor
    other: Tensor
    values_of_other: Tensor


class Part(NamedTuple):
    """All equations or a condition: ``left(place) = values``, of n samples.

    Attributes
    ----------
    points, others : ndarray, (n, d)
        See `Place`.
    values : ndarray, (n, c)
    left : callable
        Maps a `Place` to (b, c).
    columns : tuple of int
        How many of the c columns each equation has; they are one of a condition's.
    pairs : bool
        Whether the values at the other points are needed.
    """

    points: np.ndarray
    others: np.ndarray
    values: np.ndarray
    left: Callable[[Place], Tensor]
    columns: tuple[int, ...] = (1,)
    pairs: bool = False


class Slice(NamedTuple):
    """The points of a condition: those from ``start`` to ``stop`` of all."""

    all: np.ndarray
    start: int
    stop: int

    @property
    def points(self) -> np.ndarray:
        """Those of the condition."""
        return self.all[self.start : self.stop]


def parts_of(dde: Any, data: Any) -> list[Part]:
    """One part for each condition.

    Raises
    ------
    InvalidInput
        For a condition of another class, and for one without points.
    """
    icbc = dde.icbc
    makers: dict[type, Callable[[Any, Any, Slice], Part]] = {
        icbc.DirichletBC: _dirichlet,
        icbc.IC: _dirichlet,
        icbc.NeumannBC: _neumann,
        icbc.RobinBC: _robin,
        icbc.PeriodicBC: _periodic,
        icbc.OperatorBC: _operator,
        icbc.PointSetBC: _point_set,
        icbc.PointSetOperatorBC: _point_set_operator,
    }
    edges = np.cumsum([0, *data.num_bcs])
    parts = []
    for index, condition in enumerate(data.bcs):
        where, kind = f"condition {index}", type(condition)
        known = ", ".join(each.__name__ for each in makers)
        require(kind in makers, where, kind.__name__, f"give one of {known}")
        own = Slice(data.train_x, int(edges[index]), int(edges[index + 1]))
        require(own.stop > own.start, f"points of {where}", 0, "give it some, by num_boundary or num_initial")
        batch = getattr(condition, "batch_size", None)
        require(batch is None, f"batch_size of {where}", batch, "leave it out")
        parts.append(makers[kind](dde, condition, own))
    return parts


def _dirichlet(dde: Any, condition: Any, own: Slice) -> Part:
    component = condition.component
    values = _columns(condition.func(*own, None), len(own.points), 1)
    return Part(own.points, np.zeros_like(own.points), values, lambda place: place.values[:, [component]])


def _neumann(dde: Any, condition: Any, own: Slice) -> Part:
    values = _columns(condition.func(*own, None), len(own.points), 1)
    return Part(own.points, _normals(condition, own), values, _flux(dde, condition.component))


def _robin(dde: Any, condition: Any, own: Slice) -> Part:
    flux = _flux(dde, condition.component)

    def left(place: Place) -> Tensor:
        return flux(place) - condition.func(_as_numpy(place.point), place.values)

    return Part(own.points, _normals(condition, own), np.zeros((len(own.points), 1)), left)


def _periodic(dde: Any, condition: Any, own: Slice) -> Part:
    points, others = np.split(own.points, 2)
    component, axis = condition.component, condition.component_x

    def slope(values: Tensor, points: Tensor) -> Tensor:
        found: Tensor = dde.grad.jacobian(values, points, i=component, j=axis)
        return found

    def left(place: Place) -> Tensor:
        if condition.derivative_order == 0:
            return place.values[:, [component]] - place.values_of_other[:, [component]]
        return slope(place.values, place.point) - slope(place.values_of_other, place.other)

    return Part(points, others, np.zeros((len(points), 1)), left, pairs=True)


def _operator(dde: Any, condition: Any, own: Slice) -> Part:
    def left(place: Place) -> Tensor:
        found: Tensor = condition.func(place.point, place.values, _as_numpy(place.point))
        return found

    return Part(own.points, np.zeros_like(own.points), np.zeros((len(own.points), 1)), left)


def _point_set(dde: Any, condition: Any, own: Slice) -> Part:
    component = condition.component
    columns = component if isinstance(component, list) else [component]
    width = len(columns)
    values = _columns(condition.values, len(own.points), width)
    return Part(own.points, np.zeros_like(own.points), values, lambda place: place.values[:, columns], (width,))


def _point_set_operator(dde: Any, condition: Any, own: Slice) -> Part:
    values = _columns(condition.values, len(own.points), 1)
    return _operator(dde, condition, own)._replace(values=values)


def _flux(dde: Any, component: int) -> Callable[[Place], Tensor]:
    """The derivative along the normal."""

    def left(place: Place) -> Tensor:
        slopes = dde.grad.jacobian(place.values, place.point, i=component, j=None)
        return (slopes * place.other).sum(dim=1, keepdim=True)

    return left


def _normals(condition: Any, own: Slice) -> np.ndarray:
    return _as_numpy(condition.boundary_normal(*own, None))


def _columns(values: Any, count: int, width: int) -> np.ndarray:
    given = _as_numpy(torch.as_tensor(values))
    try:
        return np.broadcast_to(given, (count, width)).copy()
    except ValueError as error:
        raise InvalidInput(
            f"values of a condition: shape {given.shape} is not allowed; give ({count}, {width})"
        ) from error


def _as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
