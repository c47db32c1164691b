"""Local solvers: what moves the parameters of one subdomain within its ball.

It may import `trust_region` and what that may. Read `solver` first: what a solver says of itself and is given; then
`objective`, what it minimises, and `gradient`, the simplest ones. `registry` has their names.
"""

from apts_mpi.local.objective import LocalObjective
from apts_mpi.local.solver import LocalSetting, LocalSolver, LocalState

__all__ = ["LocalObjective", "LocalSetting", "LocalSolver", "LocalState"]
