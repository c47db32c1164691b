"""Norms and inner products of vectors of which every rank holds all, or a part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.parts import Parts
from apts_mpi.tools.trees import Tree
from apts_mpi.trust_region.norms import NormKind, clip_to_ball, dots, euclidean_radius, norm, steepest_descent


class Metric(Protocol):
    """A second bound of all steps, which `apts_mpi.trust_region.metric.FisherMetric` is."""

    def remember(self, inputs: Tree, targets: Tree) -> None:
        """Take in a task that ends at the present parameters, by its samples. Collective."""

    def within(
        self, point: torch.Tensor, gradient: torch.Tensor, step: torch.Tensor, predicted: float | None
    ) -> tuple[torch.Tensor, float | None]:
        """A step from ``point`` within the bound, no longer than ``step``, and its predicted reduction. Collective."""


class InnerProducts:
    """Inner products over all parameters, and the norm of the ball.

    All ranks get the same bits, as rank 0 puts the parts together.

    Parameters
    ----------
    kind
        Norm of the ball.
    comm
        The ranks, where each holds a part of a vector; None where every rank holds all of it, which needs no message.
    rows
        Ranks that hold one part each, in the order of the parts; those behind one hold copies of its part.

    Attributes
    ----------
    kind : str
        As given.
    spread : bool
        Whether ranks hold parts.
    metric : Metric or None
        A second bound of all steps.
    """

    def __init__(self, kind: NormKind, comm: Communicator | None = None, rows: Sequence[int] = (0,)) -> None:
        self.kind = kind
        self.spread = comm is not None
        self.metric: Metric | None = None
        self._comm = comm
        self._rows = list(rows)

    def own(self, gradient: torch.Tensor, step: torch.Tensor) -> list[torch.Tensor]:
        """This rank's part of inner product, length of the step and of the gradient, float64 of shape ()."""
        # In float64, as the squares of a small gradient in float32 are zero.
        length = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        return [torch.dot(gradient, step).double(), norm(step, self.kind).double(), length]

    def within(
        self, point: torch.Tensor, gradient: torch.Tensor, step: torch.Tensor, predicted: float | None
    ) -> tuple[torch.Tensor, float | None]:
        """The step and its predicted reduction, within the bound of the metric where there is one. Collective."""
        return (step, predicted) if self.metric is None else self.metric.within(point, gradient, step, predicted)

    def leads(self, rank: int) -> bool:
        """Whether what a rank holds counts: copies of a part count once."""
        return rank in self._rows

    def sum(self, own: np.ndarray) -> np.ndarray:
        """Sum over the parts of an array of float64 numbers. Collective over the parts."""
        if self._comm is None:
            return own
        mine = own.ravel() if self.leads(self._comm.rank) else np.zeros(own.size)
        return np.array(self._comm.combine(Parts(sums=mine.tolist()), lambda parts: parts.sums)).reshape(own.shape)

    def is_direction(self, vector: torch.Tensor) -> bool:
        """Whether a vector is finite, and not zero. Collective over the parts."""
        low, high = torch.stack(torch.aminmax(vector)).tolist()
        finite = math.isfinite(low) and math.isfinite(high)
        infinite_parts, parts = self.sum(np.array([not finite, low != 0.0 or high != 0.0], dtype=np.float64))
        return bool(infinite_parts == 0.0 and parts > 0.0)

    def norm(self, vector: torch.Tensor) -> float:
        """Norm of the ball. Collective over the parts."""
        own = float(norm(vector, self.kind))
        if self._comm is None:
            return own
        if self.kind == "2":
            return self._join([own])[0]
        return self._comm.combine(Parts(largest=[own]), lambda parts: parts.largest)[0]

    def euclidean_norms(self, *vectors: torch.Tensor) -> tuple[float, ...]:
        """2-norms. Collective over the parts."""
        own = torch.stack([norm(vector, "2") for vector in vectors]).tolist()
        if self._comm is None:
            return tuple(own)
        return self._join(own)

    def _join(self, own: Sequence[float]) -> tuple[float, ...]:
        """2-norms of vectors from those of their parts. Collective over them."""
        assert self._comm is not None  # there are parts
        mine = own if self.leads(self._comm.rank) else [0.0] * len(own)
        return self._comm.combine(Parts(norms=mine), lambda parts: parts.norms)

    def dots(self, *pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, ...]:
        """Inner products of pairs of vectors. Collective over the parts."""
        return tuple(self.sum(np.array(dots(*pairs))).tolist())

    def of_columns(self, matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """``matrix^T vector``, shape (k,), for a matrix of k vectors as columns. Collective over the parts."""
        own = matrix.T @ vector
        return own if self._comm is None else torch.from_numpy(self.sum(own.double().cpu().numpy())).to(own)

    def orthonormalise(self, matrix: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """QR decomposition of a matrix of k vectors as columns. Collective over the parts.

        Of parts it is that of the triangles of their own decompositions, one below the other (Demmel et al., doi
        10.1137/080731992), which is as accurate as that of the whole.

        Returns
        -------
        Tensor, shape (n, k)
            Orthonormal columns.
        ndarray, shape (k, k), float64
            The triangle.
        """
        orthonormal, triangle = torch.linalg.qr(matrix)
        root = triangle.double().cpu().numpy()
        if self._comm is None:
            return orthonormal, root
        own, size = len(root), root.shape[1]
        square = np.zeros((size, size))  # a part may have fewer rows than there are columns
        square[:own] = root
        stack = np.zeros((self._comm.size, size, size))

        def decide(table: np.ndarray) -> list[float]:
            parts, root = np.linalg.qr(table[self._rows].reshape(-1, size))
            stack[self._rows] = parts.reshape(-1, size, size)
            return [*root.ravel(), *stack.ravel()]

        found = np.array(self._comm.agree(square.ravel().tolist(), decide)).reshape(-1, size, size)
        root, parts = found[0], found[1:]
        place = max(row for row in self._rows if row <= self._comm.rank)
        return orthonormal @ torch.from_numpy(parts[place, :own]).to(orthonormal), root

    def clip(self, vector: torch.Tensor, radius: float) -> None:
        """Scale ``vector`` in place so that its norm is at most ``radius``. Collective over the parts."""
        if self._comm is None:
            clip_to_ball(vector, radius, self.kind)
            return
        length = self.norm(vector)
        if length > radius:
            vector.mul_(radius / length)

    def steepest_descent(self, gradient: torch.Tensor, radius: float) -> torch.Tensor:
        """Minimiser of ``gradient . step`` in the ball, zero for a zero gradient. Collective over the parts."""
        if self._comm is None or self.kind == "inf":
            return steepest_descent(gradient, radius, self.kind)
        (length,) = self.euclidean_norms(gradient)
        return gradient * (-radius / (length or 1.0))

    def euclidean_radius(self, radius: float, vector: torch.Tensor) -> float:
        """Radius of the smallest 2-norm ball that holds the ball of ``radius``. Collective over the parts."""
        (size,) = self.sum(np.array([float(len(vector))]))
        return euclidean_radius(radius, int(size), self.kind)
