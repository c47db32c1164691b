"""The ball in which an optimizer looks for its steps, and what it keeps of the last one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from apts_mpi.options import TrustRegionOptions
from apts_mpi.trust_region.next_batch import BEGIN, CONSTANT, SHORTER, following

# Of the norm of all parameters, the first radius at most: without layers the length of a direction has no unit.
LARGEST_BEGIN = 0.01

# Batches in a row without a finite gradient after which not they are at fault, but the step before them.
LOST = 2


class Ball:
    """The radius, the last step and its slope.

    Parameters
    ----------
    radius
        The first one; None: from the first direction.

    Attributes
    ----------
    radius : float or None
        Of the ball.
    slope : float
        Along the last step, of its own batch; 0 where there was none.
    last_step : Tensor, shape (n,)
        That step.
    largest : float
        Factor of the steps so far.
    useless : int
        Batches in a row whose gradient is not finite.
    """

    def __init__(self, radius: float | None) -> None:
        self._bounds = TrustRegionOptions()
        self.radius = radius
        self.slope = self.largest = 0.0
        self.last_step = torch.zeros(0)
        self.useless = 0

    def extend(self, like: torch.Tensor) -> None:
        """Have a last step of all parameters, whose gradient is ``like``; of new ones it is zero."""
        if len(self.last_step) != len(like):
            kept = self.last_step
            self.last_step = torch.zeros_like(like)
            self.last_step[: len(kept)] = kept

    def begin(self, length: float, size: float) -> float:
        """The radius for a direction of ``length`` from parameters of norm ``size``."""
        if self.radius is None:
            longest = LARGEST_BEGIN * size if size > 0.0 else math.inf
            self.radius = self._bound(min(BEGIN * length, longest))
        return self.radius

    def judge(self, slope: float, after: float, factor: float) -> bool:
        """Follow the slope of this batch along the last step, and say whether its own step is taken.

        One that the memory of the gradients leads uphill is not.

        Parameters
        ----------
        slope, after
            Of the present batch, along its step and along the last one.
        factor
            Of the steps, the largest of all groups.
        """
        self.largest = max(self.largest, factor)
        if not slope < 0.0:
            self.slope = 0.0
            return False
        # Without the fast start of the solver: here no trial on its own batch rejects a step that became too long.
        # A radius that followed while a schedule lets the steps go down would grow against it.
        if self.radius is not None and factor >= (1.0 - CONSTANT) * self.largest:
            self.radius = self._bound(following(self.radius, self.slope, after))
        self.slope = slope
        return True

    def is_lost(self) -> bool:
        """Note a gradient that is not finite; whether the last step is to be undone."""
        self.useless += 1
        lost = self.useless == LOST and self.slope < 0.0
        if lost and self.radius is not None:
            self.radius, self.slope = self._bound(SHORTER * self.radius), 0.0
        return lost

    def _bound(self, radius: float) -> float:
        return min(max(radius, self._bounds.min_radius), self._bounds.max_radius)

    def state(self) -> dict[str, Any]:
        """Its numbers."""
        return {name: getattr(self, name) for name in ("radius", "slope", "largest", "useless")}

    def restore(self, state: dict[str, Any], last_step: torch.Tensor) -> None:
        """Take over numbers and the last step."""
        for name in self.state():
            setattr(self, name, state[name])
        self.last_step = last_step


def views_of(step: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The parts of a step, in the shapes of the parameters."""
    parts = step.split([parameter.numel() for parameter in parameters])
    return [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
