"""What local solvers make of the calls of layers in one micro-batch, so that the calls need not be kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from apts_mpi.local.solver import LocalSolver
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.objective.passes import Pass, Sums


class LayerSums:
    """Sums over the layers of the subdomains that a rank measures; see `apts_mpi.objective.passes.Summaries`.

    Parameters
    ----------
    solvers
        The local solvers by the numbers of their subdomains.
    carried
        One of them that solves on this rank: the others count no iterations.
    """

    def __init__(self, solvers: Mapping[int, LocalSolver], carried: LocalSolver) -> None:
        self._solvers, self._carried = solvers, carried

    @property
    def is_due(self) -> bool:
        """See `apts_mpi.objective.passes.Summaries`; the same for all solvers that solve."""
        return self._carried.is_due

    def sums(self, records: Sequence[LayerRecord], whole: Pass, first: int, last: int) -> Sums:
        """See `apts_mpi.objective.passes.Summaries`."""
        found: Sums = {}
        for subdomain in whole.subdomains:
            found |= self._solvers[subdomain.index].sums(records, whole.samples, (first, last))
        return found
