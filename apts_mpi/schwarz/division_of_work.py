"""Which rank computes which part of the local solvers' directions, whatever the subdomains.

Where all ranks have the gradient and the statistics of all samples, and layers' directions know nothing of each other,
the work need not follow the subdomains: one layer may cost more than all others, and a team's ranks would all do the
same. So the flat vector is cut anew, within layers where that is possible, into parts of even work, as distributed
K-FAC shares out its layers (Pauloski et al., arXiv 2107.01739). A rank keeps the running means of the subdomains that
its part touches, and inverts the factors of the layers there.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from apts_mpi.local.solver import LocalSolver
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.shared_work import shared_work
from apts_mpi.options import APTSOptions


def can_be_divided(
    options: APTSOptions, kind: type[LocalSolver], decomposition: Decomposition, are_shared: bool
) -> bool:
    """Whether ranks can share the directions of ``kind``.

    All must have the statistics of all subdomains: ``are_shared``, or one team carries them. Not where a subdomain's
    ball needs the length of its whole direction, and where cuts follow the work themselves. A class has to say of
    itself that it divides work, as one made of it may take directions for whole ones.
    """
    is_known = are_shared or decomposition.teams.count == 1
    is_usual = options.noise == "batches" and options.schwarz.overlap == 0 and not options.schwarz.is_adaptive
    return is_known and is_usual and "divides_work" in vars(kind) and decomposition.comm.size > 1


def divide_work(
    decomposition: Decomposition, network: nn.Module, refresh: int, solvers: Mapping[int, LocalSolver]
) -> tuple[list[tuple[int, int]], dict[int, LocalSolver]]:
    """Have each rank compute a part of the directions, of even work.

    Parameters
    ----------
    decomposition, network, refresh
        The subdomains, the network, and iterations from one inverse to the next.
    solvers
        Those of all subdomains, on this rank.

    Returns
    -------
    list of (int, int)
        Range of the flat vector of each rank, the same on all.
    dict of int to LocalSolver
        Those of which this rank has a part.
    """
    kind = type(next(iter(solvers.values())))
    works = [kind.work(layer, network.get_submodule(layer.name), refresh) for layer in decomposition.layers]
    ranges = shared_work(works, decomposition.comm.size)
    start, stop = ranges[decomposition.comm.rank]
    touched = {}
    for part in decomposition.subdomains:
        first, last = max(start, part.start), min(stop, part.stop)
        solver, is_touched = solvers[part.index], first < last
        solver.own_part = slice(first - part.start, last - part.start) if is_touched else slice(0, 0)
        if is_touched:
            touched[part.index] = solver
    return ranges, touched
