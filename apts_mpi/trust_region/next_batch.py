"""The radius as the next batch judges it.

A step that was made for a small batch lowers the loss of that batch, however long it is: at 64 samples by a hundred
times what it does for others. So rho, of the same batch, says nothing about the ball. The next batch had no part in the
step. Its gradient g at the end of the step s gives the slope ``<g, s>`` of a loss that did not choose s: where it still
falls a longer step would have been better, where it rises a shorter one. Beside the slope at the start, of the step's
own batch,

    radius <- radius * exp(rate * clip(<g_next, s> / <g_own, s>, -1, 1)) ,

which comes to rest where the slope is zero on average: where steps end at the minimum along them of the loss of all
samples. It costs one inner product, and one vector.

What is best for the next batch is too short for a long run, which has to go far and has all later steps to average the
noise (short-horizon bias: Wu et al., arXiv 1803.02021). How far the steps have led tells otherwise: after t of them
that are noise alone a walk is a root of t times their length away from where it began, so steps of length

    distance / sqrt(t) * sqrt((1 - momentum) / (1 + momentum))

would have come as far (the last factor as running means make neighbours alike). A shorter ball is not taken,
as long as the end of the run is known, whose steps will average the noise
("distance over gradients": Ivgi et al., arXiv 2302.12022, here of steps whose length is that of the ball). The walk
begins anew where a step was not accepted. It takes another vector, and is for balls of the 2-norm without a
metric, which bounds the walk itself.

So a step needs no trial on its own batch, which it lowers anyway. It is taken as it is, and the loss of the next, which
is computed anyway, says whether it was a bad one. Where that is not finite, or lies above that of the step's own batch
by far more than losses of batches differ, the same batch is evaluated where the step began as well. If the step has
made the larger part of the difference it is taken back. Steps at the start, and the first ones after it and
after one that was not accepted, are tried on their own batch: their radius is not yet one of many steps.

The step's promise, the slope, would be no measure. Where batches are fitted it is next to nothing, and each step raises
the loss of the next batch by more: a network that has learnt five batches by heart came to rest in ever smaller balls.

A step that is best for the next iteration is too long for the last ones, whose noise nothing averages any more. Where
the end of the run is known, the radius goes to zero over its last part.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from apts_mpi.tools.schema import Check, record

# Of the logarithm of the radius, an iteration.
RATE = 0.1

# Of the radius for the next try, where a step raises the loss of its own batch; and of the radius after that.
SHORTER, AFTER_REJECTION = 0.5, 0.7

# Steps in a row that their own batches accept, after the start or one that they do not, before others are not tried.
TRIALS = 10

# Times the usual difference of losses by which that of the next batch has to rise for a step to be looked back at; the
# part of it that a bad step has made; and the share of a new difference in the usual one.
FAR, PART, NEWEST = 4.0, 0.5, 0.1

# At first, while the slope at the end of a step is more than a share of that at its start, the radius grows faster.
FASTER, SHORT = 2.0, 0.2

# Share of the Cauchy step's length with which to begin: too short a radius grows tenfold in 23 steps, and too long a
# one throws a network far away before it has shrunk.
BEGIN = 0.1

# Share of a run after which the radius goes down to zero, linearly.
CONSTANT = 0.4


def following(radius: float, before: float, after: float, starting: bool = False) -> float:
    """The radius after a step.

    Parameters
    ----------
    radius
        The present one.
    before, after
        Slopes along the step: of its own batch at its start, and of the next batch at its end.
    starting
        Whether no step has been long enough yet.
    """
    if not _is_known(before, after):
        return radius
    if starting and is_short(before, after):
        return radius * FASTER
    return radius * math.exp(RATE * min(max(after / before, -1.0), 1.0))


def is_short(before: float, after: float) -> bool:
    """Whether a step ended far before the minimum along it, for parameters as of `following`."""
    return not _is_known(before, after) or after / before > SHORT


def _is_known(before: float, after: float) -> bool:
    return before < 0.0 and math.isfinite(after) and math.isfinite(before)


def length_in_walk(distance: float, steps: float, momentum: float) -> float:
    """Length of steps along running means of noise that lead that far away.

    Parameters
    ----------
    distance
        The largest so far from where the walk began.
    steps
        How many there were, 1 or more.
    momentum
        Of the running means, in [0, 1).
    """
    return distance * math.sqrt((1.0 - momentum) / (1.0 + momentum) / steps)


def share_of_radius(done: float | None) -> float:
    """Share of the radius that steps have when that much of a run is done; 1 where nobody knows."""
    if done is None or done <= CONSTANT:
        return 1.0
    return max((1.0 - done) / (1.0 - CONSTANT), 1e-3)


class LastStep:
    """The last accepted step, and where the walk of steps began; a part of the solver that is saved.

    Parameters
    ----------
    like : Tensor, shape (n,)
        A vector such as the parameters.

    Attributes
    ----------
    vector : Tensor, shape (n,)
        The step; zero before the first.
    start : Tensor, shape (n,)
        The point where the first step of the walk began.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.vector = torch.zeros_like(like)
        self.start = like.clone()

    def away(self, values: torch.Tensor, before: torch.Tensor, walked: int) -> torch.Tensor:
        """The square of the distance of a point from where the walk began: this rank's part.

        Parameters
        ----------
        values, before : Tensor, shape (n,)
            The ends of the present step.
        walked
            Steps of the walk before it; with 0 it begins here.

        Returns
        -------
        Tensor, shape (), float64
        """
        if walked == 0:
            self.start.copy_(before)
        return torch.linalg.vector_norm(values - self.start, dtype=torch.float64).square()

    def state(self) -> dict[str, Any]:
        """See `apts_mpi.state.solver.Part`."""
        return {"vector": self.vector, "start": self.start}

    def saved(self, vector: Check, vector_or_empty: Check) -> Check:
        """See `apts_mpi.state.solver.Part`."""
        return record({"vector": vector}, {"start": vector})

    def restore(self, state: dict[str, Any]) -> list[str]:
        """See `apts_mpi.state.solver.Part`."""
        self.vector.copy_(state["vector"])
        self.start.copy_(state.get("start", self.start))
        return []
