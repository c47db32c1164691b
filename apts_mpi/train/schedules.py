"""Step sizes over a run, as shares of the largest one; each a function of the share of the run that is behind it."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]

# The part of a run in which the step size rises, and the share with which it begins: a step of no length is lost.
WARM_UP, BEGINNING = 0.05, 0.01


def constant(share: float) -> float:
    """The same step size all along."""
    return 1.0


def warm_up(share: float) -> float:
    """Linearly up, then constant."""
    return min(1.0, BEGINNING + (1.0 - BEGINNING) * share / WARM_UP)


def cosine(share: float) -> float:
    """From the largest one down to none, by half a wave of the cosine."""
    return 0.5 * (1.0 + math.cos(math.pi * min(share, 1.0)))


def warm_up_and_cosine(share: float) -> float:
    """Linearly up, then by half a wave of the cosine down to none."""
    return warm_up(share) if share < WARM_UP else cosine((share - WARM_UP) / (1.0 - WARM_UP))
