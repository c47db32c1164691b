"""A step on trial: f_k at its end, one decision for all ranks, and the step taken or the point restored."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, replace

import numpy as np
import torch

from apts_mpi.errors import SharedInvalidInput, name_remedy
from apts_mpi.network.parameters import FREEZES
from apts_mpi.network.places import Places
from apts_mpi.network.segments import lower_precision
from apts_mpi.objective.batch import Batch
from apts_mpi.objective.mean_loss import check_fault
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Run
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.parts import Parts
from apts_mpi.result import State
from apts_mpi.tools.environment import random_state, set_random_state
from apts_mpi.trust_region.acceptance import Judged, judge_measured, judge_untried, judged_of
from apts_mpi.trust_region.decay import decrease, pulled
from apts_mpi.trust_region.initial_radius import cauchy_length
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.measured import Measured, measured, parts_of_step
from apts_mpi.trust_region.next_batch import BEGIN, LastStep, length_in_walk
from apts_mpi.trust_region.norms import norm

# A ratio that a model of the loss seldom has, however long the step: losses that do not belong together have it.
LEAST_RHO, LARGEST_RHO = -1.0, 3.0

# Without a handler of the user's, warnings go to stderr.
_LOG = logging.getLogger("apts_mpi")


class Trials:
    """Judges steps of all parameters in the one ball of the trust region.

    Parameters
    ----------
    objective
        The global objective.
    inner
        Inner products over all parameters.
    comm
        All ranks.
    options
        Of the whole solver.
    last_step
        The last accepted step, where the next batch judges the radius.
    check_loss
        Of the holding: sees whether the loss is what the method minimises, see ``apts_mpi.holding.Holding``.
    reach
        Of the Schwarz level: share of the radius at which balls of subdomains may have cut the sum of corrections.

    Attributes
    ----------
    work : float
        Of the present iteration as of the last trial, on the rank with most, see ``apts_mpi.tools.events.Events.work``.
    notes : list of str
        Of the present iteration, what ranks did for the first time in the place of what they could not do.
    """

    def __init__(
        self,
        objective: Objective,
        inner: InnerProducts,
        comm: Communicator,
        options: APTSOptions,
        last_step: LastStep | None,
        check_loss: Callable[..., None],
        reach: float = 1.0,
    ) -> None:
        self._objective = objective
        self._inner = inner
        self._comm = comm
        self._options = options.trust_region
        self._momentum = options.local.momentum or 0.0
        self._last_step = last_step
        self._check_loss = check_loss
        self._reach = reach
        self._doubts = 0
        # This rank's part of the present batch's slope along the last step.
        self._after = 0.0
        self._values = objective.vector.values
        # The last point that was judged.
        self._before = self._values.clone()
        # Of the parameters on all ranks, and only where their shrinking is asked for, which costs a product.
        self._decay = self._options.weight_decay
        self._size = float(self._inner.sum(np.array([float(len(self._values))]))[0]) if self._decay else 0.0
        self._is_lower = options.autocast != "none"
        # Of the evaluations.
        self._epsilon = torch.finfo(lower_precision(options.autocast) or self._values.dtype).eps
        self.work = 0.0
        self.notes: list[str] = []

    def first_radius(self, batch: Batch) -> float:
        """The length of the Cauchy step, where the gradient is known. Collective."""
        with self._comm.events.timed("global evaluation"):
            begin = 1.0 if self._last_step is None else BEGIN
            parts = self._objective, batch.passes, self._inner, self._comm, self._options
            return begin * cauchy_length(*parts, epsilon=self._epsilon, scratch=self._before)

    def fit(self, correction: torch.Tensor, radius: float) -> torch.Tensor:
        """The step of a correction: cut to the ball, in place, and with the pull of its matrices. Collective."""
        self._inner.clip(correction, radius)
        if not self._options.pull:
            return correction
        vector = self._objective.vector
        step = vector.still(pulled(correction, vector.matrices(), self._options.pull, self._inner))
        self._inner.clip(step, radius)
        return step

    def look_back(self, state: State, batch: Batch, present: Run, forget: Callable[[], None]) -> Judged | None:
        """Let a batch judge the step before, and take that back where it was a bad one. Collective.

        Parameters
        ----------
        state
            Its radius moves on.
        batch, present
            The samples, and their evaluation at the present point, with its gradient.
        forget
            Called where the point changes.

        Returns
        -------
        Judged or None
            The step that is taken back; None where it stands.
        """
        self._after = 0.0
        if self._last_step is None or state.slope >= 0.0:
            return None
        with self._comm.events.timed("global evaluation"):
            gradient, last = self._objective.reduction.total, self._last_step.vector
            loss, self._after = torch.stack([present.loss, torch.dot(gradient, last).double()]).tolist()

            def doubt(parts: Parts) -> Sequence[float]:
                whole, after = parts.sums
                return [state.is_far(whole) or not math.isfinite(after)]

            (doubtful,) = self._comm.combine(Parts(sums=[loss, self._leading(self._after)]), doubt)
            return self._compare(state, batch, loss, forget) if doubtful else None

    def _compare(self, state: State, batch: Batch, loss: float, forget: Callable[[], None]) -> Judged | None:
        """Evaluate f_k where the last step began, and let rank 0 decide whether to go back to there. Collective."""
        assert self._last_step is not None
        self._values.sub_(self._last_step.vector)
        with self._objective.buffers.unnoted():
            start = self._objective.forward(batch.passes, keep_graph=False)
        length = self._leading(float(norm(self._objective.reduction.total, "2")))
        own = Parts([float(start.loss), loss], [self._comm.events.work], [length])

        def decide(parts: Parts) -> Sequence[float]:
            before, after = parts.sums
            return [*astuple(state.taken_back(before, after, parts.norms[0], self._options)), *parts.largest]

        *record, self.work = self._comm.combine(own, decide)
        judged = judged_of(record)
        if judged.accepted:
            self._values.copy_(self._before)
            return None
        self._before.copy_(self._values)
        forget()
        state.starting = False
        state.move(judged, self._options)
        return judged

    def judge(
        self,
        state: State,
        batch: Batch,
        present: Run,
        step: torch.Tensor,
        predicted_reduction: float | None,
        keep_graph: bool,
    ) -> tuple[Judged, Run | None]:
        """Evaluate f_k at the end of ``step``, let rank 0 judge, and take the step or restore the point. Collective.

        Where the next batch judges nothing is evaluated but at the start, see ``apts_mpi.result.State.is_on_trial``.

        Parameters
        ----------
        state
            Its radius and window move on.
        batch, present
            The samples, and their evaluation at the present point, with its gradient.
        step : Tensor, shape (n,)
            The step.
        predicted_reduction
            None: that of the first-order model.
        keep_graph
            Whether the evaluation at the end of the step will be differentiated.

        Returns
        -------
        judged : Judged
        trial : Run or None
            The evaluation there; None without one, or where the parameters shrank after the step.

        Raises
        ------
        SharedInvalidInput
            For a loss that is not, for this batch, what it was for the first.
        """
        gradient = self._objective.reduction.total
        step, predicted_reduction = self._inner.within(self._before, gradient, step, predicted_reduction)
        last = self._last_step
        tried = last is None or state.is_on_trial
        with self._comm.events.timed("judge"):
            self._values.add_(self._objective.vector.still(step))
            trial = self._objective.forward(batch.passes, keep_graph) if tried else None
            # With autocast samples are rounded independently of each other; what is summed of them much less.
            rounding = self._epsilon / (batch.size**0.5 if self._is_lower else 1.0)

            def decide(parts: Parts) -> Sequence[float]:
                found = measured(parts, self._inner.kind)
                judged = self._judged(found, state, predicted_reduction, rounding if tried else None)
                *_, after, square, away = parts.sums
                starting, retry, farthest = state.starting, state.retry, max(state.farthest, math.sqrt(away))
                if last is not None:
                    # The distance is a 2-norm, and says nothing about a ball of another one; a metric bounds the walk.
                    free = self._inner.kind == "2" and self._inner.metric is None
                    steps = state.walked + 1 if free else math.inf
                    least = length_in_walk(farthest, steps, self._momentum)
                    judged, starting, retry = state.judged_by_next(judged, after, self._options, least)
                farthest = farthest if judged.accepted else state.farthest
                return [*astuple(judged), starting, retry, farthest, math.sqrt(square), *parts.largest[-5:]]

            products = self._inner.own(gradient, step)
            square = torch.linalg.vector_norm(step if self._decay else step[:0], dtype=torch.float64).square()
            # Many times faster than to compare elements, as bits do not come into it.
            moved = torch.stack(torch.aminmax(self._values - self._before)).double().abs().sum().ne(0.0).double()
            fault = self._objective.loss.fault(moved)
            away = last.away(self._values, self._before, state.walked) if last else torch.zeros_like(square)
            found = present.loss, (trial or present).loss, moved, *products, square, away, fault
            # The device is waited for here, once for all numbers.
            *own, square_of_step, away_here, fault_here = torch.stack(found).tolist()
            events, froze = self._comm.events, self._objective.vector.lost_gradients
            told = parts_of_step(self._comm.rank, self._inner.kind, self._leading(1.0) > 0.0, own)
            sums = [*told.sums, *map(self._leading, (self._after, square_of_step, away_here))]
            seen = events.work, fault_here, froze, len(events.notes.fresh), self._objective.buffers.have_moved
            told = replace(told, sums=sums, largest=[*told.largest, *seen])
            *record, starting, retry, farthest, length, self.work, flaw, frozen, news, moving = self._comm.combine(
                told, decide
            )
            check_fault(flaw)
            if frozen:
                raise SharedInvalidInput(FREEZES)
            if news:
                self.notes += dict.fromkeys(note for own in self._comm.collect(events.notes.take()) for note in own)
            judged, state.starting, state.retry, state.farthest = judged_of(record), bool(starting), retry, farthest
            if judged.accepted:
                self._objective.buffers.accept(*self._moves(length), moved_somewhere=bool(moving))
                if last is not None:
                    last.vector.copy_(step)
            else:
                self._values.copy_(self._before)
            state.move(judged, self._options)
        self._doubt(judged, batch)
        return judged, None if self._decay and judged.accepted else trial

    def _judged(
        self, found: Measured, state: State, predicted_reduction: float | None, rounding: float | None
    ) -> Judged:
        """The step as all ranks see it; without ``rounding`` one that was not tried."""
        options, radius = self._options, state.present_radius
        if rounding is None:
            return judge_untried(found, options=options, radius=radius, predicted_reduction=predicted_reduction)
        return judge_measured(
            found,
            options=options,
            radius=radius,
            predicted_reduction=predicted_reduction,
            earlier_losses=state.losses,
            rounding=rounding,
            share=self._reach,
        )

    def _leading(self, number: float) -> float:
        """What this rank has of a sum over the parts of vectors."""
        return number if self._inner.leads(self._comm.rank) else 0.0

    def _moves(self, length: float) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What is copied where after an accepted step of that 2-norm: with weight decay, shrunk parameters to both.

        It is no part of the step that is judged: rho says how good the model is, which knows nothing of it.
        """
        if not self._decay:
            return [(self._before, self._values)]
        # Frozen parameters stay as they are.
        shrunk = self._values + self._objective.vector.still(decrease(self._values, self._decay, length, self._size))
        return [(self._before, shrunk), (self._values, shrunk)]

    def _doubt(self, judged: Judged, batch: Batch) -> None:
        """See whether the loss still is the same the second time, where rho is of no model's making. Collective.

        A network may begin to draw random numbers, or to count, after the first batch. Most such steps have another
        cause: one of two, of four, of eight is looked into.
        """
        if judged.skipped or not math.isfinite(judged.rho) or LEAST_RHO <= judged.rho <= LARGEST_RHO:
            return
        self._doubts += 1
        if self._doubts & (self._doubts - 1) == 0:
            self._check_loss(batch, doubted=True)

    def told(self, more: Sequence[str] = ()) -> tuple[str, ...]:
        """The notes of the iteration, and more that all ranks have, which rank 0 logs."""
        self.notes += more
        if self._comm.rank == 0:
            for note in self.notes:
                _LOG.warning("%s", note)
        return tuple(self.notes)

    @contextmanager
    def iteration(self, forget: Callable[[], None]) -> Iterator[None]:
        """Count the work of one iteration, the block, and undo what is left of it in part.

        Whatever leaves the block by an exception (an interrupt, a failing hook, no memory) leaves parameters, buffers
        and random state at the last point that was judged.

        Parameters
        ----------
        forget
            Called then, as what is known of the point may be there in part.
        """
        device = self._values.device
        places, random = Places(self._objective.network), random_state(device)
        self._before.copy_(self._values)
        self._comm.events.work = 0.0
        self.notes = []
        try:
            with self._objective.vector.evaluated():
                yield
        except BaseException as error:
            name_remedy(error)
            # Here and not in the blocks within: an interrupt may come at their ends, too.
            places.put_back()
            self._values.copy_(self._before)
            set_random_state(random, device)
            torch.set_grad_enabled(True)
            self._objective.reduction.abandon()
            forget()
            raise
