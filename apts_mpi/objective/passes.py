"""Passes of the network over samples, and what is kept of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from apts_mpi.network.activations import Bundle
from apts_mpi.network.partition import Subdomain, split
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.parallel.transport import on_device
from apts_mpi.tools.trees import Tree, count_samples, take, tensors_of

# Of the outputs, which may be anything that a network returns, and a tree of targets: the mean over the samples,
# or a sum over them and what it is to be divided by.
Loss = Callable[[Any, Any], torch.Tensor | tuple[torch.Tensor, Any]]

# Of a loss of either kind, the mean over the samples.
Mean = Callable[[Any, Any], torch.Tensor]

# Of layers, what adds up over the micro-batches of a pass: tensors and numbers.
Sums = dict[nn.Module, list[Any]]


class Returned(NamedTuple):
    """What the network returned in a pass, and whether it drew random numbers behind a cache's inputs."""

    outputs: Bundle
    is_random: bool


@dataclass
class Cache:
    """What a local objective needs of a pass: it never runs the segments before its own again.

    Attributes
    ----------
    subdomain : Subdomain
        Whose cache it is.
    inputs : tree of Tensor
        Activations that enter the subdomain's first segment.
    random_state : Tensor, or tuple of int
        State of the random stream there, or the key of one that begins there, so that a local evaluation draws the
        same dropout masks.
    targets : tree of Tensor
        Targets of the pass.
    outputs : tree of Tensor, or None
        Output of the subdomain's last segment; None where the local objective uses the true loss.
    output_gradient : Tensor, tuple of Tensor, or None
        Gradient of the pass's loss with respect to `outputs`.
    value : Tensor, shape (), float64
        The local objective at theta_k, without the first-order correction.
    gradient : Tensor, shape (stop - start,), or None
        Its gradient with respect to the subdomain; kept where local solvers evaluate.
    records : list of LayerRecord
        Calls of the layers that the objective was asked to record, in the whole pass.
    sums : dict of nn.Module to list, or None
        In their place, of a pass in micro-batches, what `Summaries` makes of them; None where it makes nothing.
    share : float
        Factor of the true loss of these samples in the local objective.
    micro_batches : list of Cache
        What the local objective runs over, where the samples are in several parts; empty: this cache itself.
    is_recomputed : bool
        Whether the graph of one of them is kept at a time, and computed again where it is needed again.
    is_used : bool
        Whether local problems were solved with it.
    returned : Returned or None
        By the network; kept where rows are formed, which then need no evaluation of their own.
    """

    subdomain: Subdomain
    inputs: Any
    random_state: torch.Tensor | tuple[int, ...]
    targets: Tree
    outputs: Bundle | None = None
    output_gradient: Any = None
    value: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    records: list[LayerRecord] = field(default_factory=list)
    sums: Sums | None = None
    share: float = 1.0
    micro_batches: list[Cache] = field(default_factory=list)
    is_recomputed: bool = False
    is_used: bool = False
    returned: Returned | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return count_samples(self.targets)


@dataclass
class Pass:
    """One run of the network over some of this rank's samples.

    Attributes
    ----------
    inputs, targets : tree of Tensor
        The samples.
    weight : float
        Their share of all samples of all ranks; the loss f is the weighted sum of the passes' mean losses, with one
        denominator a sample for all of them.
    stream : tuple of int
        Key of the random stream; equal keys draw equal dropout masks.
    subdomains : tuple of Subdomain
        The subdomains whose caches are filled.
    position, shard_size : int
        Where these samples begin in the shard that the team shares, and the number of its samples.
    group : int
        Number of consecutive samples that belong together.
    most : int or None
        Samples that the network is run over at a time, at most; None: all.
    """

    inputs: Tree
    targets: Tree
    weight: float
    stream: tuple[int, ...]
    subdomains: tuple[Subdomain, ...]
    position: int
    shard_size: int
    group: int = 1
    most: int | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return count_samples(self.inputs)

    def micro_batches(self) -> list[Pass]:
        """The same in parts of at most ``most`` samples, as even as may be; random streams are their own."""
        groups = self.samples // self.group
        most = groups if self.most is None else max(self.most // self.group, 1)
        count = -(-groups // most) if groups else 1
        if count == 1:
            return [self]
        places = [tuple(edge * self.group for edge in split(groups, count, index)) for index in range(count)]
        return [
            replace(
                self,
                inputs=take(self.inputs, slice(start, stop)),
                targets=take(self.targets, slice(start, stop)),
                weight=self.weight * (stop - start) / self.samples,
                stream=(*self.stream, index),
                position=self.position + start,
                most=None,
            )
            for index, (start, stop) in enumerate(places)
        ]

    def thinned(self, share: float) -> Pass | None:
        """The same with evenly spread ``share`` of the shard's groups, whichever ranks have them; None without any."""
        size = self.group
        places = torch.arange(self.position, self.position + self.samples + 1, size, dtype=torch.float64) / size
        counts = (places * share).ceil()
        chosen = (counts[1:] > counts[:-1]).nonzero().squeeze(1)
        if len(chosen) == 0:
            return None
        groups = self.shard_size // size
        shard_weight = self.weight * groups / (self.samples // size)
        weight = shard_weight * len(chosen) / math.ceil(groups * share)
        if size > 1:
            chosen = (chosen[:, None] * size + torch.arange(size)).flatten()
        chosen = on_device(chosen, tensors_of(self.inputs)[0].device)
        return replace(self, inputs=take(self.inputs, chosen), targets=take(self.targets, chosen), weight=weight)


def keeps_graphs(passes: Sequence[Pass]) -> bool:
    """Whether the graphs of all passes may be kept from the forward to the backward pass."""
    samples = sum(part.samples for part in passes)
    return all(part.most is None or samples <= part.most for part in passes)


class Summaries(Protocol):
    """Takes sums over calls of layers, so that those of one micro-batch alone are kept."""

    @property
    def is_due(self) -> bool:
        """Whether sums are wanted at the present point."""

    def sums(self, records: Sequence[LayerRecord], whole: Pass, first: int, last: int) -> Sums:
        """Of calls on samples ``first`` to ``last`` of the whole pass, their gradients those of its mean loss."""


@dataclass
class Run:
    """A forward evaluation of all passes of this rank.

    Attributes
    ----------
    loss : Tensor, shape (), float64
        This rank's part of f: the weighted sum of its passes' mean losses, see `apts_mpi.objective.mean_loss.MeanLoss`.
    losses : list of Tensor
        Mean loss of each pass, with its graph until the backward pass; none where graphs are not kept.
    caches : list of list of Cache
        Caches of each pass.
    is_observed : bool
        Whether they have what local solvers look at, see ``apts_mpi.objective.objective.Objective.observes``.
    """

    loss: torch.Tensor
    losses: list[torch.Tensor] = field(default_factory=list)
    caches: list[list[Cache]] = field(default_factory=list)
    is_observed: bool = True
