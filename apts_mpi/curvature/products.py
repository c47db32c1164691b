"""Products with the Hessian and with the Gauss-Newton matrix, by reverse mode alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from apts_mpi.curvature.transposes import transposed
from apts_mpi.errors import named_failures
from apts_mpi.network.activations import Bundle, at_point, differentiable
from apts_mpi.network.parameters import real_flat
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Mean, Pass, keeps_graphs
from apts_mpi.tools.events import BACKWARD, FORWARD
from apts_mpi.tools.trees import Tree

Product = Callable[[torch.Tensor], torch.Tensor]
ProductKind = Literal["gauss-newton", "hessian"]

# What is said where there are no second derivatives.
WITHOUT_PRODUCTS = (
    "local.solver and global_step.model: 'steihaug' differentiates the network and the loss twice",
    "choose others",
)


class PassProducts:
    """Products with the curvature of the loss at the present point, summed over passes of this rank.

    The graphs of all passes are kept, or made again for each product where graphs are not kept.

    Parameters
    ----------
    objective
        The global objective.
    passes
        With the masks of their evaluation.
    kind
        Which curvature.
    """

    def __init__(self, objective: Objective, passes: Sequence[Pass], kind: ProductKind) -> None:
        self._events = objective.events
        self._passes = [piece for part in passes for piece in part.micro_batches()]
        self._of_pass = functools.partial(self._make, objective, kind)
        self._own = [self._of_pass(part) for part in passes] if keeps_graphs(passes) else []

    def _make(self, objective: Objective, kind: ProductKind, part: Pass) -> Product:
        # The fused kernels of attention have no second derivatives.
        with sdpa_kernel(SDPBackend.MATH), objective.replayed():
            outputs, _ = objective.run_segments(part, part.inputs, cached=False)
        self._events.count_work(part.samples, 1.0, FORWARD + BACKWARD)
        parameters = objective.vector.parameters
        if kind == "hessian":
            return HessianProducts(objective.loss(outputs, part.targets), parameters)
        return GaussNewtonProducts(outputs, part.targets, objective.loss, parameters)

    def __call__(self, direction: torch.Tensor) -> torch.Tensor:
        """The curvature times a direction of all parameters, shape (n,)."""
        total = torch.zeros_like(direction)
        own = self._own or map(self._of_pass, self._passes)
        for part, of_pass in zip(self._passes, own, strict=True):
            total.add_(of_pass(direction), alpha=part.weight)
            self._events.count_work(part.samples, 1.0, 2.0 * BACKWARD)
        return total


class HessianProducts:
    """Products with the Hessian of a value, by differentiating its gradient once more (Pearlmutter 1994).

    They hold while the parameters stay as they are. The graph of the gradient is kept.

    Parameters
    ----------
    value : Tensor, shape ()
        With its graph.
    parameters
        The tensors to differentiate by.
    """

    def __init__(self, value: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
        self._parameters = parameters
        with named_failures(*WITHOUT_PRODUCTS):
            slopes = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
        self._slope = torch.cat([real_flat(slope) for slope in slopes])

    def __call__(self, direction: torch.Tensor) -> torch.Tensor:
        """The Hessian times ``direction``, both in the order of the parameters."""
        return _times(self._slope, self._parameters, direction)


class GaussNewtonProducts:
    """Products with ``J^T H J``: J the Jacobian of the outputs, H the Hessian of the loss with respect to them.

    ``J v`` is the derivative of ``w -> J^T w``, transposed: reverse mode alone, which every layer has. The products
    hold while the parameters stay as they are. Graphs of the outputs and of ``J^T w`` are kept.

    Parameters
    ----------
    outputs : tree of Tensor
        The network's outputs with their graph.
    targets : tree of Tensor
        What they are compared with.
    loss
        The loss.
    parameters
        The tensors to differentiate by.
    """

    def __init__(self, outputs: Bundle, targets: Tree, loss: Mean, parameters: Sequence[torch.Tensor]) -> None:
        self._outputs = differentiable(outputs)
        self._parameters = parameters
        self._weights = [torch.zeros_like(output, requires_grad=True) for output in self._outputs]
        with named_failures(*WITHOUT_PRODUCTS):
            parts = transposed(self._outputs, parameters, self._weights, create_graph=True)
        self._pulled = torch.cat([real_flat(part) for part in parts])
        self._curved = LossHessian(outputs, targets, loss)

    def __call__(self, direction: torch.Tensor) -> torch.Tensor:
        """The matrix times ``direction``, both in the order of the parameters."""
        with named_failures(*WITHOUT_PRODUCTS):
            tangents = transposed([self._pulled], self._weights, [direction])
            parts = transposed(self._outputs, self._parameters, self._curved(tangents))
        return torch.cat([part.flatten() for part in parts]).detach()


class LossHessian:
    """Products with the Hessian of the loss with respect to the outputs.

    Parameters
    ----------
    outputs, targets : tree of Tensor
        Where, and what the outputs are compared with.
    loss
        The loss.
    """

    def __init__(self, outputs: Bundle, targets: Tree, loss: Mean) -> None:
        point, self._variables = at_point(outputs)
        with torch.enable_grad(), named_failures(*WITHOUT_PRODUCTS):
            self._slopes = torch.autograd.grad(
                loss(point, targets), self._variables, create_graph=True, materialize_grads=True
            )

    def __call__(self, tangents: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The Hessian times tangents of the differentiable outputs, of their shapes both."""
        with named_failures(*WITHOUT_PRODUCTS):
            return tuple(part.detach() for part in transposed(self._slopes, self._variables, tangents))


def _times(values: torch.Tensor, variables: Sequence[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """The transposed derivative of ``values`` times ``weights``, flat."""
    with named_failures(*WITHOUT_PRODUCTS):
        return torch.cat([real_flat(part) for part in transposed([values], variables, [weights])]).detach()
