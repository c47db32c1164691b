"""Why a run ends: reasons, tolerances, and a watched metric that gets no better."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from apts_mpi.errors import InvalidInput, shown
from apts_mpi.tools.schema import instance, nothing_or, number, text
from apts_mpi.train.options import TrainingOptions


class Reason(str, Enum):
    """Why a run ended, by what ``summary.json`` calls it."""

    CONVERGED_GRADIENT = "CONVERGED_GRADIENT"
    CONVERGED_RELATIVE_GRADIENT = "CONVERGED_RELATIVE_GRADIENT"
    CONVERGED_TARGET = "CONVERGED_TARGET"
    AT_REST = "AT_REST"
    STOPPED_EARLY = "STOPPED_EARLY"
    DIVERGED_LOSS = "DIVERGED_LOSS"
    LIMIT_EPOCHS = "LIMIT_EPOCHS"
    LIMIT_ITERATIONS = "LIMIT_ITERATIONS"
    LIMIT_SECONDS = "LIMIT_SECONDS"
    INTERRUPTED = "INTERRUPTED"

    @property
    def words(self) -> str:
        """The same in words."""
        return _WORDS[self]


_WORDS = {
    Reason.CONVERGED_GRADIENT: "the gradients of all batches of an epoch were at most --gradient-tolerance",
    Reason.CONVERGED_RELATIVE_GRADIENT: "the gradients of all batches of an epoch were at most "
    "--relative-gradient-tolerance times the first one",
    Reason.CONVERGED_TARGET: "the training loss reached --target-loss",
    Reason.AT_REST: "no batch has anything left to gain",
    Reason.STOPPED_EARLY: "the metric of --stop-on got no better for --patience epochs",
    Reason.DIVERGED_LOSS: "the training loss is not finite",
    Reason.LIMIT_EPOCHS: "all epochs are done",
    Reason.LIMIT_ITERATIONS: "--max-iterations are done",
    Reason.LIMIT_SECONDS: "the seconds of --max-seconds or --max-cpu-seconds are over",
    Reason.INTERRUPTED: "it was stopped before its end",
}

# What the method came to by itself.
CONVERGED = (
    *(Reason.CONVERGED_GRADIENT, Reason.CONVERGED_RELATIVE_GRADIENT),
    *(Reason.CONVERGED_TARGET, Reason.AT_REST),
)

# What metrics have in their names, and the sign with which less is better.
FALLING, RISING = ("loss", "error"), ("accuracy",)
SIGNS = {"min": 1.0, "max": -1.0}


def metric_and_sign(asked: str, names: Sequence[str]) -> tuple[str, float]:
    """The metric that ``--stop-on`` asks for, and what it is multiplied by so that less is better.

    Parameters
    ----------
    asked
        A name, perhaps with ``min:`` or ``max:`` before it.
    names
        Of the metrics that the run has.

    Raises
    ------
    InvalidInput
        For another name, or one that does not say whether less or more is better.
    """
    direction, colon, name = asked.rpartition(":")
    if colon and direction not in SIGNS:
        raise InvalidInput(f"stop_on: {shown(asked)} is not allowed; write min:{name} or max:{name}")
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise InvalidInput(f"stop_on: {shown(name)} is no metric of this run; {meant}it has {', '.join(names)}")
    if direction:
        return name, SIGNS[direction]
    falls, rises = (any(word in name.lower() for word in words) for words in (FALLING, RISING))
    if falls == rises:
        raise InvalidInput(
            f"stop_on: whether less or more of {name} is better is not known; write min:{name} or max:{name}"
        )
    return name, 1.0 if falls else -1.0


@dataclass
class Watched:
    """What is known so far of what may end a run; a part of its checkpoints.

    Attributes
    ----------
    metric : str
        What ``--stop-on`` asked for.
    best : float or None
        Its best value; None as long as there was no finite one.
    best_epoch, best_iteration : int
        Where that was.
    waited : int
        Epochs since then.
    train_loss : float or None
        Of the last whole epoch, if it was finite.
    first_gradient : float or None
        Norm of the first gradient that was neither 0 nor infinite.
    small, relatively_small : int
        Batches in a row, up to now, with a gradient within the tolerances.
    tolerances : str
        Which these were.
    """

    metric: str = ""
    best: float | None = None
    best_epoch: int = 0
    best_iteration: int = 0
    waited: int = 0
    train_loss: float | None = None
    first_gradient: float | None = None
    small: int = 0
    relatively_small: int = 0
    tolerances: str = ""


CHECK_WATCHED = instance(
    Watched,
    metric=text,
    tolerances=text,
    best=nothing_or(number()),
    train_loss=nothing_or(number()),
    first_gradient=nothing_or(number(0.0)),
)


class Stopping:
    """Watches gradients and metrics, and says when there is a reason to end the run.

    A gradient of one batch is that of all samples and noise; so a tolerance is met when the gradients of as many
    batches in a row as an epoch has are within it: with the full batch, when one is.

    Parameters
    ----------
    options
        Of the run.
    batches
        An epoch.
    names
        Of the metrics that the run has; any, where no metric is watched.

    Attributes
    ----------
    state : Watched
        What is saved.
    improved : bool
        Whether the last epoch was the best so far, until the next iteration.

    Raises
    ------
    InvalidInput
        For a metric that the run lacks.
    """

    def __init__(self, options: TrainingOptions, batches: int, names: Sequence[str]) -> None:
        self._options = options
        self._batches = batches
        self.metric, self._sign = "", 1.0
        if options.stop_on is not None:
            self.metric, self._sign = metric_and_sign(options.stop_on, names)
        self._tolerances = repr((options.gradient_tolerance, options.relative_gradient_tolerance))
        self.state = Watched(metric=options.stop_on or "", tolerances=self._tolerances)
        self.improved = False

    def restore(self, saved: Watched | None) -> list[str]:
        """Go on with what a checkpoint has; return what is of no use now, one sentence each."""
        if saved is None:
            return []
        asked, notes = self.state.metric, []
        self.state = saved
        if saved.metric != asked:
            if saved.metric and asked:
                notes.append(f"stop_on: what was watched is {saved.metric}, so the best {asked} is looked for anew")
            saved.metric, saved.best, saved.best_epoch, saved.best_iteration, saved.waited = asked, None, 0, 0, 0
        if saved.tolerances != self._tolerances:
            saved.tolerances, saved.small, saved.relatively_small = self._tolerances, 0, 0
        return notes

    @property
    def is_asked(self) -> bool:
        """Whether anything can be found here."""
        options = self._options
        given = (options.target_loss, options.gradient_tolerance, options.relative_gradient_tolerance)
        return bool(self.metric) or any(value is not None for value in given)

    def see_iteration(self, norm: float, done: bool) -> None:
        """Take note of the norm of the gradient of an iteration, once its batch is done with."""
        self.improved = False
        if done:
            self._see_gradient(norm)

    def _see_gradient(self, norm: float) -> None:
        state, options = self.state, self._options
        if state.first_gradient is None and 0.0 < norm < math.inf:
            state.first_gradient = norm
        within = options.gradient_tolerance is not None and norm <= options.gradient_tolerance
        state.small = state.small + 1 if within else 0
        share = options.relative_gradient_tolerance
        within = share is not None and state.first_gradient is not None and norm <= share * state.first_gradient
        state.relatively_small = state.relatively_small + 1 if within else 0

    def see_epoch(self, epoch: int, iteration: int, metrics: Mapping[str, Any]) -> None:
        """Take note of the metrics at the end of a whole epoch. What is not finite is never the best."""
        state = self.state
        state.train_loss = metrics["train_loss"] if math.isfinite(metrics["train_loss"]) else None
        if not self.metric:
            return
        value = metrics[self.metric]
        if math.isfinite(value) and (state.best is None or self._sign * value < self._sign * state.best):
            state.best, state.best_epoch, state.best_iteration, state.waited = value, epoch, iteration, 0
            self.improved = True
        else:
            state.waited += 1

    @property
    def reason(self) -> Reason | None:
        """Why the run is to end now; None as long as it is not."""
        state, options = self.state, self._options
        if state.small >= self._batches:
            return Reason.CONVERGED_GRADIENT
        if state.relatively_small >= self._batches:
            return Reason.CONVERGED_RELATIVE_GRADIENT
        target = options.target_loss
        if target is not None and state.train_loss is not None and state.train_loss <= target:
            return Reason.CONVERGED_TARGET
        if self.metric and options.patience is not None and state.waited >= options.patience:
            return Reason.STOPPED_EARLY
        return None

    def summary(self) -> dict[str, Any]:
        """What the summary says of the watched metric; empty where none is."""
        if not self.metric:
            return {}
        state = self.state
        return {
            f"best_{self.metric}": state.best,
            "best_epoch": state.best_epoch,
            "best_iteration": state.best_iteration,
        }
