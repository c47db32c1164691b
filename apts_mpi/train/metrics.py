"""Losses and accuracies of a network over all samples, and the problem's own metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from apts_mpi.network.partition import split
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems import Problem
from apts_mpi.train.average import Average

# Inputs and targets of some samples, on one device.
Data = tuple[torch.Tensor, torch.Tensor]

# Takes outputs and the targets that belong to them.
Consume = Callable[[torch.Tensor, torch.Tensor], None]

# Calls a `Consume` with the outputs for this rank's share of some samples, piece by piece, where this rank has them.
Outputs = Callable[[Data, Consume], None]

# Samples of a piece: bounds the memory of the activations.
PIECE = 2048


def whole_outputs(called: Callable[[torch.Tensor], torch.Tensor], comm: Communicator) -> Outputs:
    """The `Outputs` of a network that every rank has as a whole, which ``called`` takes the inputs of."""

    def outputs(data: Data, consume: Consume) -> None:
        first, last = split(len(data[0]), comm.size, comm.rank)
        for start in range(first, last, PIECE):
            inputs, targets = (part[start : min(start + PIECE, last)] for part in data)
            consume(called(inputs), targets)

    return outputs


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
        self._comm = comm
        self._outputs = outputs
        self._average = average

    def names(self, train: Data, test: Data | None) -> list[str]:
        """What `measure` finds, known from a few of the samples. Collective."""
        count = 2 * self._comm.size
        few = test and (test[0][:count], test[1][:count])
        return list(self.measure((train[0][:count], train[1][:count]), few))

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
            own = float(metric(network)) if self._comm.rank == 0 else 0.0
            (values[name],) = self._comm.agree([own], lambda table: [table[0, 0]])
        return values

    @torch.no_grad()
    def _loss_and_accuracy(self, name: str, data: Data) -> dict[str, float]:
        sums = [0.0, 0.0, 0.0]

        def consume(outputs: torch.Tensor, targets: torch.Tensor) -> None:
            for place, value in enumerate(self._sums(outputs, targets)):
                sums[place] += value

        self._outputs(data, consume)
        count = len(data[0])
        loss, accuracy, classified = self._comm.agree(sums, lambda table: table.sum(axis=0) / count)
        result = {f"{name}_loss": loss}
        return result | ({f"{name}_accuracy": accuracy} if classified == 1.0 else {})

    def _sums(self, outputs: torch.Tensor, targets: torch.Tensor) -> list[float]:
        """Sums over some samples: of the loss, of what is classified correctly, and of what is classified at all."""
        loss = float(self._problem.loss(outputs, targets)) * len(targets)
        classes = dimension_of_classes(outputs, targets) if self._problem.accuracy else None
        if classes is None:
            return [loss, 0.0, 0.0]
        hits = (outputs.argmax(dim=classes) == targets).sum()
        # Targets may have more dimensions than samples (tokens).
        return [loss, float(hits) / (targets.numel() / len(targets)), len(targets)]


def dimension_of_classes(outputs: Any, targets: torch.Tensor) -> int | None:
    """The dimension of the outputs that holds the scores of the classes of which the targets are indices.

    It is the one without which outputs have the shape of the targets: the last one, or the second one as torch's
    ``cross_entropy`` has it. None where neither or, of two, each of them would do.
    """
    if not isinstance(outputs, torch.Tensor):
        return None
    shape = tuple(outputs.shape)
    places = {1, len(shape) - 1} if len(shape) > 1 else set()
    fitting = [at for at in places if shape[at] > 1 and shape[:at] + shape[at + 1 :] == tuple(targets.shape)]
    return fitting[0] if len(fitting) == 1 else None
