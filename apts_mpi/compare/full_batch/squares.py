"""The loss of a problem as half a sum of squares, ``f(theta) = |r(theta)|^2 / 2``, of one vector of parameters.

Rows of the Jacobian of r are gradients of single samples, by `torch.func`, and nothing of the solver's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from apts_mpi.errors import InvalidInput, require
from apts_mpi.problems import Problem

# A forward pass in evaluations, which are passes forwards and backwards.
FORWARD = 1.0 / 3.0

# Parameters of a network that these methods take unasked: a matrix of so many rows and columns has 3.2 GB.
MOST = 20_000

REMEDY = "choose other methods, or another problem"


class Squares:
    """A problem of squares on all its samples, each of which the network maps by itself.

    Parameters
    ----------
    problem
        Its loss is a mean of squared errors with weights, of tensors; which they are is found by differentiation.

    Attributes
    ----------
    initial : Tensor, (n,)
        The trainable parameters as the problem has them.
    evaluations : float
        Passes forwards and backwards so far; one for all rows.

    Raises
    ------
    InvalidInput
        If the loss is not half a sum of squares, or batches or inputs are of another kind.
    """

    def __init__(self, problem: Problem) -> None:
        inputs, targets = problem.train
        for is_so, what in (
            (isinstance(inputs, Tensor) and isinstance(targets, Tensor), "its samples are not tensors"),
            (problem.batch_size in (None, len(inputs)), "its batches are not full"),
            (problem.group_size == 1 and not problem.coupled, "its loss takes samples together"),
        ):
            require(is_so, "problem", problem.name, f"{what}, which methods of full batches need; {REMEDY}")
        self._network = problem.network
        self._forward: Callable[..., Tensor] = problem.forward or (lambda network, inputs: network(inputs))
        self._inputs = inputs
        self.evaluations = 0.0
        trainable = {name: value for name, value in self._network.named_parameters() if value.requires_grad}
        self._shapes = {name: value.shape for name, value in trainable.items()}
        self.initial = torch.cat([value.detach().flatten() for value in trainable.values()])
        self._scales, self._wanted = self._squares_of(problem, targets)

    def _squares_of(self, problem: Problem, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Scales s and values v for which the loss is ``|s (outputs - v)|^2 / 2``, with outputs as one row."""
        outputs = self._outputs(self.initial, self._inputs).detach().requires_grad_()
        loss = mean(problem.loss(outputs, targets))
        (slopes,) = torch.autograd.grad(loss, outputs, create_graph=True)
        # Of a sum of squares the second derivatives are a diagonal, which its product with ones shows.
        curvatures = torch.zeros_like(outputs)
        if slopes.requires_grad:
            (curvatures,) = torch.autograd.grad(slopes.sum(), outputs)
        scales = curvatures.clamp(min=0.0).sqrt()
        wanted = torch.where(curvatures > 0.0, outputs - slopes / curvatures, 0.0).detach()
        squares = (scales * (outputs - wanted)).square().sum() / 2.0
        rounding = torch.finfo(loss.dtype).eps ** 0.5
        alike = bool((squares - loss).abs() <= rounding * loss.abs())
        require(alike, "problem", problem.name, f"its loss is no mean of squared errors; {REMEDY}")
        return scales.flatten(), wanted.flatten()

    def _parameters(self, point: Tensor) -> dict[str, Tensor]:
        parts = point.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self._shapes.items(), strict=True)}

    def _outputs(self, point: Tensor, inputs: Tensor) -> Tensor:
        parameters = self._parameters(point)

        def network(inputs: Tensor) -> Tensor:
            return functional_call(self._network, parameters, (inputs,))

        return self._forward(network, inputs)

    def residuals(self, point: Tensor) -> Tensor:
        """r at a point, (m,)."""
        return self._scales * (self._outputs(point, self._inputs).flatten() - self._wanted)

    def loss(self, point: Tensor) -> float:
        """f at a point."""
        self.evaluations += FORWARD
        return float(self.residuals(point).square().sum() / 2.0)

    def value_and_gradient(self, point: Tensor) -> tuple[float, Tensor]:
        """f and its gradient, (n,), by reverse mode."""
        self.evaluations += 1.0
        point = point.detach().requires_grad_()
        value = self.residuals(point).square().sum() / 2.0
        (gradient,) = torch.autograd.grad(value, point)
        return float(value.detach()), gradient

    def rows(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """r and its Jacobian, (m,) and (m, n)."""
        self.evaluations += 1.0

        def outputs_of_one(point: Tensor, one: Tensor) -> tuple[Tensor, Tensor]:
            outputs = self._outputs(point, one[None]).flatten()
            return outputs, outputs

        jacobian, outputs = vmap(jacrev(outputs_of_one, has_aux=True), (None, 0))(point, self._inputs)
        residuals = self._scales * (outputs.flatten() - self._wanted)
        return residuals, jacobian.flatten(0, 1).mul_(self._scales[:, None])

    def put(self, point: Tensor) -> None:
        """Have the network at a point."""
        with torch.no_grad():
            for name, value in self._parameters(point).items():
                self._network.get_parameter(name).copy_(value)


def is_of_squares(problem: Problem) -> bool:
    """Whether methods of full batches take a problem, and in a size that dense matrices are good for."""
    try:
        return len(Squares(problem).initial) <= MOST
    except (InvalidInput, RuntimeError):
        return False


def mean(loss: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The mean that a loss returns, also as a sum and what it is to be divided by."""
    return loss[0] / loss[1] if isinstance(loss, tuple) else loss
