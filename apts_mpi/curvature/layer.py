"""What the curvatures of all kinds of layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from apts_mpi.network.recorder import LayerRecord

# Least damping, for layers whose gradients vanish.
TINY = 1e-30


@dataclass
class LayerBatch:
    """What is known of a layer in one batch.

    Attributes
    ----------
    records : sequence of LayerRecord
        Calls of the layer on this rank's samples.
    samples : int
        Number of this rank's samples.
    signed : sequence of Tensor, shape (size,)
        Gradients of the mean loss of the team's samples, with random signs of the samples; for those who need them.
    team_samples : int
        Number of these samples.
    part : (int, int) or None
        Which of this rank's samples the calls are on; None: on all of them.
    """

    records: Sequence[LayerRecord]
    samples: int
    signed: Sequence[torch.Tensor] = ()
    team_samples: int = 0
    part: tuple[int, int] | None = None

    @property
    def reached(self) -> list[LayerRecord]:
        """The calls that the loss depends on."""
        return [record for record in self.records if record.gradient is not None]

    def of_all(self, rows: int) -> tuple[int, int]:
        """How many rows there are in calls on all samples where a part of them has so many, and how many before."""
        if self.part is None:
            return rows, 0
        first, last = self.part
        return rows * self.samples // (last - first), rows * first // (last - first)


class Curvature(Protocol):
    """Approximate curvature of one layer, a running mean of what `measure` returns.

    Statistics are ``means`` of ``sums``, which add up over parts of the samples.

    Attributes
    ----------
    kind : str
        By which checkpoints know it; never to be renamed.
    signed : bool
        Whether it is measured by gradients with random signs of the samples.
    """

    kind: str
    signed: bool

    @property
    def places(self) -> range:
        """Elements of the layer at which a `part` may begin: 0, and others where it costs no more than its share."""

    @property
    def statistics(self) -> list[tuple[int, ...]]:
        """Shapes of what `measure` returns."""

    def measure(self, batch: LayerBatch) -> list[torch.Tensor]:
        """Statistics of one batch."""

    def sums(self, batch: LayerBatch) -> list[Any]:
        """Tensors and numbers that add up over parts of the samples; of signed gradients there is one part alone."""

    def means(self, sums: Sequence[Any], samples: int) -> list[torch.Tensor]:
        """Statistics from the sums over this rank's samples."""

    def refresh(self, statistics: Sequence[torch.Tensor], damping: float) -> None:
        """Factorise the running means, damped."""

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Minus the inverse curvature times a gradient, both of shape (size,)."""

    def part(self, gradient: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of `direction`, at ``places`` or the end."""


class Undivided:
    """Of curvature whose directions are computed as a whole."""

    places = range(1)

    def part(self: Curvature, gradient: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """See `Curvature`."""
        return self.direction(gradient)[start:stop]


def damped_inverse(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Inverse of a positive semi-definite matrix plus ``damping`` times its mean eigenvalue, by Cholesky.

    Of its diagonal alone where rounding leaves no other, without waiting for the device.
    """
    damped = matrix.clone()
    damped.diagonal().add_((damping * matrix.diagonal().mean()).clamp_min(TINY))
    factor, failed = torch.linalg.cholesky_ex(damped)
    inverse = torch.cholesky_inverse(factor)
    # A sum has what is not finite, at a tenth of the cost of looking at all elements.
    lost = (failed != 0) | ~inverse.sum().isfinite()
    alone = damped.diagonal().nan_to_num().clamp_min(TINY).reciprocal()
    inverse.masked_fill_(lost, 0.0).diagonal().add_(alone * lost)
    return inverse


def damped_reciprocal(diagonal: torch.Tensor, damping: float) -> torch.Tensor:
    """The same of a diagonal matrix."""
    return 1.0 / (diagonal + (damping * diagonal.mean()).clamp_min(TINY))


def damped_factor(factor: torch.Tensor, damping: float) -> torch.Tensor:
    """The inverse of a factor, which is a matrix or a diagonal: again a matrix or a diagonal."""
    return damped_inverse(factor, damping) if factor.dim() == 2 else damped_reciprocal(factor, damping)
