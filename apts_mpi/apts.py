"""The Additively Preconditioned Trust-Region Strategy: the loop and its state (arXiv 2512.14286)."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from mpi4py import MPI

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.checkpoint.format import Checkpoint
from apts_mpi.holding import Holding, kept_steps
from apts_mpi.network.segments import Forward
from apts_mpi.objective.batch import Batch, Rows, Samples, check_call
from apts_mpi.objective.passes import Loss, Run
from apts_mpi.options import APTSOptions
from apts_mpi.replicated import Replicated
from apts_mpi.result import Known, Saved, State, StepResult
from apts_mpi.state.tensors import named_tensors
from apts_mpi.tools.environment import seconds
from apts_mpi.trial import Trials
from apts_mpi.trust_region.acceptance import Judged


class APTS:
    """Trains a network with nonlinear additive Schwarz over its parameters inside a trust region.

    The network's own parameters are the iterate: between steps ``network(x)`` and ``network.state_dict()`` just work.
    Making a solver is collective: rank 0's parameters and buffers are given to all ranks.

    Parameters
    ----------
    network
        An ``nn.Module`` with float32 or float64 parameters; an ``nn.Sequential`` lets local solves leave layers out.
    loss
        Function of (outputs, targets) that returns the mean over samples, shape (), or a sum and what it is divided by.
    comm
        Any mpi4py intracommunicator; None is ``MPI.COMM_WORLD``.
    options
        The configuration; the attribute has what its ``auto`` values stand for.
    forward
        Function of (network, inputs) that returns the outputs. None: ``network(inputs)``; of a mapping ``(**inputs)``.

    Attributes
    ----------
    holding : Holding
        What this rank holds, and the parts of the solver.
    network, comm, events, batch
        The network, the ranks, the timers and counters of this one, and the batch of the last step.
    state : State
        What an iteration leaves to the next.

    Raises
    ------
    InvalidInput
        On every rank, for a network or options that cannot be used.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        loss: Loss,
        *,
        comm: MPI.Intracomm | None = None,
        options: APTSOptions | None = None,
        forward: Forward | None = None,
    ) -> None:
        self._begin(Replicated(network, loss, comm, options or APTSOptions(), forward))

    def _begin(self, holding: Holding) -> None:
        """Have done no iteration yet."""
        self.holding, self.network, self.options, self.comm = holding, holding.network, holding.options, holding.comm
        self.events = holding.comm.events
        self._gradient = holding.objective.reduction.total
        self.state = State(radius=self.options.trust_region.initial_radius)
        parts = holding.objective, holding.inner, self.comm, self.options, holding.last_step, holding.check_loss
        self._trials, self._saved = Trials(*parts, reach=holding.schwarz.reach), Saved()
        self._forget()

    def step(self, batch: Samples | None = None, rows: Rows = None, done: float | None = None) -> StepResult:
        """Do one iteration: evaluate, solve locally, assemble, judge. Collective.

        Parameters
        ----------
        batch
            Trees of inputs and targets, samples in the first dimension: the whole batch on every rank, or this rank's
            own shard (``options.batch``). None: that of the step before, of which nothing known is computed again.
        rows : Tensor of int, optional
            The samples of ``batch`` that count, in this order, the same on every rank: a rank copies its own part only.
        done
            Share of the run that is behind, from 0 to 1, the same on every rank, for ``noise batches``; None: unknown.

        Raises
        ------
        InvalidInput
            On every rank, for a batch that is too small, a network that was changed, or a loss that is no mean.
        """
        started, again = seconds(), self._goes_on(batch is None, done)
        with self._trials.iteration(self._forget):
            self._take(batch, rows, done)
            run = self._evaluate()
            schwarz = self._trials.look_back(self.state, self.batch, run, self._forget)
            schwarz = schwarz or self._judge(run, *self._correct(run), keep_graph=again)
            return self._report(schwarz, self._follow(schwarz, keep_graph=again), started)

    def _goes_on(self, again: bool, done: float | None) -> bool:
        """See whether a step can be made and what the user has changed since the last one; whether with its batch."""
        check_call(not again or hasattr(self, "batch"), done)
        if self.holding.watch.look(not again, kept_steps(self.holding)):
            self._forget()
            self.state.forget_step()
        return again

    def _take(self, samples: Samples | None, rows: Rows, done: float | None) -> None:
        """Make a new batch the present function f_k."""
        self.state.see_end(None if self.holding.last_step is None else done)
        self.state.begin(again=samples is None)
        if samples is not None:
            with self.events.timed("data"):
                self.batch: Batch = self.holding.cut(samples, rows, (self.options.seed, self.state.functions))
                self._forget()
                self.holding.check_loss(self.batch)

    def _forget(self) -> None:
        """The point or the function changed: nothing known of it holds any more."""
        self._run: Run | None = None
        self._has_gradient = self._has_correction = False

    def _evaluate(self) -> Run:
        """Loss, gradient and caches at the present point; and have a radius."""
        objective, passes = self.holding.objective, self.batch.passes
        with self.events.timed("global evaluation"):
            if self._run is None or not (self._has_correction or objective.suits(self._run)):
                self._run = objective.evaluate(passes)
            elif not self._has_gradient:
                objective.backward(passes, self._run)
            if not self._has_gradient:
                self._has_gradient = True
                if self.holding.global_step is not None:
                    self.holding.global_step.observe(self.state.functions, self._gradient)
        if self.state.radius is None:
            self.state.radius = self._trials.first_radius(self.batch)
        return self._run

    def _correct(self, run: Run) -> tuple[torch.Tensor, float | None]:
        """The Schwarz step within the ball of the present radius, and its predicted reduction if a model gave it."""
        schwarz, coarse = self.holding.schwarz, self.holding.coarse
        if not self._has_correction:
            known = self._gradient, self.state.present_radius, self.state.same
            pending = schwarz.start_correction(self.batch, run.caches, *known)
            with self.events.timed("assembly"):
                pending.wait()
            self._prepare_coarse()
        if coarse is not None:
            return coarse.step, coarse.recombine(self.state)
        with self.events.timed("assembly"):
            return self._trials.fit(schwarz.correction, self.state.present_radius), schwarz.predicted_reduction()

    def _prepare_coarse(self) -> None:
        self._has_correction = True
        if self.holding.coarse is not None:
            self.holding.coarse.prepare(self.batch, self.holding.schwarz.columns(), self._gradient)

    def _judge(self, run: Run, step: torch.Tensor, predicted: float | None, keep_graph: bool) -> Judged:
        """Take the step or restore the point; see `Trials.judge`."""
        judged, trial = self._trials.judge(self.state, self.batch, run, step, predicted, keep_graph)
        if judged.accepted:
            self._forget()
            self._run = trial if keep_graph else None
        self._has_correction &= self.holding.schwarz.is_known_in(judged.next_radius, judged.radius)
        return judged

    def _follow(self, schwarz: Judged, keep_graph: bool) -> Judged | None:
        """The coarse level takes note; then steps over all parameters from there: the last accepted, or the first."""
        self.state.same = self.state.same.relaxed(schwarz)
        if self.holding.coarse is not None and not schwarz.skipped:
            self.holding.coarse.follow(schwarz, schwarz.rho < self.options.trust_region.shrink_below)
        state, find, shown = self.state, self.holding.global_step, None
        if find is None or schwarz.skipped or not find.is_due(state.same, self.batch.passes):
            return None
        for left in reversed(range(self.options.global_step.iterations)):
            run = self._evaluate()
            with state.ball_of(apart=find.is_automatic):
                step, predicted = find(self.batch.passes, self._gradient, state.present_radius, state.same)
                judged = self._judge(run, step, predicted, keep_graph or left > 0)
            shown = judged if judged.accepted or shown is None else shown
        state.same = find.weigh(state.same, schwarz, shown or schwarz)
        return shown

    def _report(self, schwarz: Judged, global_step: Judged | None, started: float) -> StepResult:
        """Count the iteration, and say what it did."""
        self._trials.work += self.holding.adapt(self.batch, self.state.iteration + 1, schwarz.accepted, self._forget)
        notes = self._trials.told(self.holding.plateau.follow(schwarz) if self.holding.plateau else ())
        evaluations = self._trials.work * self.comm.size / self.batch.size
        known = evaluations, seconds() - started, notes, self.state.same.converged
        self.state.count(result := StepResult(self.state.iteration + 1, schwarz, global_step, *known))
        return result

    def save(self) -> tuple[list[Array], dict[str, Any]]:
        """Network and state of the solver, for `apts_mpi.checkpoint.CheckpointDirectory.save`. Collective.

        The arrays are views where the values are in host memory: save them before the next `step`.

        Returns
        -------
        arrays, metadata
            Named arrays, of which each rank has a share; and the rest, for JSON.
        """
        arrays, metadata = self.holding.save(self.holding.schwarz.assembled if self._has_correction else None)
        known = {"evaluated": self._run is not None, "differentiated": self._has_gradient}
        return arrays, metadata | known | {"state": asdict(self.state), "composed": asdict(self.options)}

    def load(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> list[str]:
        """Take over network and state from a checkpoint of any number of ranks and subdomains. Collective.

        If the next step is to be one without a batch, as after a rejection, `repeat` has to give the batch before.

        Parameters
        ----------
        checkpoint, metadata
            The file, from `apts_mpi.checkpoint.open_checkpoint` or ``newest_valid`` there; and what `save` returned.

        Returns
        -------
        list of str
            What could not be taken over by options that are others now, a sentence each.

        Raises
        ------
        SharedInvalidInput
            For the checkpoint of another network, naming the first difference.
        """
        with self.comm.shared_errors():
            self.holding.objective.vector.check_alias()
            known = Known.of(metadata, checkpoint.path)
            correction, notices = self.holding.load(checkpoint, metadata)
        self._forget()
        self.state, self._saved = known.state, Saved(known.evaluated, known.differentiated, correction)
        return notices

    def repeat(self, batch: Samples, rows: Rows = None) -> None:
        """Give the batch of the last step again after `load`, so that `step` goes on without one. Collective."""
        with self.events.timed("data"):
            self.batch = self.holding.cut(batch, rows, (self.options.seed, self.state.functions))
            self.holding.check_loss(self.batch)
        self._forget()
        if self._saved.differentiated:
            with self.holding.objective.vector.evaluated():
                run = self._evaluate()
                if self._saved.correction is not None:
                    self.holding.schwarz.reuse(self._saved.correction, run.caches)
                    self._prepare_coarse()
        elif self._saved.evaluated:
            with self.events.timed("global evaluation"):
                self._run = self.holding.objective.forward(self.batch.passes, keep_graph=True)

    @property
    def parameters(self) -> int:
        """Number of parameters that are trained."""
        return self.holding.parameters

    @property
    def smallest_batch(self) -> int:
        """Samples that a batch needs."""
        return self.holding.smallest_batch

    @property
    def subdomains(self) -> int:
        """Number of subdomains."""
        return self.holding.decomposition.count

    def shared(self) -> tuple[list[torch.Tensor], object]:
        """Tensors that have the same bits on all ranks that hold them, and numbers that have on all ranks."""
        return [*named_tensors(self.network).values(), *kept_steps(self.holding)], self.state

    def describe(self) -> str:
        """The composed solver, in words, for ``--view``."""
        return self.holding.describe()
