"""APTS as an optimizer of torch: the user's own loop, network, loss and batches, and a `step`.

It may import `local`, `defaults` and what they may. Read `optimizer` first: the method on noisy batches, with nothing
but gradients; then `subdomains`, the layers and what they keep, and `calls`, what is recorded of them.
"""

from apts_mpi.optim.optimizer import APTS

__all__ = ["APTS"]
