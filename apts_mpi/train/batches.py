"""The batches of a run, each by its epoch and number, whatever the samples lie in."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from apts_mpi.data import Half, Order
from apts_mpi.data.ahead import Ahead
from apts_mpi.data.order import Shuffled
from apts_mpi.data.source import Epoch, Position
from apts_mpi.errors import InvalidInput
from apts_mpi.objective.batch import Rows, Samples
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems import Problem
from apts_mpi.tools.trees import Data, count_samples, device_of, map_tensors
from apts_mpi.train.options import TrainingOptions

READ_WHOLE = (
    "train: the data set is a stream without shards, so each of the %d ranks reads all of it; give it num_shards, and "
    "let its __iter__ give the samples of shard torch.utils.data.get_worker_info().id"
)

_LOG = logging.getLogger("apts_mpi")


class Batches:
    """Which samples are in which batch, and where a solver finds them.

    Parameters
    ----------
    problem, options
        The samples, and the size of a batch.
    device
        Where they belong.
    comm
        All ranks.

    Attributes
    ----------
    train : (Tensor or Half, Tensor or Half)
        Inputs and targets of all samples.
    samples, size : int
        Their number, and how many are in a batch.
    count : int
        Batches an epoch; samples that do not fill one are left out, others each epoch.
    are_one : bool
        Whether all batches of the run are one and the same.
    """

    def __init__(self, problem: Problem, options: TrainingOptions, device: torch.device, comm: Communicator) -> None:
        self.train: Data = to_device(problem.train, device)
        with comm.shared_errors():
            self.samples, self.size, self.count = batch_sizes(problem, options)
        self._order = order_of(problem)
        self._seed, self._comm = options.seed, comm
        self._ahead = next((Ahead(part.samples) for part in self.train if isinstance(part, Half)), None)
        self._is_full = self.size == self.samples and not self._order.drawn
        # A rank that needs no samples has no source of any.
        (varies,) = comm.largest(self._ahead is not None and self._ahead.source.varies)
        self.are_one = self._is_full and not varies
        if self._ahead is not None and self._ahead.source.parts == 1 and comm.size > 1 and comm.rank == 0:
            _LOG.warning(READ_WHOLE, comm.size)
        self._epoch = 0
        self._batches: list[torch.Tensor] = []

    def batch(self, epoch: int, number: int) -> tuple[Samples, Rows]:
        """A batch, and which of its samples count; None: all. Collective at the beginning of an epoch."""
        if self._ahead is None and self._is_full:
            return self.train, None
        if epoch != self._epoch:
            self._begin(epoch)
        rows = self._batches[number]
        if self._ahead is None:
            return self.train, rows
        inputs, targets = self._ahead.batch(number).halves()
        # Where another stage has a half there is nothing to be read.
        own = zip((inputs, targets), self.train, strict=True)
        first, second = (half if isinstance(part, Half) else part for half, part in own)
        return (first, second), None

    def metadata(self) -> dict[str, Any]:
        """Where the reading of each rank is, of data sets that say so. Collective."""
        own = [] if self._ahead is None else [each._asdict() for each in self._ahead.source.positions]
        found = [each for positions in self._comm.collect(own) for each in positions]
        return {"data": found} if found else {}

    def go_on(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Read on from where a checkpoint says that the ranks were, where that is before what is needed."""
        if self._ahead is not None:
            self._ahead.source.go_on([Position(**each) for each in saved])

    def replace(self, train: Data) -> None:
        """Have other samples, as many, in the places of these."""
        self.train = to_device(train, device_of(self.train[0]))

    def _begin(self, epoch: int) -> None:
        """Know the batches of an epoch."""
        arguments = self.samples, self.size, self._seed, epoch
        if self._is_full:
            found = [torch.arange(self.samples)]
        elif not self._order.drawn:
            found = self._order.batches(*arguments)
        else:
            with self._comm.shared_errors():
                found = self._order.batches(*arguments) if self._comm.rank == 0 else []
            found = share_batches(found, self._comm)
        self._batches = [rows.to(device_of(self.train[0])) for rows in found] if self._ahead is None else found
        if self._ahead is not None:
            self._ahead.begin(Epoch(self._seed, epoch), found)
        self._epoch = epoch


def order_of(problem: Problem) -> Order:
    """Which samples make the batches of a problem."""
    return problem.order or Shuffled(problem.group_size)


def batch_sizes(problem: Problem, options: TrainingOptions) -> tuple[int, int, int]:
    """Number of training samples, samples a batch, and batches an epoch."""
    samples, order = count_samples(problem.train[0]), order_of(problem)
    if order.sized and options.batch_size not in (None, problem.batch_size):
        raise InvalidInput(
            f"batch_size: {options.batch_size} is not for problem {problem.name}, whose batch sampler makes the "
            "batches; leave it out"
        )
    size = min(options.batch_size or problem.batch_size or samples, samples)
    count = order.count(samples, size)
    if count < 1:
        raise InvalidInput(
            f"batch_size: the sampler of problem {problem.name} gives fewer samples than the {size} of a batch; give a "
            "smaller batch"
        )
    return samples, size, count


def share_batches(found: list[torch.Tensor], comm: Communicator) -> list[torch.Tensor]:
    """The batches that rank 0 has drawn. Collective."""
    (count,) = comm.decide(lambda: [len(found)])
    sizes = torch.tensor([len(rows) for rows in found] if comm.rank == 0 else [0] * int(count), dtype=torch.int64)
    comm.share_tensors([sizes])
    rows = torch.cat(found) if comm.rank == 0 else torch.empty(int(sizes.sum()), dtype=torch.int64)
    comm.share_tensors([rows])
    return list(rows.split(sizes.tolist()))


def to_device(data: Any, device: torch.device) -> Any:
    """Tensors on the device, and halves that give such."""
    halves = [part for part in data if isinstance(part, Half)]
    moved = halves[0].samples.on(device) if halves else None
    return tuple(
        Half(moved, part.place)
        if moved is not None and isinstance(part, Half)
        else map_tensors(lambda tensor: tensor.to(device), part)
        for part in data
    )
