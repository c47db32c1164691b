"""The curvature between columns of a staged network: tangents travel with the activations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.func import jvp

from apts_mpi.curvature.linearisation import Column, Linearisation, is_bilinear
from apts_mpi.network.activations import Bundle, with_tangents, without_tangents
from apts_mpi.objective.batch import Batch
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.reduced_curvature import share_of_samples
from apts_mpi.schwarz.reduced_model import ReducedModel
from apts_mpi.staged.objective import StagedObjective
from apts_mpi.staged.schedules import forwards


class StageCurvature:
    """See `apts_mpi.schwarz.reduced_curvature.ReducedCurvature`; each rank has the columns of its own stage.

    Parameters
    ----------
    objective
        The stage, and the pipeline.
    comm
        All ranks.
    leads
        Whether this rank speaks for its stage, as one of the replicas.
    samples
        Share of the samples in the options.
    approximates
        See `apts_mpi.curvature.linearisation.Linearisation`.
    """

    own = slice(0)

    def __init__(
        self,
        objective: StagedObjective,
        comm: Communicator,
        leads: bool,
        samples: float | None,
        approximates: bool = False,
    ) -> None:
        self._linearisation = Linearisation(objective, approximates)
        _import_what_forward_mode_imports_late(objective.segmented.segments)
        self._objective = objective
        self._pipeline = objective.pipeline
        self._comm = comm
        self._leads = leads
        self._samples = samples

    def total(self, own: int) -> int:
        """See `apts_mpi.schwarz.reduced_curvature.ReducedCurvature`."""
        return sum(self._pipeline.comm.numbers(own))

    def form(self, batch: Batch, columns: Sequence[Column], products: torch.Tensor) -> ReducedModel | None:
        """See `apts_mpi.schwarz.reduced_curvature.ReducedCurvature`."""
        counts = self._pipeline.comm.numbers(len(columns))
        start, count = sum(counts[: self._pipeline.stage]), sum(counts)
        self.own = own = slice(start, start + len(columns))
        # Curvature, inner products and slope in one message.
        packed = np.zeros((2 * count + 1, count))
        packed[:count] = self._of_batch(batch, columns, count)
        if self._leads:
            found = products.cpu().numpy()
            packed[count : 2 * count][own, own] = found[:-1]
            packed[2 * count, own] = found[-1]
        total = self._comm.sum_on_root(packed)
        return None if total is None else ReducedModel(total[2 * count], total[:count], total[count : 2 * count])

    def _of_batch(self, batch: Batch, columns: Sequence[Column], count: int) -> np.ndarray:
        """``S^T J^T H J S`` of this replica's samples on the last stage, zero on the others. Collective."""
        share = share_of_samples(self._samples, batch)
        parts = [part for part in (part.thinned(share) for part in batch.passes) if part is not None]
        device = self._objective.vector.values.device
        curvature = torch.zeros(count, count, dtype=torch.float64, device=device)

        def forward(index: int, entering: Bundle | None) -> Bundle:
            part = parts[index]
            activations: Bundle = part.inputs
            carried: tuple[torch.Tensor, ...] = ()
            if entering is not None:
                activations, carried = without_tangents(entering, self._objective.enters_tuple)
            with self._linearisation.drawing(part):
                joined = self._joined(carried, columns)
                outputs, tangents = self._linearisation.tangents(activations, joined, carried)
            if self._pipeline.is_last:
                reduced = self._linearisation.between(outputs, part.targets, tangents)
                curvature.add_(reduced, alpha=part.weight)
            return with_tangents(outputs, tangents)

        # A key of its own: tuples of activations and tangents have other shapes than activations.
        keys = [("tangents", count, part.samples) for part in parts]
        self._pipeline.run(forwards(len(parts)), keys, forward)
        return curvature.cpu().numpy()

    def _joined(self, tangents: tuple[torch.Tensor, ...], columns: Sequence[Column]) -> list[Column]:
        """A column without parameters here for each tangent that comes from the stages before, then the own ones."""
        nothing = self._objective.vector.values[:0]
        return [Column(0, 0, nothing)] * (len(tangents[0]) if tangents else 0) + list(columns)


def _import_what_forward_mode_imports_late(segments: Sequence[nn.Module]) -> None:
    """Layers with rules in Python import for seconds at their first use: here on all ranks, not stage after stage."""
    if any(next(segment.parameters(), None) is not None and not is_bilinear(segment) for segment in segments):
        values = torch.ones(1, 2)
        jvp(lambda inputs: nn.functional.layer_norm(inputs, (2,)), (values,), (values,))
