"""A step as all ranks see it, from one reduction of what each has of it. No communication."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from apts_mpi.parallel.parts import Parts
from apts_mpi.trust_region.norms import NormKind


@dataclass(frozen=True)
class Measured:
    """What is known of a step.

    Attributes
    ----------
    loss, trial_loss
        f_k before and after it.
    slope
        Its inner product with the gradient.
    step_norm, gradient_norm
        Its length in the norm of the ball, and the 2-norm of the gradient.
    has_moved
        Whether it changed a parameter.
    not_finite
        First rank whose share of the loss before, and of that after, is not finite; -1 where there is none, or all
        ranks' are not.
    """

    loss: float
    trial_loss: float
    slope: float
    step_norm: float
    gradient_norm: float
    has_moved: bool = True
    not_finite: tuple[int, int] = (-1, -1)


def parts_of_step(rank: int, kind: NormKind, leads: bool, own: Sequence[float]) -> Parts:
    """What a rank tells of a step.

    Parameters
    ----------
    rank, kind
        The rank, and the norm of the ball.
    leads
        Whether what it has of the vectors counts: of copies of a part that of one rank does.
    own
        Its share of the loss before and after the step, whether that changed a parameter there, and what
        ``InnerProducts.own`` returns.
    """
    shares, moved, products = own[:2], own[2], own[3:]
    slope, step_norm, gradient_norm = products if leads else (0.0, 0.0, 0.0)
    finite = [math.isfinite(share) for share in shares]
    largest = [moved]
    for is_finite in finite:
        largest += [-math.inf if is_finite else -rank, is_finite]
    lengths = (step_norm, gradient_norm)
    return Parts([*shares, slope], [*largest, step_norm], lengths if kind == "2" else (0.0, gradient_norm))


def measured(parts: Parts, kind: NormKind) -> Measured:
    """The step, from what all ranks told of it, first in each kind of numbers."""
    loss, trial_loss, slope = parts.sums[:3]
    moved, before, some_before, after, some_after, longest = parts.largest[:6]
    return Measured(
        loss,
        trial_loss,
        slope,
        step_norm=parts.norms[0] if kind == "2" else longest,
        gradient_norm=parts.norms[1],
        has_moved=moved != 0.0,
        not_finite=(_first(before, some_before), _first(after, some_after)),
    )


def _first(negative: float, some_are_finite: float) -> int:
    return -int(negative) if some_are_finite and negative > -math.inf else -1
