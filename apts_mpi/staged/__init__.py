"""What differs where each rank holds a stage of the network: a pipeline of micro-batches, and what travels it.

It may import `apts` and all before it. Read `holding` first: what a rank holds, and what it gives to the loop; then
`objective` and `pipeline`. `stages` cuts a network, `build` makes one of which a rank has its stage alone.
"""

from apts_mpi.staged.build import build_stage
from apts_mpi.staged.solver import StagedAPTS

__all__ = ["StagedAPTS", "build_stage"]
