"""Norms and inner products of vectors of which every rank holds all, or a part."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from apts_mpi.comm import Communicator
from apts_mpi.trust_region import NormKind, steepest_descent
from apts_mpi.vector import clip_to_ball, norm


class InnerProducts:
    """Inner products over all parameters, and the norm of the ball.

    Parameters
    ----------
    kind
        Norm of the ball.
    parts
        The ranks that hold the parts of a vector, in the order of ranks; None where every rank holds all of it, which
        needs no message.
    rows
        Those ranks, numbered as in a table that rank 0 gathers.
    """

    def __init__(self, kind: NormKind, parts: Communicator | None = None, rows: Sequence[int] = (0,)) -> None:
        self._kind = kind
        self._parts = parts
        self._rows = list(rows)

    def own(self, gradient: torch.Tensor, step: torch.Tensor) -> list[torch.Tensor]:
        """This rank's part of what `of_table` finds, float64 of shape (), for a message that goes anyway."""
        products = torch.dot(gradient, step), norm(step, self._kind), norm(gradient, "2")
        return [product.double() for product in products]

    def of_table(self, table: np.ndarray) -> tuple[float, float, float]:
        """Inner product, norm of the step, and 2-norm of the gradient, from what `own` returned on all ranks."""
        products, steps, gradients = table[self._rows].T
        return math.fsum(products), self._join(steps), math.hypot(*gradients)

    def _join(self, norms: Sequence[float]) -> float:
        """Norm of a vector from those of its parts; not a number if one of them is not."""
        return math.hypot(*norms) if self._kind == "2" else float(np.max(norms))

    def norm(self, vector: torch.Tensor) -> float:
        """Norm of the ball. Collective over the parts."""
        own = float(norm(vector, self._kind))
        if self._parts is None:
            return own
        return self._parts.agree([own], lambda table: [self._join(table[:, 0])])[0]

    def euclidean_norms(self, *vectors: torch.Tensor) -> tuple[float, ...]:
        """2-norms. Collective over the parts."""
        own = [float(norm(vector, "2")) for vector in vectors]
        if self._parts is None:
            return tuple(own)
        return self._parts.agree(own, lambda table: [math.hypot(*column) for column in table.T])

    def dot(self, vector: torch.Tensor, other: torch.Tensor) -> float:
        """Inner product. Collective over the parts."""
        own = float(torch.dot(vector, other))
        if self._parts is None:
            return own
        return self._parts.agree([own], lambda table: [math.fsum(table[:, 0])])[0]

    def clip(self, vector: torch.Tensor, radius: float) -> None:
        """Scale ``vector`` in place so that its norm is at most ``radius``. Collective over the parts."""
        if self._parts is None:
            clip_to_ball(vector, radius, self._kind)
            return
        length = self.norm(vector)
        if length > radius:
            vector.mul_(radius / length)

    def steepest_descent(self, gradient: torch.Tensor, radius: float) -> torch.Tensor:
        """Minimiser of ``gradient . step`` in the ball, zero for a zero gradient. Collective over the parts."""
        if self._parts is None or self._kind == "inf":
            return steepest_descent(gradient, radius, self._kind)
        (length,) = self.euclidean_norms(gradient)
        return gradient * (-radius / (length or 1.0))
