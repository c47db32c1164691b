"""The local solvers by name: those of the package are named as those of the user's are, by module and class."""

from __future__ import annotations

import importlib

from apts_mpi.local.solver import LocalSolver
from apts_mpi.options import LocalOptions
from apts_mpi.tools.user_code import class_of

SOLVERS = {
    "kfac": "apts_mpi.local.kfac:KFAC",
    "muon": "apts_mpi.local.muon:Muon",
    "gauss-newton": "apts_mpi.local.gauss_newton:GaussNewton",
    "tr": "apts_mpi.local.gradient:FirstOrderTrustRegion",
    "lsr1": "apts_mpi.local.trust_region:LSR1TrustRegion",
    "steihaug": "apts_mpi.local.trust_region:SteihaugTrustRegion",
    "sgd": "apts_mpi.local.gradient:SteepestDescent",
    "adam": "apts_mpi.local.gradient:Adam",
}


def solver_class(name: str) -> type[LocalSolver]:
    """The local solver called ``name``, or ``MODULE:CLASS``.

    Raises
    ------
    InvalidInput
        For a class that cannot be imported, or is no `apts_mpi.local.LocalSolver`.
    """
    if name not in SOLVERS:
        return class_of("local.solver", name, LocalSolver)
    module, _, kind = SOLVERS[name].partition(":")
    return getattr(importlib.import_module(module), kind)


def needs_evaluations(options: LocalOptions) -> bool:
    """Whether the solver evaluates the local objective beyond the global gradient at theta_k."""
    return solver_class(options.solver).evaluates or options.iterations > 1
