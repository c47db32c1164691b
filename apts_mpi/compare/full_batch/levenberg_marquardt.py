"""The method of Levenberg and Marquardt with a dense Jacobian; the damping follows Nielsen (IMM-REP-1999-05)."""

from __future__ import annotations

from apts_mpi.compare.full_batch.damped import DampedLeastSquares
from apts_mpi.compare.full_batch.squares import Squares

# Tries at other dampings with one Jacobian: from there on rounding decides.
TRIES = 30


class LevenbergMarquardt:
    """Steps ``d = argmin |J d + r|^2 + damping |d|^2``, the damping by how well they are predicted.

    Parameters
    ----------
    squares
        What to minimise.
    first
        The initial damping, of the largest diagonal element of the matrix.

    Attributes
    ----------
    point : Tensor, (n,)
    loss : float
    """

    def __init__(self, squares: Squares, first: float) -> None:
        self._squares = squares
        self._first = first
        self._damping: float | None = None
        self._growth = 2.0
        self.point = squares.initial
        self.loss = squares.loss(self.point)

    def step(self, share: float) -> None:
        """One iteration, which has one Jacobian; the ``share`` of the run behind it does not count."""
        residuals, jacobian = self._squares.rows(self.point)
        least_squares = DampedLeastSquares(jacobian)
        if self._damping is None:
            self._damping = self._first * least_squares.scale
        for _ in range(TRIES):
            step = least_squares.solve(-residuals, self._damping)
            if step is not None:
                loss = self._squares.loss(self.point + step)
                predicted = self.loss - float((residuals + jacobian @ step).square().sum()) / 2.0
                if loss < self.loss and predicted > 0.0:
                    ratio = (self.loss - loss) / predicted
                    self._damping *= max(1.0 / 3.0, 1.0 - (2.0 * ratio - 1.0) ** 3)
                    self._growth = 2.0
                    self.point, self.loss = self.point + step, loss
                    return
            self._damping *= self._growth
            self._growth *= 2.0
        # No step goes down in rounding: the next Jacobian is the same, and so is the damping that it begins with.
        self._damping, self._growth = self._first * least_squares.scale, 2.0
