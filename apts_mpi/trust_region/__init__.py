"""The trust region: when a step is accepted, models of a step, and their minimisers in the ball.

It may import `curvature` and what that may. Read `acceptance` first: `judge` is the rule, written out. Then
`subproblem` and `models`; `inner_products` has what differs where ranks hold parts of a vector.
"""

from apts_mpi.trust_region.acceptance import judge
from apts_mpi.trust_region.subproblem import minimise_in_ball, steihaug

__all__ = ["judge", "minimise_in_ball", "steihaug"]
