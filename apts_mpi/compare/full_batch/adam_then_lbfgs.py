"""Adam, and L-BFGS from where it came to: how PINNs are mostly trained."""

from __future__ import annotations

import torch
from torch.optim import LBFGS, Adam

from apts_mpi.compare.full_batch.squares import Squares

# Of the run, with Adam.
FIRST = 0.2

# Iterations of L-BFGS in a step, and pairs that it keeps.
INNER, PAIRS = 10, 100


class AdamThenLBFGS:
    """Both are torch's; L-BFGS has strong Wolfe conditions, 100 pairs and no tolerance at which it would end.

    Parameters
    ----------
    squares
        What to minimise.
    learning_rate
        Of Adam.

    Attributes
    ----------
    point : Tensor, (n,)
    """

    def __init__(self, squares: Squares, learning_rate: float) -> None:
        self._squares = squares
        self._weights = squares.initial.clone().requires_grad_()
        self._adam = Adam([self._weights], lr=learning_rate)
        self._lbfgs = LBFGS(
            [self._weights],
            max_iter=INNER,
            history_size=PAIRS,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

    @property
    def point(self) -> torch.Tensor:
        """The weights as they are."""
        return self._weights.detach()

    def step(self, share: float) -> None:
        """An iteration of Adam or, with the first fifth of the run behind it, ten of L-BFGS."""
        optimizer = self._adam if share < FIRST else self._lbfgs
        optimizer.step(self._evaluate)

    def _evaluate(self) -> float:
        loss, self._weights.grad = self._squares.value_and_gradient(self._weights)
        return loss
