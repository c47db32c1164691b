"""SPRING: Gauss-Newton in its kernel form, with momentum and a line search.

Goldshlager, Abrahamsen and Lin (arXiv 2401.10190); for PINNs, as ENGD-W with momentum, arXiv 2505.12149. The step is
the damped least-squares solution that is nearest to ``momentum * last step``:

    d = phi - J^T (J J^T + damping I)^-1 (r + J phi),  phi = momentum * last step
"""

from __future__ import annotations

import torch

from apts_mpi.compare.full_batch.damped import DampedLeastSquares
from apts_mpi.compare.full_batch.line_search import search_by_halves
from apts_mpi.compare.full_batch.squares import Squares

# By how much the damping is raised for a step whose matrix is not positive definite in rounding, or that goes nowhere.
RAISE = 10.0


class Spring:
    """See the file; the step length is the best of halves, and the momentum that of the steps taken.

    Parameters
    ----------
    squares
        What to minimise.
    damping
        Added to the kernel matrix, whose residuals are those of ``loss = |r|^2 / 2``.
    momentum
        Of the last step.

    Attributes
    ----------
    point : Tensor, (n,)
    loss : float
    """

    def __init__(self, squares: Squares, damping: float, momentum: float = 0.9) -> None:
        self._squares = squares
        self._damping, self._momentum = damping, momentum
        self.point = squares.initial
        self.loss = squares.loss(self.point)
        self._last = torch.zeros_like(self.point)

    def step(self, share: float) -> None:
        """One iteration; the ``share`` of the run behind it does not count."""
        residuals, jacobian = self._squares.rows(self.point)
        least_squares = DampedLeastSquares(jacobian)
        phi = self._momentum * self._last
        right = -residuals - jacobian @ phi
        damping = self._damping
        while (correction := least_squares.solve(right, damping)) is None:
            damping *= RAISE
        direction = phi + correction
        length, self.loss = search_by_halves(
            lambda length: self._squares.loss(self.point + length * direction), self.loss
        )
        if length == 0.0 and not self._last.any():
            self._damping = RAISE * damping
        self._last = length * direction
        self.point = self.point + self._last
