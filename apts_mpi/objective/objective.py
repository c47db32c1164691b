"""Loss, gradient and caches at a point."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from apts_mpi.network.activations import Bundle, detached, differentiable, gradient_of, inner_product, map_tensors
from apts_mpi.network.buffers import Buffers
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import Subdomain
from apts_mpi.network.recorder import LayerRecord, LayerRecorder
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.objective.reduction import GradientReduction
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import on_device
from apts_mpi.tools.environment import preserved_random_state, random_state, seed_stream
from apts_mpi.tools.events import BACKWARD, FORWARD, Events

Loss = Callable[[Any, torch.Tensor], torch.Tensor]


@dataclass
class Cache:
    """What a local objective needs of a pass: it never runs the segments before its own again.

    Attributes
    ----------
    subdomain : Subdomain
        Whose cache it is.
    inputs : Tensor or tuple of Tensor
        Activations that enter the subdomain's first segment.
    random_state : Tensor
        State of the random stream there, so that a local evaluation draws the same dropout masks.
    targets : Tensor
        Targets of the pass.
    outputs : Tensor, tuple of Tensor, or None
        Output of the subdomain's last segment; None where the local objective uses the true loss.
    output_gradient : Tensor, tuple of Tensor, or None
        Gradient of the pass's loss with respect to `outputs`.
    value : Tensor, shape (), float64
        The local objective at theta_k, without the first-order correction.
    gradient : Tensor, shape (stop - start,), or None
        Its gradient with respect to the subdomain; kept where local solvers evaluate.
    records : list of LayerRecord
        Calls of the layers that the objective was asked to record, in the whole pass.
    share : float
        Factor of the true loss of these samples in the local objective.
    micro_batches : list of Cache
        What the local objective runs over, where the samples are in several parts; empty: this cache itself.
    """

    subdomain: Subdomain
    inputs: Any
    random_state: torch.Tensor
    targets: torch.Tensor
    outputs: Bundle | None = None
    output_gradient: Any = None
    value: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    records: list[LayerRecord] = field(default_factory=list)
    share: float = 1.0
    micro_batches: list[Cache] = field(default_factory=list)


@dataclass
class Pass:
    """One run of the network over some of this rank's samples.

    Attributes
    ----------
    inputs, targets : Tensor
        The samples.
    weight : float
        Their share of all samples of all ranks; the loss f is the weighted sum of the passes' mean losses.
    stream : tuple of int
        Key of the random stream; equal keys draw equal dropout masks.
    subdomains : tuple of Subdomain
        The subdomains whose caches are filled.
    position, shard_size : int
        Where these samples begin in the shard that the team shares, and the number of its samples.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    weight: float
    stream: tuple[int, ...]
    subdomains: tuple[Subdomain, ...]
    position: int
    shard_size: int

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.inputs.shape[0]

    def thinned(self, share: float) -> Pass | None:
        """The same with evenly spread ``share`` of the shard's samples, whichever ranks have them; None without any."""
        places = torch.arange(self.position, self.position + self.samples + 1, dtype=torch.float64)
        counts = (places * share).ceil()
        chosen = on_device((counts[1:] > counts[:-1]).nonzero().squeeze(1), self.inputs.device)
        if len(chosen) == 0:
            return None
        shard_weight = self.weight * self.shard_size / self.samples
        weight = shard_weight * len(chosen) / math.ceil(self.shard_size * share)
        return replace(self, inputs=self.inputs[chosen], targets=self.targets[chosen], weight=weight)


@dataclass
class Run:
    """A forward evaluation of all passes of this rank.

    Attributes
    ----------
    loss : Tensor, shape (), float64
        This rank's part of f: the weighted sum of its passes' mean losses.
    losses : list of Tensor
        Mean loss of each pass, with its graph until the backward pass.
    caches : list of list of Cache
        Caches of each pass.
    """

    loss: torch.Tensor
    losses: list[torch.Tensor] = field(default_factory=list)
    caches: list[list[Cache]] = field(default_factory=list)


