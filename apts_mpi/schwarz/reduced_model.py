"""The model of a step in the span of a few columns, and its minimiser in the ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from apts_mpi.trust_region.subproblem import minimise_in_ball

# Columns whose part outside the span of the others is below this share of their length are dropped.
DEPENDENT = 1e-6

# Least curvature in the scaled norm, relative to the largest.
TRACE = 1e-6


@dataclass(frozen=True)
class ReducedModel:
    """``slope . a + 1/2 a . curvature a`` for the coefficients a of m columns; ``gram`` are their inner products."""

    slope: np.ndarray
    curvature: np.ndarray
    gram: np.ndarray

    @property
    def is_finite(self) -> bool:
        """Whether slope, curvature and inner products are numbers."""
        return all(bool(np.isfinite(part).all()) for part in (self.slope, self.curvature, self.gram))

    def reduction(self, coefficients: np.ndarray) -> float:
        """Predicted reduction of a step."""
        return -float(self.slope @ coefficients + 0.5 * coefficients @ self.curvature @ coefficients)

    def minimise(self, radius: float, damping: float, kind: Literal["2", "scaled"]) -> np.ndarray:
        """Coefficients of the minimiser of the damped model in the ball ``|S a| <= radius``, shape (m,).

        Solves ``(C + damping s D + mu D) a = -slope`` for the least mu >= 0 that leads into the ball. In the 2-norm
        D = S^T S and s is the largest eigenvalue of ``D^-1 C``; in the scaled norm D is the diagonal of C and s = 1,
        which is Marquardt's method (doi 10.1137/0111030) and needs a positive definite matrix: without one, the 2-norm
        is taken. Neither damps a model without curvature, which ends at the ball.
        """
        basis = orthonormal_coefficients(self.gram)
        if basis.shape[1] == 0:
            return np.zeros(len(self.slope))
        if kind == "scaled" and np.diag(self.curvature).max() > 0.0:
            lengths = np.linalg.inv(np.linalg.qr(self._scales()[:, None] * basis, mode="r"))
            scaled = basis @ lengths
            damped = self._curvature_along(scaled) + damping * np.eye(len(lengths))
            if np.linalg.eigvalsh(damped)[0] > 0.0:
                return scaled @ minimise_in_ball(damped, scaled.T @ self.slope, radius, lengths)
        curvature = self._curvature_along(basis)
        largest = max(np.linalg.eigvalsh(curvature)[-1], 0.0)
        damped = curvature + damping * largest * np.eye(len(curvature))
        return basis @ minimise_in_ball(damped, basis.T @ self.slope, radius)

    def _curvature_along(self, basis: np.ndarray) -> np.ndarray:
        curvature = basis.T @ self.curvature @ basis
        return 0.5 * (curvature + curvature.T)

    def _scales(self) -> np.ndarray:
        """Square roots of the diagonal of D in the scaled norm.

        A column without curvature gets a trace of that of the others, of the same length: it is not to be lost, and
        with little damping the ball alone ends its way.
        """
        squares = np.clip(np.diag(self.gram), 0.0, None)
        curvatures = np.clip(np.diag(self.curvature), 0.0, None)
        relative = np.divide(curvatures, squares, out=np.zeros_like(squares), where=squares > 0.0)
        # Zero columns are not in the basis.
        return np.sqrt(np.maximum(relative, TRACE * relative.max()) * squares)


def orthonormal_coefficients(gram: np.ndarray) -> np.ndarray:
    """Coefficients of an orthonormal basis of the columns with this Gram matrix, shape (m, rank).

    Zero and nearly dependent columns are left out.
    """
    lengths = np.sqrt(np.clip(np.diag(gram), 0.0, None))
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0.0)
    values, vectors = np.linalg.eigh(gram * scale[:, None] * scale)
    kept = values > DEPENDENT
    return scale[:, None] * vectors[:, kept] / np.sqrt(values[kept])
