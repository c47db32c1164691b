"""The curvature between columns, ``S^T J^T H J S``, where a rank has the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from apts_mpi.curvature.linearisation import Column, Linearisation
from apts_mpi.curvature.rows import GaussNewtonRows
from apts_mpi.objective.batch import Batch
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Pass
from apts_mpi.options import ENOUGH_TARGETS
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.reduced_model import ReducedModel
from apts_mpi.tools.trees import numbers_of_sample


class ReducedCurvature(Protocol):
    """Forms the reduced model of the columns of all ranks.

    Attributes
    ----------
    own : slice
        Which of all columns this rank has; known after the first model.
    """

    own: slice

    def total(self, own: int) -> int:
        """The sum over the ranks that have columns of their own; ``own`` where each has all of them. Collective."""

    def form(self, batch: Batch, columns: Sequence[Column], products: torch.Tensor) -> ReducedModel | None:
        """The model, on rank 0 alone. Collective.

        Parameters
        ----------
        batch
            The samples.
        columns
            Those of this rank.
        products : Tensor, shape (m + 1, m), float64
            Their inner products, and below them those with the gradient.
        """


# Numbers that tangents of the outputs have along a column, at most: as many as 512 targets have of 4,096 classes. With
# a vocabulary of 32,000 the curvature on 512 targets takes as long as eight gradients, and this as one.
MOST_OUTPUTS = 2**21


def share_of_samples(samples: float | None, batch: Batch, outputs: int = 1) -> float:
    """Share of a batch on which curvature is measured: that of the options, or one that holds enough targets.

    ``outputs`` is how many numbers the network returns for a sample; a share of the usual size has no more than
    ``MOST_OUTPUTS``.
    """
    if samples is not None:
        return samples
    enough = ENOUGH_TARGETS / (batch.size * numbers_of_sample(batch.passes[0].targets))
    return min(1.0, enough, MOST_OUTPUTS / (batch.size * outputs))


class TangentCurvature:
    """From tangents of all columns, on a share of each rank's samples.

    Parameters
    ----------
    objective
        The global objective.
    comm
        The ranks, which all have all columns.
    samples
        The share of the options.
    approximates
        See ``apts_mpi.curvature.linearisation.Linearisation``.
    """

    own = slice(None)

    def __init__(
        self, objective: Objective, comm: Communicator, samples: float | None, approximates: bool = False
    ) -> None:
        self._objective = objective
        self._linearisation = Linearisation(objective, approximates)
        self._comm = comm
        self._samples = samples
        self._tried = False

    def total(self, own: int) -> int:
        """See `ReducedCurvature`."""
        return own

    def form(self, batch: Batch, columns: Sequence[Column], products: torch.Tensor) -> ReducedModel | None:
        """See `ReducedCurvature`.

        Raises
        ------
        SharedInvalidInput
            The first time, where the network or the loss cannot be differentiated so.
        """
        if self._tried:
            curvature = self._of_passes(batch, columns)
        else:
            with self._comm.shared_errors():
                curvature = self._of_passes(batch, columns)
            self._tried = True
        count = len(columns)
        # The device is waited for once.
        found = torch.cat([curvature, products] if self._comm.rank == 0 else [curvature]).cpu().numpy()
        total = self._comm.sum_on_root(found[:count])
        return None if total is None else ReducedModel(found[-1], total, found[count:-1])

    def _of_passes(self, batch: Batch, columns: Sequence[Column]) -> torch.Tensor:
        """This rank's part, shape (m, m), float64."""
        count, device = len(columns), columns[0].values.device
        curvature = torch.zeros(count, count, dtype=torch.float64, device=device)
        share = share_of_samples(self._samples, batch, self._objective.outputs_of_sample)
        for part in batch.passes:
            thinned = part.thinned(share)
            for piece in [] if thinned is None else _divided(thinned, count):
                curvature += piece.weight * self._linearisation.reduced(piece, columns)
        return curvature


def _divided(part: Pass, columns: int) -> Sequence[Pass]:
    """The micro-batches of a pass along so many columns, each of which has tangents of the activations."""
    # Three at least: batch normalisation takes no statistics of a single sample.
    most = None if part.most is None else max(part.most // (1 + columns), 3)
    return replace(part, most=most).micro_batches()


class RowCurvature:
    """From the rows that dense Gauss-Newton has of each subdomain on the whole batch, without another pass.

    Parameters
    ----------
    rows
        Those of the Schwarz level at the present point, one a pass.
    comm
        The ranks, which all have all columns, and each the rows of its own subdomains.
    """

    own = slice(None)

    def __init__(self, rows: Callable[[], Sequence[GaussNewtonRows]], comm: Communicator) -> None:
        self._rows = rows
        self._comm = comm

    def total(self, own: int) -> int:
        """See `ReducedCurvature`."""
        return own

    def form(self, batch: Batch, columns: Sequence[Column], products: torch.Tensor) -> ReducedModel | None:
        """See `ReducedCurvature`."""
        root = self._comm.sum_on_root(_products_of_rows(batch, columns, self._rows()))
        if root is None:
            return None
        found = products.cpu().numpy()
        return ReducedModel(found[-1], root @ root.T, found[:-1])


def _products_of_rows(batch: Batch, columns: Sequence[Column], rows: Sequence[GaussNewtonRows]) -> np.ndarray:
    """This rank's parts of the columns times the rows of its samples.

    Summed over the ranks they are the square root of the curvature, shape (m, samples * outputs).
    """
    products = np.zeros((0, 0))
    for part, of_pass in zip(batch.passes, rows, strict=True):
        for number, column in enumerate(columns):
            for owned_start, owned_stop in sorted(of_pass.owned):
                start, stop = max(owned_start, column.start), min(owned_stop, column.stop)
                if start >= stop:
                    continue
                product = of_pass.of(start, stop) @ column.values[start - column.start : stop - column.start]
                outputs = len(product) // part.samples
                if products.size == 0:
                    products = np.zeros((len(columns), batch.size * outputs))
                place = slice(part.position * outputs, (part.position + part.samples) * outputs)
                # The rows are those of the mean over this rank's samples.
                products[number, place] += product.double().cpu().numpy() * math.sqrt(part.samples / batch.size)
    return products
