"""Losses that return a sum and what it is to be divided by, so that their mean over all samples is exact.

It may import errors. Read ``values`` first: the losses, each a small value that is called with outputs and targets;
``known`` says which losses of torch are taken for one of them.
"""

from apts_mpi.losses.known import exact, is_exact
from apts_mpi.losses.values import Counted, Pair, binary_cross_entropy_with_logits, cross_entropy, huber, l1, mse

__all__ = [
    "Counted",
    "Pair",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "exact",
    "huber",
    "is_exact",
    "l1",
    "mse",
]
