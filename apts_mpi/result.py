"""What an iteration leaves to the next, and what it reports."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from apts_mpi.options import TrustRegionOptions
from apts_mpi.tools.schema import flag, instance, mapping, nothing_or, number, sequence
from apts_mpi.trust_region.acceptance import Judged
from apts_mpi.trust_region.next_batch import (
    AFTER_REJECTION,
    FAR,
    NEWEST,
    PART,
    SHORTER,
    TRIALS,
    following,
    is_short,
    share_of_radius,
)
from apts_mpi.trust_region.same_function import CHECK_SAME, NEW, SameFunction

# Least number above 0.
SMALLEST = 5e-324


@dataclass(frozen=True)
class StepResult:
    """What one iteration did; the same on every rank.

    Attributes
    ----------
    iteration
        Its number, from 1.
    schwarz
        The judged Schwarz step.
    global_step
        The judged global step, of several the last that was accepted or else the first; None without one.
    gradient_evaluations
        Of this iteration, on the rank with most to do, in evaluations of the whole network on a rank's even share of
        the batch. A pass through a part of the network counts as its share, a forward pass alone as a third.
    seconds
        Wall time of this iteration on this rank.
    notes
        What was done for the first time in the place of what could not be done, a sentence each; rank 0 logs them.
    converged
        Whether the function stays the same, and neither its loss nor its gradient falls any more, up to rounding.
    """

    iteration: int
    schwarz: Judged
    global_step: Judged | None
    gradient_evaluations: float
    seconds: float
    notes: tuple[str, ...] = ()
    converged: bool = False

    @property
    def skipped(self) -> bool:
        """Whether the batch was of no use, see `Judged`."""
        return self.schwarz.skipped

    @property
    def at_rest(self) -> bool:
        """Whether the batch has nothing left to gain: converged, or at rest as `Judged` has it."""
        return self.converged or (self.schwarz.at_rest and not self.accepted)

    @property
    def accepted(self) -> bool:
        """Whether the parameters changed."""
        return self.schwarz.accepted or (self.global_step is not None and self.global_step.accepted)

    @property
    def reason(self) -> str:
        """What is known of why the parameters did not change, in words; empty where they did."""
        return "" if self.accepted else self.schwarz.reason


@dataclass
class State:
    """What an iteration leaves to the next besides parameters, buffers and the local solvers' state.

    Attributes
    ----------
    iteration, accepted, rejected, skipped
        Steps so far.
    functions
        Batches so far.
    radius
        Of the ball, before its share; None before the first gradient.
    losses
        Of the window.
    gradient_evaluations
        So far.
    slope
        Of the last accepted step's own batch along it, where the next batch judges the radius.
    share
        Of the radius that the present step has, see ``apts_mpi.trust_region.next_batch``.
    has_end
        Whether it is known how much of the run is done.
    retry
        Share of that which the next try of a rejected batch has.
    starting
        Whether no step has been long enough yet.
    tried
        Steps in a row that were accepted since the last one that was not, or since the start.
    walked, farthest
        Such steps, those at the start among them, and the largest distance that they have led to.
    loss, spread
        Of the last accepted step's own batch where it began, and the usual difference of two such losses; None and 0
        before them.
    same
        What is known of the present function.
    """

    iteration: int = 0
    functions: int = 0
    radius: float | None = None
    losses: list[float] = field(default_factory=list)
    gradient_evaluations: float = 0.0
    accepted: int = 0
    rejected: int = 0
    skipped: int = 0
    slope: float = 0.0
    share: float = 1.0
    has_end: bool = False
    retry: float = 1.0
    starting: bool = True
    tried: int = 0
    walked: int = 0
    farthest: float = 0.0
    loss: float | None = None
    spread: float = 0.0
    same: SameFunction = NEW

    def begin(self, again: bool) -> None:
        """Begin an iteration, on the function of the one before or on a new one."""
        self.functions += not again
        self.same = self.same.again() if again else NEW

    def see_end(self, done: float | None) -> None:
        """Have the radius that steps have when that much of a run is done; None where nobody knows."""
        self.share, self.has_end = share_of_radius(done), done is not None

    @contextmanager
    def ball_of(self, apart: bool) -> Iterator[None]:
        """Have, in the block, the ball of a step that is apart from that of the Schwarz step, if it is."""
        radius = self.radius
        if apart:
            self.radius = self.same.reach or radius
        try:
            yield
            if apart and self.radius is not None:
                self.same = replace(self.same, reach=self.radius)
        finally:
            self.radius = radius if apart else self.radius

    @property
    def present_radius(self) -> float:
        """Of the ball, which the first gradient gives at the latest."""
        assert self.radius is not None
        return self.radius * self.share * self.retry

    @property
    def is_on_trial(self) -> bool:
        """Whether a step is to be judged by its own batch: at the start, and until many have been accepted after it."""
        return self.tried < TRIALS

    def forget_step(self) -> None:
        """The last step does not lead to the present point, which is the user's."""
        self.slope, self.tried, self.walked, self.farthest = 0.0, 0, 0, 0.0

    def is_far(self, loss: float) -> bool:
        """Whether a batch's loss at the end of the last step lies beyond what losses of batches differ by."""
        if self.loss is None or not math.isfinite(loss):
            return not math.isfinite(loss)
        return self.spread > 0.0 and loss - self.loss > FAR * self.spread

    def taken_back(self, before: float, after: float, gradient_norm: float, options: TrustRegionOptions) -> Judged:
        """The last step as the next batch judges it, by its losses there: accepted, or taken back.

        Where the loss before the step is not finite, or far as well, it is the batch that is at fault.

        Parameters
        ----------
        before, after
            Losses of the next batch where the step began, and at its end.
        gradient_norm
            At its end.
        options
            Limits of the radius.
        """
        promised, risen, radius = -self.slope, after - before, self.present_radius
        bad = math.isfinite(before) and self.is_far(after)
        if bad and self.loss is not None and math.isfinite(after):
            bad = risen > PART * (after - self.loss)
        following = max(SHORTER * radius, options.min_radius) if bad else radius
        rho = -risen / promised
        return Judged(before, after, promised, -risen, rho, not bad, radius, following, math.nan, gradient_norm)

    def judged_by_next(
        self, judged: Judged, after: float, options: TrustRegionOptions, least: float = 0.0
    ) -> tuple[Judged, bool, float]:
        """A judged step with the radius as the next batch has it; and what `starting` and `retry` become.

        The radius stays while it goes down by the clock, which would look like steps that are too short. A step that
        the memory of the gradients leads uphill on this batch says nothing about it: the next batch has its turn.

        Parameters
        ----------
        judged
            The step.
        after
            Slope of its batch along the step before.
        options
            Limits of the radius.
        least
            Of the radius after an accepted step of a run with an end, see
            ``apts_mpi.trust_region.next_batch.length_in_walk``.
        """
        if judged.skipped or (not judged.accepted and judged.predicted_reduction <= 0.0):
            return replace(judged, skipped=True, next_radius=judged.radius / self.retry), self.starting, 1.0
        assert self.radius is not None  # the step was within it
        starting = self.starting and judged.accepted and is_short(self.slope, after)
        radius, retry = self.radius, 1.0
        if self.share == 1.0:
            radius = following(radius, self.slope, after, starting)
            radius = max(radius, least) if judged.accepted and self.has_end else radius
        if not judged.accepted:
            radius, retry = min(radius, AFTER_REJECTION * self.radius), SHORTER * self.retry
        radius *= self.share * retry
        return replace(judged, next_radius=min(max(radius, options.min_radius), options.max_radius)), starting, retry

    def move(self, judged: Judged, options: TrustRegionOptions) -> None:
        """Take over the next radius, and the loss of an accepted step into the window of the last ones."""
        self.radius = judged.next_radius / (self.share * self.retry)
        self.same = self.same.judged(judged)
        if judged.accepted:
            difference = 0.0 if self.loss is None else abs(judged.loss - self.loss)
            self.spread += (NEWEST if self.spread else 1.0) * (difference - self.spread)
            self.loss = judged.loss
        if not judged.skipped:
            self.tried = self.tried + 1 if judged.accepted and not self.starting else 0
            self.farthest = self.farthest if judged.accepted else 0.0
            # Without a distance nobody watches a walk.
            self.walked = self.walked + 1 if self.farthest else 0
            # Of a first-order prediction; a batch judges the step before its own once.
            self.slope = -judged.predicted_reduction if judged.accepted else 0.0
        if judged.skipped and self.accepted == self.rejected == 0:
            # Such a batch has not told how long a step may be.
            self.radius = options.initial_radius
        if judged.accepted:
            self.losses = [*self.losses, judged.loss][-options.window :] if options.window else []

    def count(self, result: StepResult) -> None:
        """Take note of an iteration that has come to its end."""
        self.iteration += 1
        self.accepted += result.accepted
        self.skipped += result.skipped
        self.rejected += not (result.accepted or result.skipped)
        self.gradient_evaluations += result.gradient_evaluations


