"""Rows of the Gauss-Newton matrix of a stage: derivatives of the outputs travel the pipeline backwards."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apts_mpi.curvature.dense import pull_rows
from apts_mpi.curvature.loss_curvature import WITHOUT_ROWS, AtOutputs, at_outputs, joined, read_outputs
from apts_mpi.curvature.rows import GaussNewtonRows
from apts_mpi.errors import InvalidInput
from apts_mpi.network.activations import Bundle, differentiable
from apts_mpi.staged.objective import StagedObjective
from apts_mpi.tools.events import BACKWARD, FORWARD
from apts_mpi.tools.trees import Tree, tensors_of


class StagedGaussNewtonRows(GaussNewtonRows):
    """`GaussNewtonRows` of the subdomains of a stage. Computing them is collective over the stages.

    For each output of the network a row of every sample goes from stage to stage, as large as the activations.
    """

    _objective: StagedObjective

    def _compute(self) -> torch.Tensor:
        objective, pipeline = self._objective, self._objective.pipeline
        parts = self._cache.micro_batches
        # Nothing is behind the first stage's parameters that would ask for derivatives by its inputs.
        segments = objective.segmented.segments[self._cache.subdomain.first_segment if pipeline.is_first else 0 :]
        parameters = objective.vector.parameters[self._touched]
        entered: dict[int, Bundle] = {}
        known: dict[int, AtOutputs] = {}
        derivatives: dict[int, tuple[tuple[torch.Tensor, ...], Sequence[int]]] = {}
        found: dict[int, torch.Tensor] = {}

        def forward(index: int, entering: Bundle | None) -> Bundle:
            activations = objective.load(parts[index].inputs) if entering is None else entering
            entered[index] = activations
            for segment in segments:
                activations = segment(activations)
                pipeline.progress()
            if pipeline.is_last:
                known[index], rows, places = self._by_outputs(activations, parts[index].targets)
                derivatives[index] = rows, places
            return activations

        def backward(index: int, rows: Bundle | None) -> Bundle:
            leaving, places = derivatives.pop(index) if rows is None else (tensors_of(rows), None)
            by_parameters, by_inputs = pull_rows(segments, parameters, entered.pop(index), leaving, places)
            found[index] = by_parameters.mul_(parts[index].share ** 0.5)
            return by_inputs

        keys = [("rows", part.samples) for part in parts]
        with torch.no_grad(), objective.replayed():
            pipeline.run(objective.actions(len(parts)), keys, forward, backward, describe_back=True)
        share = objective.segmented.share(0, len(objective.segmented) - 1)
        objective.events.count_work(sum(part.samples for part in parts), share, FORWARD + BACKWARD)
        if pipeline.is_last:
            self._at_outputs = joined([known[index] for index in range(len(parts))], [part.share for part in parts])
        return torch.cat([found[index] for index in range(len(parts))])

    def _by_outputs(self, outputs: Bundle, targets: Tree) -> tuple[AtOutputs, tuple[torch.Tensor, ...], Sequence[int]]:
        """The loss around its outputs; the roots by each that it reads, shape (k, samples, ...), and their places."""
        places = read_outputs(self._objective.loss, outputs, targets)
        if not places:
            raise InvalidInput(f"{WITHOUT_ROWS[0]}, and none has the samples in its first dimension; {WITHOUT_ROWS[1]}")
        tensors = [differentiable(outputs)[place] for place in places]
        known = at_outputs(self._objective.loss, outputs, targets, places)
        by_outputs = known.roots.transpose(0, 1)
        parts = by_outputs.split([tensor[0].numel() for tensor in tensors], dim=2)
        rows = tuple(part.reshape(len(part), *tensor.shape) for part, tensor in zip(parts, tensors, strict=True))
        return known, rows, places
