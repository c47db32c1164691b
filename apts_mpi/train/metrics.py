"""Losses and accuracies of a network over all samples, and the problem's own metrics."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from apts_mpi.data import Half
from apts_mpi.network.partition import split
from apts_mpi.objective.mean_loss import MeanLoss
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems import Problem
from apts_mpi.tools.tensors import default_dtype
from apts_mpi.tools.trees import Data, Tree, count_samples, joined, take
from apts_mpi.train.average import Average

# Takes outputs and the targets that belong to them.
Consume = Callable[[Any, Tree], None]

# Calls a `Consume` with the outputs for this rank's share of some samples, piece by piece, where this rank has them.
Outputs = Callable[[Data, Consume], None]

# Samples of a piece: bounds the memory of the activations.
PIECE = 2048


def whole_outputs(
    called: Callable[[Tree], Any],
    comm: Communicator,
    group: int | None = 1,
    most: Callable[[], int | None] = lambda: None,
) -> Outputs:
    """The `Outputs` of a network that every rank has as a whole, which ``called`` takes the inputs of.

    Groups of samples that belong together are not divided; where all do, rank 0 has them. ``most`` tells how many
    samples the network is run over at a time.
    """

    def outputs(data: Data, consume: Consume) -> None:
        edges = edges_of(count_samples(data[0]), comm.size, comm.rank, group, piece_of(data, most()))
        for edge in itertools.pairwise(edges):
            inputs, targets = (take(part, slice(*edge)) for part in data)
            consume(called(inputs), targets)

    return outputs


def piece_of(data: Data, most: int | None = None) -> int:
    """Samples of a piece, ``most`` of them at most; of what is read they take little memory."""
    return min(most or PIECE, *(part.piece(PIECE) if isinstance(part, Half) else PIECE for part in data))


def edges_of(count: int, ranks: int, rank: int, group: int | None, piece: int) -> list[int]:
    """Where the pieces of a rank's share of some samples begin, and where the last one ends."""
    size = group or 1
    # What does not fill a group is left out.
    groups = count // size
    first, last = split(groups, ranks, rank) if group else (0, groups if rank == 0 else 0)
    return [*range(first * size, last * size, max(piece // size, 1) * size), last * size]


class Metrics:
    """Metrics of a problem's network as it is.

    Parameters
    ----------
    problem
        Network, loss and metrics.
    comm
        The ranks.
    outputs
        How the samples come through the network.
    average
        That of its iterates, which is measured as well.
    """

    def __init__(self, problem: Problem, comm: Communicator, outputs: Outputs, average: Average | None = None) -> None:
        self._problem = problem
        self._loss = MeanLoss(problem.loss)
        self._comm = comm
        self._outputs = outputs
        self._average = average

    def names(self, train: Data, test: Data | None) -> list[str]:
        """What `measure` finds, known from a few of the samples. Collective."""
        few = slice(2 * self._comm.size * self._problem.group_size)
        samples = [None if data is None else (take(data[0], few), take(data[1], few)) for data in (train, test)]
        assert samples[0] is not None  # a problem has training samples
        return list(self.measure(samples[0], samples[1]))

    def measure(self, train: Data, test: Data | None) -> dict[str, Any]:
        """Losses and accuracies on all samples, the network in evaluation mode; of the average, too. Collective."""
        values = self._measure(train, test)
        if self._average is not None:
            with self._average.in_network():
                averaged = self._measure(train, test)
            values |= {f"average_{name}": value for name, value in averaged.items()}
        return values

    def _measure(self, train: Data, test: Data | None) -> dict[str, Any]:
        network = self._problem.network
        network.eval()
        values = self._loss_and_accuracy("train", train)
        if test is not None:
            values |= self._loss_and_accuracy("test", test)
        for name, metric in self._problem.metrics.items():
            with default_dtype(self._problem.dtype):
                own = float(metric(network)) if self._comm.rank == 0 else 0.0
            (values[name],) = self._comm.agree([own], lambda table: [table[0, 0]])
        return values

    @torch.no_grad()
    def _loss_and_accuracy(self, name: str, data: Data) -> dict[str, float]:
        sums = np.zeros(5)
        together: list[tuple[Any, Tree]] = []

        def consume(outputs: Any, targets: Tree) -> None:
            sums[2:] += self._hits(outputs, targets)
            if self._problem.coupled:
                together.append((outputs, targets))
            else:
                sums[:2] += self._loss_and_count(outputs, targets)

        self._outputs(data, consume)
        if together:
            sums[:2] = self._loss_and_count(*(joined(parts) for parts in zip(*together, strict=True)))
        loss, count, hits, targets, samples = self._comm.agree(sums.tolist(), lambda table: table.sum(axis=0))
        result = {f"{name}_loss": loss / (count or math.nan)}
        # Whether there is one follows from shapes alone: a few of the samples tell it for all.
        is_classified = 0 < samples == self._measured(count_samples(data[0]))
        return result | ({f"{name}_accuracy": hits / (targets or math.nan)} if is_classified else {})

    def _measured(self, count: int) -> int:
        """Of so many samples those in whole groups."""
        return count if self._problem.coupled else count - count % self._problem.group_size

    def _loss_and_count(self, outputs: Any, targets: Tree) -> tuple[float, float]:
        """The loss of some samples, summed, and what a sum over all is to be divided by."""
        term = self._loss.term(outputs, targets)
        count = float(term.samples if term.count is None else term.count)
        return float(self._loss.mean(term)) * count, count

    def _hits(self, outputs: Any, targets: Tree) -> tuple[float, float, float]:
        """How many targets are classified correctly, of how many that count, of how many samples."""
        classes = dimension_of_classes(outputs, targets) if self._problem.accuracy else None
        if classes is None:
            return 0.0, 0.0, 0.0
        # What is negative is no class, whatever the loss makes of it.
        counted = int(((targets >= 0) & (targets != getattr(self._loss.evaluate, "ignore_index", -1))).sum())
        hits = (outputs.argmax(dim=classes) == targets).sum()
        return float(hits), counted, len(targets)


def dimension_of_classes(outputs: Any, targets: Tree) -> int | None:
    """The dimension of the outputs that holds the scores of the classes of which the targets are indices.

    It is the one without which outputs have the shape of the targets: the last one, or the second one as torch's
    ``cross_entropy`` has it. None where neither or, of two, each of them would do.
    """
    if not (isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)):
        return None
    shape = tuple(outputs.shape)
    places = {1, len(shape) - 1} if len(shape) > 1 else set()
    fitting = [at for at in places if shape[at] > 1 and shape[:at] + shape[at + 1 :] == tuple(targets.shape)]
    return fitting[0] if len(fitting) == 1 else None
