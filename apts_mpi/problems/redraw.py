"""Training samples that a problem can draw anew, such as the points where a differential equation is to hold."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from apts_mpi.tools.trees import Tree


@dataclass(frozen=True)
class Redraw:
    """Draws samples that take the place of others.

    Parameters
    ----------
    draw : callable
        ``draw(generator, count)`` returns inputs and targets of ``count`` samples, made with no other random numbers
        than those of the ``torch.Generator``: of dtypes, and shapes of a sample, that ``Problem.train`` has. Any number
        may be asked for. The network's dtype is torch's default meanwhile.
    rows : Tensor of int64, shape (m,), optional
        Numbers of the training samples whose places they take; None: of all.
    """

    draw: Callable[[torch.Generator, int], tuple[Tree, Tree]]
    rows: torch.Tensor | None = None
