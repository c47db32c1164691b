"""The global step of a staged network: products with the curvature travel the pipeline, there and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apts_mpi.curvature.products import LossHessian, ProductKind
from apts_mpi.curvature.transposes import transposed
from apts_mpi.network.activations import Bundle, differentiable
from apts_mpi.objective.passes import Pass
from apts_mpi.staged.objective import StagedObjective
from apts_mpi.staged.schedules import forwards
from apts_mpi.tools.events import BACKWARD, FORWARD
from apts_mpi.tools.trees import tensors_of


class StageProducts:
    """This stage's part of products with the curvature of the loss at the present point, summed over the passes.

    With F the stage, l the gradient of the loss with respect to what leaves it, and t a direction of its inputs and
    parameters: ``F' t`` goes on to the next stage. What comes back is the derivative c of l, and that of ``F'^T l`` is
    ``(l . F)'' t + F'^T c`` (Pearlmutter 1994). The Gauss-Newton matrix leaves the first term out; its c is ``H F' t``
    at the outputs. ``F' t`` and the first term are both derivatives of ``F'^T l``, transposed: reverse mode alone,
    which every layer has, whatever tuples flow between stages.

    Making and calling is collective over the stages. The graphs of all passes are kept.

    Parameters
    ----------
    objective
        The stage, and the pipeline.
    passes
        Micro-batches of this rank.
    kind
        Which curvature.
    """

    def __init__(self, objective: StagedObjective, passes: Sequence[Pass], kind: ProductKind) -> None:
        self._objective = objective
        self._pipeline = objective.pipeline
        self._passes = passes
        self._hessian = kind == "hessian"
        self._own: dict[int, _Differentiated] = {}
        self._at_outputs: dict[int, tuple[torch.Tensor, ...]] = {}
        # Activations have the shapes of the evaluation. Only a Hessian needs the gradient behind the stages.
        keys = [part.samples for part in passes]
        actions = objective.actions(len(passes)) if self._hessian else forwards(len(passes))
        with objective.replayed():
            self._pipeline.run(actions, keys, self._run_forward, self._pull_gradient)
        self._count(FORWARD + BACKWARD)

    def __call__(self, direction: torch.Tensor) -> torch.Tensor:
        """This stage's part of the curvature times a direction of all parameters, of which it has its part."""
        vector = self._objective.vector
        places = zip(vector.entries, vector.parameters, strict=True)
        self._direction = [direction[entry.start : entry.stop].view_as(parameter) for entry, parameter in places]
        self._total = torch.zeros_like(direction)
        keys = [("tangents of all", part.samples) for part in self._passes]
        self._pipeline.run(self._objective.actions(len(keys)), keys, self._push, self._pull_back)
        self._count(2.0 * BACKWARD)
        return self._total

    def _count(self, cost: float) -> None:
        segmented = self._objective.segmented
        share = segmented.share(0, len(segmented) - 1)
        self._objective.events.count_work(sum(part.samples for part in self._passes), share, cost)

    def _run_forward(self, index: int, entering: Bundle | None) -> Bundle:
        """Run the stage with its graph."""
        objective, part = self._objective, self._passes[index]
        variables = () if entering is None else differentiable(entering)
        for tensor in variables:
            tensor.requires_grad_()
        with torch.enable_grad():
            leaving, _ = objective.run_segments(part, part.inputs if entering is None else entering, cached=False)
            if self._pipeline.is_last and self._hessian:
                leaving = objective.loss(leaving, part.targets) * part.weight
        own = self._own[index] = _Differentiated(variables, objective.vector.parameters, differentiable(leaving))
        if not self._hessian:
            own.pull([torch.zeros_like(tensor) for tensor in own.leaving])
            if self._pipeline.is_last:
                own.curved = LossHessian(leaving, part.targets, objective.loss)
        return leaving

    def _pull_gradient(self, index: int, gradients: Bundle | None) -> Bundle:
        """Take the gradient of the loss back from what left to what entered."""
        own = self._own[index]
        return own.pull([torch.ones_like(own.leaving[0])] if gradients is None else tensors_of(gradients))

    def _push(self, index: int, entering: Bundle | None) -> Bundle:
        """Take tangents on from what entered to what leaves; behind the last stage turn round."""
        own = self._own[index]
        own.tangents = [*(() if entering is None else tensors_of(entering)), *self._direction]
        if self._pipeline.is_last and self._hessian:
            return ()
        leaving = own.push()
        if own.curved is not None:
            weight = self._passes[index].weight
            self._at_outputs[index] = tuple(part * weight for part in own.curved(leaving))
        return leaving

    def _pull_back(self, index: int, derivatives: Bundle | None) -> Bundle:
        """Take the derivative of the gradient back from what left to what entered; add that of the parameters."""
        if derivatives is None:
            derivatives = self._at_outputs.pop(index, ())
        entering, parameters = self._own[index].pull_back(tensors_of(derivatives), self._hessian)
        self._total += torch.cat([part.flatten() for part in parameters])
        return entering


class _Differentiated:
    """A stage's run of one micro-batch with its graph, and the graph of ``F'^T l``.

    Attributes
    ----------
    leaving : tuple of Tensor
        What leaves and is differentiable.
    tangents : list of Tensor
        Of what entered and of the parameters.
    curved : LossHessian or None
        At the outputs, for the Gauss-Newton matrix.
    """

    def __init__(
        self, entering: tuple[torch.Tensor, ...], parameters: Sequence[torch.Tensor], leaving: tuple[torch.Tensor, ...]
    ) -> None:
        self._entering = len(entering)
        self._variables = [*entering, *parameters]
        self.leaving = leaving
        self.tangents: list[torch.Tensor] = []
        self.curved: LossHessian | None = None

    def pull(self, gradients: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """``F'^T l`` of what entered, for gradients l of what left."""
        self._weights = [gradient.detach().requires_grad_() for gradient in gradients]
        self._pulled = transposed(self.leaving, self._variables, self._weights, create_graph=True)
        return tuple(part.detach() for part in self._pulled[: self._entering])

    def push(self) -> tuple[torch.Tensor, ...]:
        """``F' t``."""
        return transposed(self._pulled, self._weights, self.tangents)

    def pull_back(
        self, derivatives: Sequence[torch.Tensor], hessian: bool
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """``F'^T c`` of what entered and of the parameters, and with it ``(l . F)'' t``; no c is zero."""
        parts = tuple(torch.zeros_like(variable) for variable in self._variables)
        if derivatives:
            parts = transposed(self.leaving, self._variables, derivatives)
        if hessian:
            curved = transposed(self._pulled, self._variables, self.tangents)
            parts = tuple(part + more for part, more in zip(parts, curved, strict=True))
        return parts[: self._entering], parts[self._entering :]
