"""Loss, gradient and caches at a point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from apts_mpi.network.activations import Bundle, detached, differentiable, gradient_of, inner_product
from apts_mpi.network.buffers import Buffers
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import Subdomain
from apts_mpi.network.recorder import LayerRecord, LayerRecorder
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.objective.mean_loss import MeanLoss, Term
from apts_mpi.objective.micro_batches import Gathered, light_cache
from apts_mpi.objective.passes import Cache, Pass, Returned, Run, Summaries, keeps_graphs
from apts_mpi.objective.reduction import GradientReduction
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.environment import preserved_random_state, random_state, seed_stream, set_random_state
from apts_mpi.tools.events import BACKWARD, FORWARD
from apts_mpi.tools.trees import map_tensors, take

# Samples on which the work of the segments is measured.
FEW = 8


class Objective:
    """The loss of a batch that is spread over the ranks, as a function of the flat parameters.

    Parameters
    ----------
    segmented, vector
        The network's segments, and its flat parameters.
    loss
        The loss, with the denominator of the present batch.
    inexact
        Whether the subdomains' outputs and their gradients are cached.
    keep_gradients
        Whether the caches keep the passes' own gradients; local solvers with more than one iteration need them.
    recorded
        Layers whose inputs and output gradients are recorded.
    comm
        The ranks.

    Attributes
    ----------
    network
        The network.
    segmented, vector, loss, inexact, keep_gradients
        As given.
    buffers : Buffers
        The network's.
    reduction : GradientReduction
        Its ``total`` is the gradient of the last `backward`.
    events : Events
        Where work is counted.
    outputs_of_sample : int
        Numbers that the network returns for a sample, once it was evaluated.
    summaries : Summaries or None
        What takes sums over the calls of recorded layers, where graphs are not kept; None: the calls are kept.
    observes : callable
        Whether the next local solves look at calls of layers and outputs of segments, which then are recorded.
    keep_outputs : bool
        Whether the caches keep what the network returned, for rows in the same precision.
    knows_plain_passes_alone : bool or None
        Whether the network has what cannot be differentiated by chosen tensors alone, as reentrant checkpoints cannot;
        None until that was tried.
    """

    def __init__(
        self,
        *,
        segmented: SegmentedNetwork,
        vector: FlatParameters,
        loss: MeanLoss,
        inexact: bool,
        keep_gradients: bool,
        recorded: Sequence[torch.nn.Module] = (),
        comm: Communicator,
    ) -> None:
        self.network = vector.network
        self.segmented = segmented
        self.vector = vector
        self.loss = loss
        self.inexact = inexact
        self.buffers = Buffers(self.network, comm, vector.values)
        self.reduction = GradientReduction(vector, comm)
        self.keep_gradients = keep_gradients
        self.keep_outputs = False
        self.outputs_of_sample = 1
        self.knows_plain_passes_alone: bool | None = None
        self.summaries: Summaries | None = None
        self.observes: Callable[[], bool] = lambda: True
        self._is_observed = True
        self.record(recorded)
        self.events = comm.events
        self._comm = comm
        self._device = vector.values.device

    @property
    def epsilon(self) -> float:
        """Of the arithmetic in which the network is evaluated."""
        return torch.finfo(self.segmented.autocast or self.vector.values.dtype).eps

    def record(self, modules: Sequence[torch.nn.Module]) -> None:
        """Record inputs and output gradients of these layers from now on, and of no others."""
        self._recorder = LayerRecorder(modules)

    def begin(self, passes: Sequence[Pass]) -> None:
        """The passes are those of a new batch. Collective."""
        self.loss.begin([part.targets for part in passes], self._comm)

    @contextmanager
    def replayed(self, random: tuple[int, ...] | torch.Tensor | None = None) -> Iterator[None]:
        """Run the network in the block as it is evaluated, and leave no trace in its buffers and the random state.

        Parameters
        ----------
        random
            The random numbers to draw: those of a stream (`Pass.stream`), from a state on (`Cache.random_state`), or
            (None) whichever come.
        """
        with preserved_random_state(self._device), self.buffers.copied():
            if isinstance(random, torch.Tensor):
                set_random_state(random, self._device)
            elif random is not None:
                seed_stream(self._device, *random)
            yield

    def forward(self, passes: Sequence[Pass], keep_graph: bool) -> Run:
        """Evaluate this rank's part of f at the present parameters.

        The buffers and torch's random state are afterwards as before.

        Parameters
        ----------
        passes
            This rank's samples.
        keep_graph
            Whether `backward` will be called, and caches are wanted. Of passes in micro-batches no graph is kept.
        """
        keep_graph = keep_graph and keeps_graphs(passes)
        parts = [piece for part in passes for piece in part.micro_batches()]
        run = self._new_run()
        terms: list[Term] = []
        self._begin(passes)
        with preserved_random_state(self._device):
            for part in parts:
                with (
                    torch.set_grad_enabled(keep_graph),
                    self.buffers.noted(part.weight),
                    self.recording() as records,
                ):
                    term, caches = self._run_pass(part, keep_graph)
                for cache in caches:
                    cache.records = records
                terms.append(term)
                if keep_graph:
                    run.caches.append(caches)
                self.events.count_work(part.samples, 1.0, FORWARD)
        self.loss.settle(terms, self._comm)
        with torch.set_grad_enabled(keep_graph):
            losses = [self.loss.mean(term) for term in terms]
        for part, loss in zip(parts, losses, strict=True):
            run.loss += loss.detach().double() * part.weight
        run.losses = losses if keep_graph else []
        return run

    def _new_run(self) -> Run:
        self._is_observed = self.observes()
        return Run(torch.zeros((), dtype=torch.float64, device=self._device), is_observed=self._is_observed)

    def _begin(self, passes: Sequence[Pass]) -> None:
        self.buffers.begin()
        if not self.segmented.is_measured:
            with self.replayed():
                self.segmented.measure(take(passes[0].inputs, slice(min(passes[0].most or FEW, FEW))))

    @contextmanager
    def recording(self) -> Iterator[list[LayerRecord]]:
        """Record calls of layers in the block, if that is wanted of the present evaluation."""
        with self._recorder.recording() if self._is_observed else nullcontext(list[LayerRecord]()) as records:
            yield records

    def suits(self, run: Run) -> bool:
        """Whether an evaluation has what the next local solves look at."""
        return run.is_observed or not self.observes()

    def _run_pass(self, part: Pass, cached: bool) -> tuple[Term, list[Cache]]:
        outputs, caches = self.run_segments(part, part.inputs, cached)
        if isinstance(outputs, torch.Tensor):
            self.outputs_of_sample = outputs.numel() // part.samples
        return self.loss.noted(outputs, part.targets), caches

    def run_segments(self, part: Pass, activations: Bundle, cached: bool) -> tuple[Bundle, list[Cache]]:
        """What the last segment makes of ``activations``, with the random stream of the pass, and the caches."""
        seed_stream(self._device, *part.stream)
        caches: list[Cache] = []
        for index, segment in enumerate(self.segmented.segments):
            if cached:
                caches += [
                    Cache(subdomain, detached(activations), random_state(self._device), part.targets)
                    for subdomain in part.subdomains
                    if subdomain.first_segment == index
                ]
            activations = self.segmented.run(segment, activations)
            for cache in caches if self._is_observed else ():
                if self.ends_before_loss(cache.subdomain) and cache.subdomain.last_segment == index:
                    for tensor in differentiable(activations):
                        if tensor.requires_grad:  # behind a step function, say, nothing does
                            tensor.retain_grad()
                    cache.outputs = activations
        for cache in caches if self.keep_outputs else ():
            assert isinstance(cache.random_state, torch.Tensor)  # as it was made above
            drawn = not torch.equal(cache.random_state, random_state(self._device))
            # A copy: a network may have its outputs where the next call writes.
            outputs = map_tensors(lambda tensor: tensor.detach().clone(), activations)
            cache.returned = Returned(outputs, drawn)
        return activations, caches

    def ends_before_loss(self, subdomain: Subdomain) -> bool:
        """Whether the local objective of ``subdomain`` stops at its own last segment."""
        return self.inexact and subdomain.last_segment < len(self.segmented) - 1

    def evaluate(self, passes: Sequence[Pass]) -> Run:
        """`forward` and `backward`. Collective."""
        if keeps_graphs(passes) or self.loss.is_open or self.loss.is_pair is None:
            run = self.forward(passes, keep_graph=True)
            self.backward(passes, run)
            return run
        # A micro-batch is backward before the next is forward.
        run, terms = self._new_run(), list[Term]()
        self._begin(passes)
        self._accumulate(passes, run, terms)
        self.loss.settle(terms, self._comm)
        return run

    def load(self, cached: Any) -> Bundle:
        """What was cached, as it was."""
        return cached

    def load_records(self, records: list[LayerRecord]) -> list[LayerRecord]:
        """What was recorded, as it was."""
        return records

    def backward(self, passes: Sequence[Pass], run: Run) -> None:
        """Sum the gradient over passes and ranks into ``reduction.total``, and complete the caches. Collective.

        Parameters
        ----------
        passes, run
            The passes and their forward evaluation with its graph, at the present parameters; the graph is used up.
            Where none is kept, passes are forward again, micro-batch by micro-batch.
        """
        if not keeps_graphs(passes):
            self._accumulate(passes, run)
            return
        gradients = self.vector.gradients
        self.vector.alias_gradients()
        gradients.zero_()
        for index, (part, loss, caches) in enumerate(zip(passes, run.losses, run.caches, strict=True)):
            if self.keep_gradients:
                for cache in caches:
                    cache.gradient = gradients[cache.subdomain.start : cache.subdomain.stop].clone()
            last = index == len(passes) - 1
            if last:
                self.reduction.begin()
            # What is run again in a backward pass (checkpointing) has been noted before.
            with self.buffers.copied(), self.reduction.listening() if last else nullcontext():
                (loss * part.weight).backward()
            for record in caches[0].records if caches else ():
                record.complete(part.weight)
            for cache in caches:
                self._complete(cache, loss.detach(), part.weight)
            self.events.count_work(part.samples, 1.0, BACKWARD)
        run.losses = []
        self.reduction.finish().wait()
        self.vector.still(self.reduction.total)

    def _complete(self, cache: Cache, loss: torch.Tensor, weight: float) -> None:
        cache.value = loss.double()
        if cache.outputs is not None:
            outputs, cache.outputs = cache.outputs, None
            cache.output_gradient = map_tensors(lambda gradient: gradient / weight, gradient_of(outputs))
            cache.value = inner_product(detached(outputs), cache.output_gradient, torch.float64)
        if cache.gradient is not None:
            after = self.vector.gradients[cache.subdomain.start : cache.subdomain.stop]
            torch.sub(after, cache.gradient, out=cache.gradient).div_(weight)

    def _accumulate(self, passes: Sequence[Pass], run: Run, terms: list[Term] | None = None) -> None:
        """`backward` with the graph of one micro-batch at a time; with ``terms`` these are forward the first time."""
        self.vector.alias_gradients()
        self.vector.gradients.zero_()
        run.caches = []
        for whole in passes:
            owned = [self.vector.gradients[part.start : part.stop] for part in whole.subdomains]
            before = [gradient.clone() for gradient in owned] if self.keep_gradients else []
            pieces, gathered = whole.micro_batches(), Gathered(whole)
            for piece in pieces:
                if whole is passes[-1] and piece is pieces[-1]:
                    self.reduction.begin()
                term = self._through(piece, gathered, terms is not None)
                if terms is not None:
                    terms.append(term)
                    run.loss += self.loss.mean(term).double() * piece.weight
            gradients = [(after - old).div_(whole.weight) for after, old in zip(owned, before, strict=False)]
            run.caches.append(gathered.merged(gradients))
        self.reduction.finish().wait()
        self.vector.still(self.reduction.total)

    def _through(self, piece: Pass, gathered: Gathered, is_first_time: bool) -> Term:
        """A micro-batch forwards and backwards. Returns what its loss returned, without a graph."""
        noted = self.buffers.noted(piece.weight) if is_first_time else self.buffers.copied()
        # What leaves a subdomain, and its gradient, are found by a pass through all of the network alone.
        kept = self.inexact and self.keep_gradients
        is_recorded = self.summaries is None or self.summaries.is_due
        recording = self.recording() if is_recorded else nullcontext(list[LayerRecord]())
        with preserved_random_state(self._device), torch.enable_grad(), noted, recording as records:
            term, caches = self._run_pass(piece, kept)
            loss = self.loss.mean(term)
        several = gathered.received(piece, records, self.summaries)
        with self.buffers.copied(), self.reduction.listening() if self.reduction.is_begun else nullcontext():
            (loss * piece.weight).backward()
        self.events.count_work(piece.samples, 1.0, FORWARD + BACKWARD)
        gathered.take(piece, several, self.summaries if is_recorded else None)
        if not kept:
            caches = [light_cache(piece, subdomain) for subdomain in piece.subdomains]
        whole = gathered.whole
        for cache in caches:
            cache.share = piece.weight / whole.weight
            self._complete(cache, loss.detach() * cache.share, whole.weight)
        gathered.caches.append(caches)
        return term._replace(value=term.value.detach())
