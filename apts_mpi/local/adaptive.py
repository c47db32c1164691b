"""Which local solvers go with cuts that move."""

from __future__ import annotations

from apts_mpi.errors import InvalidInput
from apts_mpi.local.solver import LocalSolver
from apts_mpi.options import APTSOptions


def check_adaptive(options: APTSOptions, name: str, solver: type[LocalSolver]) -> None:
    """Refuse a partition whose cuts move where nothing depends on them, or what was learnt cannot follow them.

    Parameters
    ----------
    options
        Of the whole solver, with the model of the coarse level.
    name, solver
        Of the local solver.

    Raises
    ------
    InvalidInput
        Naming the option and another choice.
    """
    partition = options.schwarz.partition
    if not options.schwarz.is_adaptive:
        return
    if options.coarse.model == "residual":
        raise InvalidInput(
            f"schwarz.partition: {partition!r} is for local solves, and coarse.model residual makes none; choose "
            "layer, or --coarse gauss-newton"
        )
    if not solver.divisible:
        raise InvalidInput(
            f"schwarz.partition: {partition!r} moves layers between subdomains, and what {name!r} has learnt belongs "
            "to one of them; choose layer, or another local solver"
        )
