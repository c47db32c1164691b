"""The damping of Levenberg and Marquardt, which follows rho. No communication."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Of the first damping, relative to the size of the matrix.
FIRST = 1e-3

# What a good step leaves of the damping, and of one that the model knew to a per cent or less: the share, times 10, by
# which it was wrong, and no less than the last number.
GOOD, KNOWN, LEAST_LEFT = 1.0 / 3.0, 10.0, 1e-3

# A rejection multiplies it by so much, the next one by the square, and so on.
RISE = 2.0

# What is left of a damping that makes steps too short to change a parameter.
TOO_MUCH = 0.1

# It stays a number.
LARGEST = 1e100


@dataclass
class Damping:
    """The damping lambda of ``(R^T R + lambda I) s = -R^T r``, and how it follows rho (Nielsen, IMM-REP-1999-05).

    After an accepted step it is multiplied by ``max(1/3, 1 - (2 rho - 1)^3)``, smooth in rho: a third for a model that
    is right, twice as much for one that is good for nothing. Where ``10 |rho - 1|`` is less than a third it is that, so
    that the method ends as Newton's does. Rejections multiply it by 2, 4, 8 and so on.

    Attributes
    ----------
    value
        lambda; 0 before the first step.
    rise
        By how much the next rejection multiplies it.
    """

    value: float = 0.0
    rise: float = RISE

    def for_matrix(self, size: float) -> float:
        """The damping, or the first one of a matrix of this size."""
        return self.value or FIRST * size

    def follow(self, taken: float, accepted: bool, rho: float, is_seen: bool) -> None:
        """Take note of how a step was judged.

        Parameters
        ----------
        taken
            The damping that it had.
        accepted
            Whether it was taken.
        rho
            Actual over predicted reduction, both of the present point.
        is_seen
            Whether the predicted reduction is above the rounding noise of the loss: below, rho says nothing.
        """
        self.value = taken
        if not accepted:
            self.value = min(self.value * self.rise, LARGEST)
            self.rise = min(self.rise * RISE, LARGEST)
            return
        self.rise = RISE
        if is_seen and math.isfinite(rho):
            factor = max(1.0 - (2.0 * min(max(rho, 0.0), 1.0) - 1.0) ** 3, GOOD)
            self.value *= min(factor, max(KNOWN * abs(rho - 1.0), LEAST_LEFT))

    def shorten(self, taken: float) -> None:
        """Take note that with this damping the step was too short to change a parameter, or to be seen in the loss."""
        self.value, self.rise = TOO_MUCH * taken, RISE
