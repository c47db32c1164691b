"""The coarse level of a staged network: tangents travel with the activations, the small matrix alone is reduced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import jvp

from apts_mpi.curvature.linearisation import Column, is_bilinear
from apts_mpi.local.objective import GaussNewtonRows
from apts_mpi.network.activations import Bundle, with_tangents, without_tangents
from apts_mpi.objective.objective import Pass
from apts_mpi.schwarz.coarse import CoarseLevel, ReducedModel, inner_products
from apts_mpi.staged.objective import StagedObjective
from apts_mpi.staged.schedules import forwards
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.subproblem import euclidean_radius


class StagedCoarseLevel(CoarseLevel):
    """`CoarseLevel` where each rank has the columns of its own stage.

    Parameters
    ----------
    objective
        The global objective.
    columns
        For each stage, the number of its columns.
    leads
        Whether this rank speaks for its stage, as one of the replicas.
    size
        Number of parameters of all stages.
    products
        Norms over all parameters.
    arguments
        Of `CoarseLevel`; its subdomains are those of this stage.
    """

    def __init__(
        self,
        *,
        objective: StagedObjective,
        columns: Sequence[int],
        leads: bool,
        size: int,
        products: InnerProducts,
        **arguments: Any,
    ) -> None:
        super().__init__(objective=objective, **arguments)
        _import_what_forward_mode_imports_late(objective.segmented.segments)
        self._objective = objective
        self._pipeline = pipeline = objective.pipeline
        self._leads = leads
        self._size = size
        self._products = products
        start = sum(columns[: pipeline.stage])
        self._own = slice(start, start + columns[pipeline.stage])
        self._count = sum(columns)

    def prepare(
        self,
        passes: Sequence[Pass],
        corrections: Sequence[Column],
        gradient: torch.Tensor,
        batch_size: int,
        rows: Sequence[GaussNewtonRows] = (),
    ) -> None:
        """See `CoarseLevel`; there are no rows."""
        with self._events.timed("coarse"):
            self._corrections = corrections
            self._columns = self._columns_of(corrections, gradient)
            count, own = self._count, self._own
            # Curvature, inner products and slope in one message.
            packed = np.zeros((2 * count + 1, count))
            packed[:count] = self._curvature(passes, batch_size)
            if self._leads:
                products = torch.cat([inner_products(self._columns), self._slope(gradient)[None]]).cpu().numpy()
                packed[count : 2 * count][own, own] = products[:-1]
                packed[2 * count, own] = products[-1]
            total = self._comm.sum_on_root(packed)
            if total is not None:
                self._model = ReducedModel(total[2 * count], total[:count], total[count : 2 * count])

    def _curvature(self, passes: Sequence[Pass], batch_size: int) -> np.ndarray:
        """``S^T J^T H J S`` of this replica's samples on the last stage, zero on the others. Collective."""
        thinned = [part.thinned(self._share(batch_size, part.targets)) for part in passes]
        parts = [part for part in thinned if part is not None]
        curvature = torch.zeros(self._count, self._count, dtype=torch.float64, device=self.step.device)

        def forward(index: int, entering: Bundle | None) -> Bundle:
            part = parts[index]
            activations: Bundle = part.inputs
            carried: tuple[torch.Tensor, ...] = ()
            if entering is not None:
                activations, carried = without_tangents(entering, self._objective.enters_tuple)
            with self._linearisation.drawing(part):
                outputs, tangents = self._linearisation.tangents(activations, self._joined(carried), carried)
            if self._pipeline.is_last:
                reduced = self._linearisation.between(outputs, part.targets, tangents[0])
                curvature.add_(reduced, alpha=part.weight)
            return with_tangents(outputs, tangents)

        # A key of its own: tuples of activations and tangents have other shapes than activations.
        keys = [("tangents", part.samples) for part in parts]
        self._pipeline.run(forwards(len(parts)), keys, forward)
        return curvature.cpu().numpy()

    def _joined(self, tangents: tuple[torch.Tensor, ...]) -> list[Column]:
        """A column without parameters here for each tangent that comes from the stages before, then the own ones."""
        nothing = self.step[:0]
        return [Column(0, 0, nothing)] * (len(tangents[0]) if tangents else 0) + self._columns

    def recombine(self, radius: float) -> float:
        """See `CoarseLevel`."""
        damping = self._options.damping * self.raised

        def solve() -> Sequence[float]:
            model = self._model
            assert model is not None  # on rank 0
            if not (np.isfinite(model.slope).all() and np.isfinite(model.curvature).all()):
                return [math.nan] * self._count  # which is judged a rejection
            reach = euclidean_radius(radius, self._size, self._kind)
            return model.minimise(reach, damping, self._norm).tolist()

        with self._events.timed("coarse"):
            coefficients = np.array(self._comm.decide(solve))
            if not np.isfinite(coefficients).all():
                self.step.zero_()
                return math.nan
            self._combine(coefficients[self._own])
            length = self._products.norm(self.step)
            coefficients *= min(1.0, radius / length) if length > 0.0 else 1.0
            self._combine(coefficients[self._own])
            (predicted,) = self._comm.decide(lambda: [self._reduction(coefficients)])
        return predicted

    def _reduction(self, coefficients: np.ndarray) -> float:
        assert self._model is not None  # on rank 0
        return self._model.reduction(coefficients)


def _import_what_forward_mode_imports_late(segments: Sequence[nn.Module]) -> None:
    """Layers with rules in Python import for seconds at their first use: here on all ranks, not stage after stage."""
    if any(next(segment.parameters(), None) is not None and not is_bilinear(segment) for segment in segments):
        values = torch.ones(1, 2)
        jvp(lambda inputs: nn.functional.layer_norm(inputs, (2,)), (values,), (values,))
