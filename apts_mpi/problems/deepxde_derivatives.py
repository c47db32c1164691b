"""Derivatives of a network for deepxde's equations, by ``torch.func`` in the place of ``torch.autograd.grad``.

deepxde's own can be differentiated for a whole batch only, which takes a backward pass for each row of the Gauss-Newton
matrix; these can be sample by sample, which takes one for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

Function = Callable[[Tensor], Tensor]


class OtherDerivative(RuntimeError):
    """A derivative of something else than the network's values by its inputs was asked for."""


class Values:
    """A function at some points, with the derivatives that equations ask for, each computed once.

    Parameters
    ----------
    function : callable
        Maps each row of (b, d) to a row of (b, k), independently of the other rows.
    points : Tensor, (b, d)
    """

    def __init__(self, function: Function, points: Tensor) -> None:
        self.points = points
        self.values = function(points)
        self._function = function
        self._slopes: dict[int, tuple[Tensor, Callable[..., tuple[Tensor]]]] = {}
        self._bends: dict[tuple[int, int], Tensor] = {}

    def slope(self, component: int) -> Tensor:
        """Gradient of one of the values, (b, d)."""
        return self._linearised(component)[0]

    def bend(self, component: int, axis: int) -> Tensor:
        """Derivatives of the gradient along an axis, (b, d)."""
        if (component, axis) not in self._bends:
            gradient, pull_back = self._linearised(component)
            unit = torch.zeros_like(gradient)
            unit[:, axis] = 1.0
            (self._bends[component, axis],) = pull_back(unit)
        return self._bends[component, axis]

    def _linearised(self, component: int) -> tuple[Tensor, Callable[..., tuple[Tensor]]]:
        def gradient(points: Tensor) -> Tensor:
            values, pull_back = vjp(self._function, points)  # type: ignore[misc]
            unit = torch.zeros_like(values)
            unit[:, component] = 1.0
            slopes: Tensor = pull_back(unit)[0]
            return slopes

        if component not in self._slopes:
            self._slopes[component] = vjp(gradient, self.points)  # type: ignore[assignment]
        return self._slopes[component]


@contextmanager
def in_place_of_deepxde(dde: Any, known: list[Values]) -> Iterator[None]:
    """Have ``dde.grad.jacobian`` and ``hessian`` give the derivatives of these in the block.

    Raises
    ------
    OtherDerivative
        In the block, where others are asked for.
    """

    def found(ys: Tensor, xs: Tensor) -> Values:
        for each in known:
            if ys is each.values and xs is each.points:
                return each
        raise OtherDerivative("a derivative of other tensors than the network's values and inputs")

    def jacobian(ys: Tensor, xs: Tensor, i: int | None = None, j: int | None = None) -> Tensor:
        if i is None and ys.shape[1] > 1:
            raise OtherDerivative("a column of several values")
        slope = found(ys, xs).slope(i or 0)
        return slope if j is None else slope[:, j : j + 1]

    def hessian(ys: Tensor, xs: Tensor, component: int = 0, i: int = 0, j: int = 0) -> Tensor:
        return found(ys, xs).bend(component, i)[:, j : j + 1]

    reverse = dde.gradients.gradients_reverse
    kept = reverse.jacobian._Jacobians, reverse.hessian._Hessians
    reverse.jacobian._Jacobians, reverse.hessian._Hessians = jacobian, hessian
    try:
        yield
    finally:
        reverse.jacobian._Jacobians, reverse.hessian._Hessians = kept
