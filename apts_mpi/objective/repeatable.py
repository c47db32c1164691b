"""Whether the loss of some samples is one number: the same the second time, and the same on each rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from apts_mpi.errors import InvalidInput, SharedInvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.environment import host, kept_generators, preserved_random_state, seed_stream
from apts_mpi.tools.tensors import checksum
from apts_mpi.tools.trees import tensors_of

# Evaluations: what alternates between two, or changes at every other call, is not to come out alike.
TIMES = 4

# And more where a generator is drawn from that nobody seeds: what it decides may come out alike each time.
REPEATS = 50

# By how much a loss may differ that is evaluated again, as a power of the machine number. On one host the same sums
# come in the same order, but for threads. Other machines add in other orders and round products to fewer digits, a GPU
# adds in any order: half the digits.
ONE_HOST, ELSEWHERE = 0.75, 0.5

# Numbers that show whether generators of two machines draw the same, as many as one has to draw in several parts.
DRAWN = 1 << 20


@dataclass(frozen=True)
class Value:
    """The loss of some samples.

    Attributes
    ----------
    loss
        Its value.
    largest
        Magnitude of the largest output, from which the loss may have been computed as a difference.
    epsilon
        Of the coarsest dtype of loss and outputs.
    """

    loss: float
    largest: float
    epsilon: float

    def tolerance(self, power: float, epsilon: float = 0.0) -> float:
        """By how much another evaluation may differ, in an arithmetic with this epsilon if that is coarser."""
        epsilon = max(self.epsilon, epsilon)
        return epsilon**power * abs(self.loss) + epsilon * self.largest


def value_of(loss: torch.Tensor, outputs: Any) -> Value:
    """The value of a loss of these outputs."""
    leaves = [tensor.detach() for tensor in tensors_of(outputs)]
    floating = [leaf for leaf in leaves if leaf.is_floating_point() and leaf.numel()]
    largest = max((float(leaf.abs().max()) for leaf in floating), default=0.0)
    epsilon = max(torch.finfo(tensor.dtype).eps for tensor in (loss, *floating))
    return Value(float(loss.detach()), largest if math.isfinite(largest) else 0.0, epsilon)


def check_repeated(
    evaluate: Callable[[], Value | None], device: torch.device, comm: Communicator, doubted: bool = False
) -> Value | None:
    """Evaluate several times, or many times, and see that nothing changes. Collective.

    Parameters
    ----------
    evaluate
        Gives the loss at the same parameters with the same state of torch's generator; None where another rank has it.
    device
        Whose generator that is.
    comm
        The ranks.
    doubted
        Whether there is cause to evaluate many times.

    Returns
    -------
    Value or None
        The first one.

    Raises
    ------
    SharedInvalidInput
        If it is another one later.
    """
    with kept_generators(device) as moved:
        values = [evaluate() for _ in range(TIMES)]
        (is_drawn,) = comm.agree([moved()], lambda table: [table.max()])
        if is_drawn or doubted:
            values += [evaluate() for _ in range(REPEATS)]
    with comm.shared_errors():
        first, *others = values
        for other in others:
            if first is not None and other is not None:
                tolerance = first.tolerance(ONE_HOST if device.type == "cpu" else ELSEWHERE)
                _compare(first, other, tolerance, "one batch" if doubted else "the first batch")
    return values[0]


def _compare(first: Value, other: Value, tolerance: float, batch: str) -> None:
    if not _agree(first.loss, other.loss, tolerance):
        raise InvalidInput(
            f"loss: that of {batch} is {first.loss:.9g} once and {other.loss:.9g} another time, with the same "
            "parameters and the same state of torch's generator: the network or the loss draws random numbers by other "
            "means (Python's random, numpy, a generator of its own), or keeps something from one call to the next; "
            "draw with torch's generator of the device, and keep things in buffers"
        )


def check_same_loss(
    value: Value | None, draws: bool, device: torch.device, comm: Communicator, epsilon: float = 0.0
) -> None:
    """See that the loss of the same samples is the same on all ranks that have one. Collective.

    Parameters
    ----------
    value
        The loss; None on a rank without.
    draws
        Whether random numbers were drawn for it. Then ranks are compared whose generators draw the same.
    device
        Of this rank.
    comm
        The ranks.
    epsilon
        Of the arithmetic, where it is coarser than the loss shows.

    Raises
    ------
    SharedInvalidInput
        Naming the first rank that differs from most.
    """
    is_one = len(set(comm.collect((host(), device.type)))) == 1 and device.type == "cpu"
    own = [-1.0, 0.0, 0.0]
    if value is not None:
        tolerance = value.tolerance(ONE_HOST) if is_one else value.tolerance(ELSEWHERE, epsilon)
        own = [_generator(device) if draws else 0, value.loss, tolerance]

    def decide(table: np.ndarray) -> list[float]:
        for part in np.unique(table[table[:, 0] >= 0, 0]):
            ranks = np.flatnonzero(table[:, 0] == part)
            losses, tolerance = table[ranks, 1], table[ranks, 2].max(initial=0.0, where=np.isfinite(table[ranks, 2]))
            agreeing = [sum(_agree(one, other, tolerance) for other in losses) for one in losses]
            usual = int(np.argmax(agreeing))
            for place, loss in enumerate(losses):
                if not _agree(loss, losses[usual], tolerance):
                    return [ranks[place], ranks[usual], loss, losses[usual]]
        return [-1, -1, 0.0, 0.0]

    rank, usual, loss, usual_loss = comm.agree(own, decide)
    if rank >= 0:
        raise SharedInvalidInput(
            f"loss: on rank {int(rank)} it is {loss:.9g} for samples and parameters for which it is {usual_loss:.9g} "
            f"on rank {int(usual)}; give all ranks the same loss, network and forward"
        )


def _agree(one: float, other: float, tolerance: float) -> bool:
    if not math.isfinite(one) or not math.isfinite(other):
        return math.isfinite(one) == math.isfinite(other)
    return abs(one - other) <= tolerance


def _generator(device: torch.device) -> int:
    """What the generator of a device draws, as a number."""
    with preserved_random_state(device):
        seed_stream(device, 0)
        return checksum(torch.empty(DRAWN, device=device).bernoulli_(0.5))
