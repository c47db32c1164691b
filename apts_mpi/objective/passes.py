"""Passes of the network over samples, and what is kept of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from apts_mpi.network.activations import Bundle
from apts_mpi.network.partition import Subdomain
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.parallel.transport import on_device
from apts_mpi.tools.trees import Tree, count_samples, take, tensors_of

# Of the outputs, which may be anything that a network returns, and a tree of targets: the mean over the samples,
# or a sum over them and what it is to be divided by.
Loss = Callable[[Any, Any], torch.Tensor | tuple[torch.Tensor, Any]]

# Of a loss of either kind, the mean over the samples.
Mean = Callable[[Any, Any], torch.Tensor]


@dataclass
class Cache:
    """What a local objective needs of a pass: it never runs the segments before its own again.

    Attributes
    ----------
    subdomain : Subdomain
        Whose cache it is.
    inputs : tree of Tensor
        Activations that enter the subdomain's first segment.
    random_state : Tensor
        State of the random stream there, so that a local evaluation draws the same dropout masks.
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
    share : float
        Factor of the true loss of these samples in the local objective.
    micro_batches : list of Cache
        What the local objective runs over, where the samples are in several parts; empty: this cache itself.
    """

    subdomain: Subdomain
    inputs: Any
    random_state: torch.Tensor
    targets: Tree
    outputs: Bundle | None = None
    output_gradient: Any = None
    value: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    records: list[LayerRecord] = field(default_factory=list)
    share: float = 1.0
    micro_batches: list[Cache] = field(default_factory=list)

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
    """

    inputs: Tree
    targets: Tree
    weight: float
    stream: tuple[int, ...]
    subdomains: tuple[Subdomain, ...]
    position: int
    shard_size: int
    group: int = 1

    @property
    def samples(self) -> int:
        """Number of samples."""
        return count_samples(self.inputs)

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


@dataclass
class Run:
    """A forward evaluation of all passes of this rank.

    Attributes
    ----------
    loss : Tensor, shape (), float64
        This rank's part of f: the weighted sum of its passes' mean losses, see `apts_mpi.objective.mean_loss.MeanLoss`.
    losses : list of Tensor
        Mean loss of each pass, with its graph until the backward pass.
    caches : list of list of Cache
        Caches of each pass.
    is_observed : bool
        Whether they have what local solvers look at, see ``apts_mpi.objective.objective.Objective.observes``.
    """

    loss: torch.Tensor
    losses: list[torch.Tensor] = field(default_factory=list)
    caches: list[list[Cache]] = field(default_factory=list)
    is_observed: bool = True
