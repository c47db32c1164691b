"""The global step, preconditioned by the Schwarz level."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apts_mpi.curvature.products import Product
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Pass
from apts_mpi.options import GlobalStepOptions
from apts_mpi.schwarz.additive import AdditiveSchwarz
from apts_mpi.trust_region.global_step import GlobalStep
from apts_mpi.trust_region.inner_products import InnerProducts


def make_global_step(
    options: GlobalStepOptions,
    schwarz: AdditiveSchwarz,
    objective: Objective,
    inner: InnerProducts,
    products_of_rank: Callable[[Sequence[Pass]], Product],
) -> GlobalStep | None:
    """The global step of the options, preconditioned by the Schwarz level where that can; see `GlobalStep`."""
    if options.model == "none":
        return None
    return GlobalStep(
        options,
        objective=objective,
        preconditioner=schwarz if schwarz.preconditions else None,
        comm=schwarz.decomposition.comm,
        inner=inner,
        products_of_rank=products_of_rank,
    )
