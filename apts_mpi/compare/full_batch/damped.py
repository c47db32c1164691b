"""Damped least squares with a dense Jacobian, in the smaller of its two forms."""

from __future__ import annotations

import torch
from torch import Tensor


class DampedLeastSquares:
    """Solutions of ``min |J x - b|^2 + damping |x|^2`` of one Jacobian for any right-hand side and damping.

    Where rows are fewer than columns, ``x = J^T (J J^T + damping I)^-1 b``, the kernel form; else the normal equations.

    Parameters
    ----------
    jacobian : Tensor, (m, n)
    """

    def __init__(self, jacobian: Tensor) -> None:
        self._jacobian = jacobian
        rows, columns = jacobian.shape
        self._by_rows = rows <= columns
        self._matrix = jacobian @ jacobian.T if self._by_rows else jacobian.T @ jacobian

    @property
    def scale(self) -> float:
        """The largest diagonal element of the matrix."""
        return float(self._matrix.diagonal().max())

    def solve(self, right: Tensor, damping: float) -> Tensor | None:
        """The minimiser x, (n,), for b = ``right``, (m,); None where rounding leaves no definite matrix."""
        matrix = self._matrix.clone()
        matrix.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed:
            return None
        right = right if self._by_rows else self._jacobian.T @ right
        solution = torch.cholesky_solve(right[:, None], factor)[:, 0]
        return self._jacobian.T @ solution if self._by_rows else solution