@dataclass(frozen=True)
class Known:
    """What the metadata of a checkpoint say of the point where it was made: the state, and what was known there."""

    state: State
    evaluated: bool
    differentiated: bool

    @staticmethod
    def of(metadata: Any, path: object) -> Known:
        """Of a solver's metadata in the file ``path``, or `InvalidInput` if they are not those of a solver."""
        place = f"{path}: solver"
        found = mapping()(metadata, place)
        return Known(
            _STATE(found.get("state"), f"{place}.state"),
            flag(found.get("evaluated"), f"{place}.evaluated"),
            flag(found.get("differentiated"), f"{place}.differentiated"),
        )


_STATE = instance(
    State,
    later=(
        "skipped",
        "slope",
        "share",
        "has_end",
        "retry",
        "starting",
        "tried",
        "walked",
        "farthest",
        "loss",
        "spread",
        "same",
    ),
    same=CHECK_SAME,
    slope=number(),
    share=number(0.0, 1.0),
    retry=number(0.0, 1.0),
    loss=nothing_or(number()),
    spread=number(0.0),
    farthest=number(0.0),
    starting=flag,
    has_end=flag,
    radius=nothing_or(number(SMALLEST)),
    losses=sequence(number()),
    gradient_evaluations=number(0.0),
)


@dataclass(frozen=True)
class Saved:
    """What was known at the point of a checkpoint: loss, gradient, and a rejected correction to be used again."""

    evaluated: bool = False
    differentiated: bool = False
    correction: torch.Tensor | None = None
