"""What the local objectives fall by, as the prediction of the plain sum of the corrections (arXiv 2502.05133)."""

from __future__ import annotations

import torch

from apts_mpi.local.objective import LocalObjective
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.parallel.parts import Parts


class LocalReductions:
    """The sum of the local reductions; with overlap an index counts as often as subdomains have it.

    Parameters
    ----------
    decomposition
        Who carries which subdomains.
    each
        What a reduction counts.
    """

    def __init__(self, decomposition: Decomposition, each: float) -> None:
        self._comm, self._leads, self._each = decomposition.comm, decomposition.leads, each
        self._own = 0.0

    def begin(self) -> None:
        """Begin anew."""
        self._own = 0.0

    def add(self, local: LocalObjective, displacement: torch.Tensor) -> None:
        """Add what a local objective falls by, where this rank speaks for its team. Collective over the team."""
        start = local.block.clone()
        local.block.add_(displacement)
        reduction = float(local.start_value - local.value())
        local.block.copy_(start)
        if self._leads:
            self._own += self._each * reduction

    def total(self) -> float:
        """Over all ranks. Collective."""
        return self._comm.combine(Parts(sums=[self._own]), lambda parts: parts.sums)[0]
