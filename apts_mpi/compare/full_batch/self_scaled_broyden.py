"""The self-scaled Broyden method on a dense inverse Hessian, with strong Wolfe conditions.

Urban, Stefanou and Pons (arXiv 2405.04230) brought Al-Baali's scaled updates to PINNs; Kiyani and others (arXiv
2501.16371) compared them. In their words, with s the step, y the change of the gradient and H the inverse Hessian:

    H <- (H - H y y^T H / y^T H y + phi (y^T H y) v v^T) / tau + s s^T / y^T s,  v = s / y^T s - H y / y^T H y

where phi is 1 of BFGS and 0 of DFP, and tau scales what is left of the old matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.lbfgs import _strong_wolfe

from apts_mpi.compare.full_batch.squares import Squares

# The least of a = (y^T H y) (s^T B s) / (y^T s)^2 - 1, which is above 0 but for rounding.
LEAST = 1e-14


class SelfScaledBroyden:
    """See the file.

    Parameters
    ----------
    squares
        What to minimise.

    Attributes
    ----------
    point : Tensor, (n,)
    loss : float
    """

    def __init__(self, squares: Squares) -> None:
        self._squares = squares
        self.point = squares.initial
        self.loss, self._gradient = squares.value_and_gradient(self.point)
        self._begin()

    def _begin(self) -> None:
        self._inverse, self._is_new = torch.eye(len(self.point), dtype=self.point.dtype), True

    def step(self, share: float) -> None:
        """One iteration; the ``share`` of the run behind it does not count."""
        direction = -(self._inverse @ self._gradient)
        slope = float(self._gradient @ direction)
        if not slope < 0.0:
            if not self._is_new:
                self._begin()
            return
        first = min(1.0, 1.0 / float(self._gradient.abs().sum())) if self._is_new else 1.0
        loss, gradient, length, _ = _strong_wolfe(
            lambda point, length, direction: self._squares.value_and_gradient(point + length * direction),
            *(self.point, first, direction, self.loss, self._gradient, slope),
            tolerance_change=1e-16,
        )
        if not loss < self.loss:
            self._begin()
            return
        step, change = length * direction, gradient - self._gradient
        # s^T B s, which needs no B, as s is -length H g.
        curved = -length * float(step @ self._gradient)
        if float(step @ change) > 0.0:
            self._update(step, change, curved)
        self.point, self.loss, self._gradient = self.point + step, loss, gradient

    def _update(self, step: Tensor, change: Tensor, curved: float) -> None:
        product = self._inverse @ change
        along, across = float(step @ change), float(change @ product)
        phi, tau = scaling(across / along, curved / along, len(step), self._is_new)
        v = step / along - product / across
        left = torch.stack([-product / (across * tau), v * (phi * across / tau), step / along], dim=1)
        # One pass over the matrix.
        torch.addmm(self._inverse, left, torch.stack([product, v, step]), beta=1.0 / tau, out=self._inverse)
        self._is_new = False


def scaling(h: float, b: float, size: int, is_new: bool) -> tuple[float, float]:
    """The member phi of Broyden's family and the scale tau, formulas 13 to 23 of arXiv 2405.04230.

    Parameters
    ----------
    h, b
        ``y^T H y / y^T s`` and ``s^T B s / y^T s``.
    size
        Number of parameters.
    is_new
        Whether H is the identity, which is scaled anew.
    """
    a = max(h * b - 1.0, LEAST)
    rho = min(1.0, h * (1.0 - math.sqrt(a / (1.0 + a))))
    theta = max((rho - 1.0) / a, min(1.0 / rho, (1.0 - b) / b))
    sigma = 1.0 + theta * a
    if is_new:
        tau = h / sigma
    else:
        root, bound = sigma ** (1.0 / (1.0 - size)), min(1.0, 1.0 / b)
        tau = min(bound * root, sigma) if theta <= 0.0 else bound * min(root, 1.0 / theta)
    return (1.0 - theta) / sigma, tau
