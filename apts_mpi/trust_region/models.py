"""Quadratic models of an objective: limited-memory SR1, and one of which only products are known.

A model is ``m(s) = g . s + 1/2 s . B s`` for a gradient g that the caller has; ``predict`` returns ``-m(s)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from apts_mpi.curvature.products import Product
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.norms import Dots, dots
from apts_mpi.trust_region.same_function import USUAL, Limits
from apts_mpi.trust_region.subproblem import minimise_in_ball, steihaug

# Pairs that an L-SR1 model remembers.
PAIRS = 5

# A pair is left out where the denominator of its update is below this share of its factors (Nocedal and Wright,
# Numerical Optimization, 6.26).
SKIP = 1e-8


class Model(Protocol):
    """A quadratic model."""

    def minimise(self, gradient: torch.Tensor, radius: float) -> torch.Tensor:
        """Step in the 2-norm ball of ``radius`` that makes the model small, shape (n,)."""

    def predict(self, gradient: torch.Tensor, step: torch.Tensor) -> float:
        """Reduction that the model predicts for ``step``."""


class LSR1:
    """Limited-memory symmetric rank-one model, minimised exactly in the ball.

    ``B = gamma I + Psi M^-1 Psi^T`` with ``Psi = Y - gamma S`` and ``M = D + L + L^T - gamma S^T S``, where D and L are
    the diagonal and the strictly lower triangle of ``S^T Y`` (Brust, Erway and Marcia, arXiv 1506.07222, section 2).
    gamma is y . y / s . y of the newest pair, the larger Barzilai-Borwein value, or ``|y| / |s|`` where s . y is not
    positive; the lowest eigenvalue of an indefinite B thus belongs to an eigenvector in the span of Psi. Without a pair
    B is zero.

    Parameters
    ----------
    pairs
        Pairs that are remembered: 3 ``pairs`` vectors with Psi, and as many again while a step is looked for.
    inner
        Inner products; where ranks hold parts of the vectors, all methods but `restore` are collective over the parts.
        None: this rank holds all.

    Attributes
    ----------
    steps, changes : list of Tensor, shape (n,)
        The pairs (s, y), oldest first: steps and the changes of the gradient over them.
    gamma : float
        Curvature outside the span.
    """

    def __init__(self, pairs: int = PAIRS, inner: InnerProducts | None = None) -> None:
        self._pairs = pairs
        self._inner = inner or InnerProducts("2")
        self.steps: list[torch.Tensor] = []
        self.changes: list[torch.Tensor] = []
        self.gamma = 0.0
        self._formed: tuple[torch.Tensor, np.ndarray] | None = None

    def update(self, step: torch.Tensor, change: torch.Tensor) -> None:
        """Take in a pair, unless it is not finite or makes the update of B undefined."""
        if self._inner.sum(np.array([float(not _finite(step, change))])) or not self._admits(step, change):
            return
        pairs = [*zip(self.steps, self.changes, strict=True), (step.clone(), change.clone())]
        self.gamma = self._scale(step, change)
        self.restore([], [], self.gamma)
        # With another gamma, or without the oldest pair, an update that was defined before may not be.
        for pair in pairs[-self._pairs :]:
            if self._admits(*pair):
                self.restore([*self.steps, pair[0]], [*self.changes, pair[1]], self.gamma)

    def restore(self, steps: Sequence[torch.Tensor], changes: Sequence[torch.Tensor], gamma: float) -> None:
        """Take over the pairs and the scale of another model."""
        self.steps, self.changes, self.gamma = list(steps), list(changes), gamma
        self._formed = None

    def _admits(self, step: torch.Tensor, change: torch.Tensor) -> bool:
        residual = change - self.product(step)
        (product,) = self._inner.dots((step, residual))
        step_length, length, change_length = self._inner.euclidean_norms(step, residual, change)
        # B already explains a change from which nothing but rounding is left.
        rounding = torch.finfo(step.dtype).eps ** 0.5 * change_length
        return step_length > 0.0 and length > rounding and abs(product) >= SKIP * step_length * length

    def _scale(self, step: torch.Tensor, change: torch.Tensor) -> float:
        """The curvature outside the span of the pairs, from the newest one."""
        along, square = self._inner.dots((step, change), (change, change))
        return square / along if along > 0.0 else square**0.5 / self._inner.euclidean_norms(step)[0]

    def _form(self) -> tuple[torch.Tensor, np.ndarray]:
        """Psi and the inverse of M; pairs that no update has admitted, as a file may hold them, are dropped."""
        if self._formed is None:
            steps, changes = torch.stack(self.steps, dim=1), torch.stack(self.changes, dim=1)
            own = torch.stack([steps.T @ changes, steps.T @ steps]).double().cpu().numpy()
            products, squares = self._inner.sum(own)
            with np.errstate(all="ignore"):
                lower = np.tril(products, -1)
                inverse = _inverse(np.diag(np.diag(products)) + lower + lower.T - self.gamma * squares)
            if inverse is None:
                self.restore([], [], self.gamma)
                return changes[:, :0], np.zeros((0, 0))
            self._formed = changes - self.gamma * steps, inverse
        return self._formed

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """B times ``vector``, shape (n,)."""
        if not self.steps:
            return self.gamma * vector
        psi, inverse = self._form()
        coefficients = torch.from_numpy(inverse).to(vector) @ self._inner.of_columns(psi, vector)
        return self.gamma * vector + psi @ coefficients

    def predict(self, gradient: torch.Tensor, step: torch.Tensor) -> float:
        """See `Model`."""
        return _predict(gradient, step, self.product(step), self._inner.dots)

    def minimise(self, gradient: torch.Tensor, radius: float) -> torch.Tensor:
        """Minimiser in the ball, shape (n,); waits for the device.

        In an orthonormal eigenbasis of ``Psi M^-1 Psi^T``, from a thin QR decomposition of Psi, and the part of the
        gradient that is orthogonal to it, B is diagonal and the problem has at most ``pairs`` + 1 unknowns (Brust,
        Erway and Marcia, section 3).
        """
        basis, values = self._eigenbasis(gradient)
        inside = self._inner.of_columns(basis, gradient)
        outside = gradient - basis @ inside
        slope = np.append(inside.double().cpu().numpy(), self._inner.euclidean_norms(outside))
        if not np.isfinite(slope).all():
            return torch.full_like(gradient, torch.nan)
        solution = minimise_in_ball(np.diag([*values, self.gamma]), slope, radius)
        share = solution[-1] / slope[-1] if slope[-1] > 0.0 else 0.0
        return basis @ torch.from_numpy(solution[:-1]).to(gradient) + share * outside

    def _eigenbasis(self, like: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """Orthonormal eigenvectors of B that span Psi, shape (n, k), and their eigenvalues."""
        psi, inverse = self._form() if self.steps else (like.new_zeros(len(like), 0), np.zeros((0, 0)))
        if not self.steps:
            return psi, np.zeros(0)
        orthonormal, root = self._inner.orthonormalise(psi)
        values, vectors = np.linalg.eigh(root @ inverse @ root.T)
        return orthonormal @ torch.from_numpy(vectors).to(like), values + self.gamma


class ProductModel:
    """A model of which only products with B are known, minimised by Steihaug-CG.

    Parameters
    ----------
    product
        B times a vector.
    preconditioner
        Approximate inverse of B times a vector; None is the identity.
    agree, dots
        See `apts_mpi.trust_region.subproblem.steihaug`.
    limits
        How accurately it is minimised.
    """

    def __init__(
        self,
        product: Product,
        preconditioner: Product | None = None,
        agree: Callable[[bool], bool] = bool,
        dots: Dots = dots,
        limits: Limits = USUAL,
    ) -> None:
        self._limits = limits
        self._product = product
        self._preconditioner = preconditioner
        self._agree = agree
        self._dots = dots

    def minimise(self, gradient: torch.Tensor, radius: float) -> torch.Tensor:
        """See `Model`; collective where the product is."""
        tolerance, products = self._limits.tolerance, self._limits.products
        # Rounding leaves no smaller residual.
        tolerance = max(tolerance, torch.finfo(gradient.dtype).eps ** 0.5)
        parts = self._preconditioner, self._agree, self._dots
        return steihaug(self._product, gradient, radius, tolerance, products, *parts)[0]

    def predict(self, gradient: torch.Tensor, step: torch.Tensor) -> float:
        """See `Model`; collective where the product is."""
        return _predict(gradient, step, self._product(step), self._dots)


def _predict(gradient: torch.Tensor, step: torch.Tensor, curved: torch.Tensor, dots: Dots) -> float:
    slope, curvature = dots((gradient, step), (step, curved))
    return -(slope + 0.5 * curvature)


def _inverse(matrix: np.ndarray) -> np.ndarray | None:
    """The inverse; None if there is none, or it is not finite."""
    if not np.isfinite(matrix).all():
        return None
    try:
        inverse = np.linalg.inv(matrix)
    except np.linalg.LinAlgError:
        return None
    return inverse if np.isfinite(inverse).all() else None


def _finite(*vectors: torch.Tensor) -> bool:
    return all(bool(vector.isfinite().all()) for vector in vectors)
