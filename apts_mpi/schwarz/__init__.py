"""Additive Schwarz over the parameters, and the coarse level that recombines its corrections.

It may import `local` and what that may. Read `additive` first, then `coarse`; `coarse_space` has the columns,
`reduced_curvature` the curvature between them, `reduced_model` the small problem that is solved; `adaptive` moves the
cuts.
"""

from apts_mpi.curvature.linearisation import Column
from apts_mpi.schwarz.additive import AdditiveSchwarz
from apts_mpi.schwarz.coarse import CoarseLevel
from apts_mpi.schwarz.coarse_space import CoarseSpace, CoarseState

__all__ = ["AdditiveSchwarz", "CoarseLevel", "CoarseSpace", "CoarseState", "Column"]