class Objective:
    """The loss of a batch that is spread over the ranks, as a function of the flat parameters.

    Parameters
    ----------
    network, segmented, vector
        The network, its segments and its flat parameters.
    loss
        Function of (outputs, targets) that returns the mean over samples, shape ().
    inexact
        Whether the subdomains' outputs and their gradients are cached.
    keep_gradients
        Whether the caches keep the passes' own gradients; local solvers with more than one iteration need them.
    recorded
        Layers whose inputs and output gradients are recorded.
    comm, events
        The ranks, and where work is counted.
    """

    def __init__(
        self,
        *,
        network: torch.nn.Module,
        segmented: SegmentedNetwork,
        vector: FlatParameters,
        loss: Loss,
        inexact: bool,
        keep_gradients: bool,
        recorded: Sequence[torch.nn.Module] = (),
        comm: Communicator,
        events: Events,
    ) -> None:
        self.network = network
        self.segmented = segmented
        self.vector = vector
        self.loss = loss
        self.inexact = inexact
        self.buffers = Buffers(network, comm, vector.values)
        self.reduction = GradientReduction(vector, comm)
        self._keep_gradients = keep_gradients
        self._recorder = LayerRecorder(recorded)
        self._events = events
        self._device = vector.values.device

    def forward(self, passes: Sequence[Pass], keep_graph: bool) -> Run:
        """Evaluate this rank's part of f at the present parameters.

        The buffers and torch's random state are afterwards as before.

        Parameters
        ----------
        passes
            This rank's samples.
        keep_graph
            Whether `backward` will be called, and caches are wanted.
        """
        run = Run(torch.zeros((), dtype=torch.float64, device=self._device))
        self.buffers.begin()
        with preserved_random_state(self._device):
            with self.buffers.copied():
                self.segmented.measure(passes[0].inputs[:8])
            for part in passes:
                with (
                    torch.set_grad_enabled(keep_graph),
                    self.buffers.noted(part.weight),
                    self._recorder.recording() as records,
                ):
                    loss, caches = self._run_pass(part, keep_graph)
                for cache in caches:
                    cache.records = records
                run.loss += loss.detach().double() * part.weight
                if keep_graph:
                    run.losses.append(loss)
                    run.caches.append(caches)
                self._events.count_work(part.samples, 1.0, FORWARD)
        return run

    def _run_pass(self, part: Pass, cached: bool) -> tuple[torch.Tensor, list[Cache]]:
        outputs, caches = self.run_segments(part, part.inputs, cached)
        return self.loss(outputs, part.targets), caches

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
            for cache in caches:
                if self.ends_before_loss(cache.subdomain) and cache.subdomain.last_segment == index:
                    for tensor in differentiable(activations):
                        if tensor.requires_grad:  # behind a step function, say, nothing does
                            tensor.retain_grad()
                    cache.outputs = activations
        return activations, caches

    def ends_before_loss(self, subdomain: Subdomain) -> bool:
        """Whether the local objective of ``subdomain`` stops at its own last segment."""
        return self.inexact and subdomain.last_segment < len(self.segmented) - 1

    def evaluate(self, passes: Sequence[Pass]) -> Run:
        """`forward` and `backward`. Collective."""
        run = self.forward(passes, keep_graph=True)
        self.backward(passes, run)
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
        """
        gradients = self.vector.gradients
        self.vector.alias_gradients()
        gradients.zero_()
        for index, (part, loss, caches) in enumerate(zip(passes, run.losses, run.caches, strict=True)):
            if self._keep_gradients:
                for cache in caches:
                    cache.gradient = gradients[cache.subdomain.start : cache.subdomain.stop].clone()
            if index == len(passes) - 1:
                self.reduction.begin()
            (loss * part.weight).backward()
            for record in caches[0].records if caches else ():
                record.complete(part.weight)
            for cache in caches:
                self._complete(cache, loss.detach(), part.weight)
            self._events.count_work(part.samples, 1.0, BACKWARD)
        run.losses = []
        self.reduction.finish().wait()

    def _complete(self, cache: Cache, loss: torch.Tensor, weight: float) -> None:
        cache.value = loss.double()
        if cache.outputs is not None:
            outputs, cache.outputs = cache.outputs, None
            cache.output_gradient = map_tensors(lambda gradient: gradient / weight, gradient_of(outputs))
            cache.value = inner_product(detached(outputs), cache.output_gradient, torch.float64)
        if cache.gradient is not None:
            after = self.vector.gradients[cache.subdomain.start : cache.subdomain.stop]
            torch.sub(after, cache.gradient, out=cache.gradient).div_(weight)
