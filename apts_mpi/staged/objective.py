"""Loss, gradient and caches of a network of which each rank holds a stage, over a pipeline of micro-batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from apts_mpi.local.registry import needs_evaluations
from apts_mpi.network.activations import Bundle, differentiable, gradient_of, store
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import Subdomain
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.objective.mean_loss import MeanLoss, Term
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Cache, Pass, Run
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.staged.pipeline import Pipeline
from apts_mpi.staged.schedules import SCHEDULES, Action, backwards, forwards
from apts_mpi.tools.environment import preserved_random_state
from apts_mpi.tools.events import BACKWARD, FORWARD
from apts_mpi.tools.trees import Tree, count_samples, take, tensors_of


@dataclass
class InFlight:
    """What the backward pass of a micro-batch needs of its forward pass.

    Attributes
    ----------
    entering, leaving : Tensor or tuple of Tensor
        What the stage was given and what it returned, with its graph; on the last stage what leaves is the loss.
    caches : list of Cache
        One for each subdomain of the stage.
    records : list of LayerRecord
        Calls of the recorded layers.
    """

    entering: Bundle
    leaving: Bundle | None = None
    caches: list[Cache] = field(default_factory=list)
    records: list[LayerRecord] = field(default_factory=list)


@dataclass
class StagedRun(Run):
    """A forward evaluation of all micro-batches of this rank; ``loss`` is zero but on the last stage.

    Attributes
    ----------
    in_flight : dict of int to InFlight
        Micro-batches whose backward pass is to come.
    done : list of list of Cache
        Caches of the micro-batches whose backward pass is done.
    terms : dict of int to Term
        On the last stage what the loss returned for the micro-batches whose denominator is not known yet.
    """

    in_flight: dict[int, InFlight] = field(default_factory=dict)
    done: list[list[Cache]] = field(default_factory=list)
    terms: dict[int, Term] = field(default_factory=dict)


class StagedObjective(Objective):
    """`Objective` where the network's segments, parameters and gradients are those of this rank's stage.

    A pass is a micro-batch. Its stream of random numbers, and the statistics of batch normalisation, are its own.

    Parameters
    ----------
    segmented, vector
        This rank's stage.
    pipeline
        The stages.
    options
        Of the whole solver, composed.
    team
        The ranks that hold this stage.
    loss, recorded
        See `Objective`.

    Attributes
    ----------
    enters_tuple : bool
        Whether a tuple of tensors enters this stage; known after the first evaluation.
    """

    def __init__(
        self,
        *,
        segmented: SegmentedNetwork,
        vector: FlatParameters,
        loss: MeanLoss,
        options: APTSOptions,
        recorded: Sequence[torch.nn.Module],
        pipeline: Pipeline,
        team: Communicator,
    ) -> None:
        # Gradients that are given make torch import for seconds: better here than in one stage after the other.
        point = torch.ones(1, requires_grad=True)
        torch.autograd.backward(2.0 * point, torch.ones(1))
        super().__init__(
            segmented=segmented,
            vector=vector,
            loss=loss,
            inexact=True,
            keep_gradients=needs_evaluations(options.local),
            recorded=recorded,
            comm=team,
        )
        self.pipeline = pipeline
        self._schedule = SCHEDULES[options.pipeline.schedule]
        self._cache_dtype = (
            None if options.pipeline.cache_dtype == "auto" else getattr(torch, options.pipeline.cache_dtype)
        )
        self._recompute = options.pipeline.recompute
        self._measured = False
        self.enters_tuple = False
        # MPI moves data between the segments of a stage.
        segmented.ran = pipeline.progress

    def ends_before_loss(self, subdomain: Subdomain) -> bool:
        """See `Objective`."""
        return not self.pipeline.is_last or super().ends_before_loss(subdomain)

    def forward(self, passes: Sequence[Pass], keep_graph: bool) -> StagedRun:
        """See `Objective`. Collective over the stages."""
        return self._run(passes, forwards(len(passes)), self._new_run(), keep_graph)

    def backward(self, passes: Sequence[Pass], run: Run) -> None:
        """See `Objective`."""
        assert isinstance(run, StagedRun)
        self._begin_gradient()
        self._run(passes, backwards(len(passes)), run, keep_graph=True)
        self._complete_gradient(passes, run)

    def evaluate(self, passes: Sequence[Pass]) -> StagedRun:
        """Loss, gradient and caches by the schedule of the options. Collective."""
        self._begin_gradient()
        run, count = self._new_run(), len(passes)
        # Where the denominator comes from the outputs all micro-batches are forward before the first is backward.
        for actions in (forwards(count), backwards(count)) if self.loss.is_open else (self.actions(count),):
            self._run(passes, actions, run, keep_graph=True)
        self._complete_gradient(passes, run)
        return run

    def actions(self, micro_batches: int) -> list[Action]:
        """This stage's part of the schedule of the options."""
        return self._schedule(self.pipeline.stage, self.pipeline.stages, micro_batches)

    def _new_run(self) -> StagedRun:
        return StagedRun(torch.zeros((), dtype=torch.float64, device=self._device))

    def _run(self, passes: Sequence[Pass], actions: Sequence[Action], run: StagedRun, keep_graph: bool) -> StagedRun:
        if actions[0].direction == "forward":
            self.buffers.begin()
            self._is_observed = run.is_observed = self.observes()
        # And between the parameters of a backward pass.
        listening = self.reduction.listening(self.pipeline.progress)
        with preserved_random_state(self._device), listening if keep_graph else nullcontext():
            self.pipeline.run(
                actions,
                [part.samples for part in passes],
                functools.partial(self._forward, passes, run, keep_graph),
                functools.partial(self._backward, passes, run),
            )
        if actions[0].direction == "forward":
            self._settle(passes, run)
        self._share_multiplications()
        samples = sum(part.samples for part in passes)
        again = FORWARD if self._recompute else 0.0
        for direction, cost in (("forward", FORWARD), ("backward", BACKWARD + again)):
            if any(action.direction == direction for action in actions):
                self.events.count_work(samples, self.segmented.share(0, len(self.segmented) - 1), cost)
        return run

    def begin(self, passes: Sequence[Pass]) -> None:
        """See `Objective`."""
        if self.pipeline.is_last:
            super().begin(passes)
        else:
            self.loss.begin_elsewhere()

    def _settle(self, passes: Sequence[Pass], run: StagedRun) -> None:
        """Have the losses of micro-batches as means, where their denominator was not known before."""
        if not self.pipeline.is_last:
            self.loss.close()
            return
        self.loss.settle(list(run.terms.values()), self._comm)
        for index, term in run.terms.items():
            with torch.set_grad_enabled(term.value.requires_grad):
                mean = self.loss.mean(term)
            run.loss += mean.detach().double() * passes[index].weight
            if index in run.in_flight and not self._recompute:
                run.in_flight[index].leaving = mean
        run.terms = {}

    def _share_multiplications(self) -> None:
        """Once, make `SegmentedNetwork.share` that of the whole network. Collective over the stages."""
        if not self._measured:
            self.segmented.multiplications = sum(self.pipeline.comm.collect(self.segmented.multiplications))
            self._measured = True

    def _forward(
        self, passes: Sequence[Pass], run: StagedRun, keep_graph: bool, index: int, entering: Bundle | None
    ) -> Bundle | None:
        part = passes[index]
        inputs = part.inputs if entering is None else entering
        self.enters_tuple = isinstance(inputs, tuple)
        if not self._measured:
            with self.buffers.copied(), preserved_random_state(self._device):
                self.segmented.measure(inputs, part=True)
        graph = keep_graph and not self._recompute
        flight = InFlight(inputs)
        with torch.set_grad_enabled(graph), self.buffers.noted(part.weight):
            term = self._run_stage(part, flight, graph)
        leaving = flight.leaving
        if term is not None and self.loss.is_open:
            run.terms[index] = term
        elif term is not None:
            assert isinstance(leaving, torch.Tensor)
            run.loss += leaving.detach().double() * part.weight
        if keep_graph:
            if not graph:
                flight.leaving = None
            run.in_flight[index] = flight
        return leaving

    def _run_stage(self, part: Pass, flight: InFlight, graph: bool) -> Term | None:
        """Run the stage's segments, and the loss behind the last one, which is returned."""
        if graph and not self.pipeline.is_first:
            for tensor in differentiable(flight.entering):
                tensor.requires_grad_()
        with self.recording() as flight.records:
            outputs, flight.caches = self.run_segments(part, flight.entering, graph)
        if not self.pipeline.is_last:
            flight.leaving = outputs
            return None
        term = self.loss.noted(outputs, part.targets)
        flight.leaving = self.loss.mean(term)
        return term

    def _backward(self, passes: Sequence[Pass], run: StagedRun, index: int, gradients: Bundle | None) -> Bundle | None:
        part, flight = passes[index], run.in_flight.pop(index)
        if flight.leaving is None:
            with torch.enable_grad(), self.buffers.copied():
                self._run_stage(part, flight, graph=True)
        assert flight.leaving is not None
        if index == len(passes) - 1:
            self.reduction.begin()
        with self.buffers.copied():  # what is run again (checkpointing) has been noted before
            if gradients is None:
                assert isinstance(flight.leaving, torch.Tensor)
                (flight.leaving * part.weight).backward()
            else:
                pairs = zip(differentiable(flight.leaving), tensors_of(gradients), strict=True)
                reached = [(tensor, gradient) for tensor, gradient in pairs if tensor.requires_grad]
                torch.autograd.backward([tensor for tensor, _ in reached], [gradient for _, gradient in reached])
        run.done.append(self._completed(part, flight, sum(part.weight for part in passes)))
        return None if self.pipeline.is_first else gradient_of(flight.entering)

    def _completed(self, part: Pass, flight: InFlight, weight: float) -> list[Cache]:
        """The caches with their output gradients, for local objectives that are means over all samples of this rank."""
        share = part.weight / weight
        loss = self.vector.values.new_zeros(())
        if self.pipeline.is_last:
            assert isinstance(flight.leaving, torch.Tensor)
            loss = flight.leaving.detach() * share
        for record in flight.records:
            record.complete(weight)
            record.inputs = store(record.inputs, self._cache_dtype)
            record.gradient = None if record.gradient is None else store(record.gradient, self._cache_dtype)
        for cache in flight.caches:
            self._complete(cache, loss, weight)
            cache.records, cache.share = flight.records, share
            cache.inputs = store(cache.inputs, self._cache_dtype)
            if cache.output_gradient is not None:
                cache.output_gradient = store(cache.output_gradient, self._cache_dtype)
        return flight.caches

    @torch.no_grad()
    def infer(self, inputs: Sequence[Tree], consume: Callable[[int, Any], None]) -> None:
        """See `apts_mpi.StagedAPTS.infer`."""

        def forward(index: int, entering: Bundle | None) -> Bundle:
            outputs = take(inputs[index], slice(None)) if entering is None else entering
            for segment in self.segmented.segments:
                outputs = segment(outputs)
                self.pipeline.progress()
            if self.pipeline.is_last:
                consume(index, outputs)
            return outputs

        self.pipeline.run(forwards(len(inputs)), [("inference", count_samples(part)) for part in inputs], forward)

    def load(self, cached: Any) -> Bundle:
        """See `Objective`."""
        return cached.load()

    def load_records(self, records: list[LayerRecord]) -> list[LayerRecord]:
        """See `Objective`."""
        return [
            replace(
                record,
                inputs=record.inputs.load(),
                gradient=None if record.gradient is None else record.gradient.load(),
            )
            for record in records
        ]

    def _begin_gradient(self) -> None:
        self.vector.alias_gradients()
        self.vector.gradients.zero_()

    def _complete_gradient(self, passes: Sequence[Pass], run: StagedRun) -> None:
        """Sum the gradient over the replicas, and put the caches of the micro-batches together."""
        pending = self.reduction.finish()
        weight = sum(part.weight for part in passes)
        merged = []
        for of_subdomain in zip(*run.done, strict=True):
            cache = replace(
                of_subdomain[0],
                value=torch.stack([part.value for part in of_subdomain]).sum(),
                records=[record for part in of_subdomain for record in part.records],
                micro_batches=list(of_subdomain),
            )
            if self.keep_gradients:
                own = self.vector.gradients[cache.subdomain.start : cache.subdomain.stop]
                cache.gradient = own / weight
            merged.append(cache)
        run.caches, run.done = [merged], []
        pending.wait("the sum of the gradient over replicas")
        self.vector.still(self.reduction.total)
