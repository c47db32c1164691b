"""Data sets whose samples are drawn anew each time, by all means that they have, and a network for them."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from apts_mpi.problems import Problem

COUNT, WIDTH, CLASSES = 60, 6, 3


class Noisy(Dataset):
    """Points with noise of torch's, numpy's and Python's generators; the numbers asked for are noted."""

    def __init__(self, count=COUNT):
        generator = torch.Generator().manual_seed(1)
        self.points = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        self.asked = []

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        self.asked.append(index)
        noise = torch.randn(WIDTH, dtype=torch.float64) + np.random.rand() + random.random()  # noqa: NPY002
        return self.points[index] + 0.1 * noise, int(self.points[index, :CLASSES].argmax())


class Stream(IterableDataset):
    """The same points one after the other."""

    def __iter__(self):
        points = Noisy()
        for index in range(len(points)):
            yield points[index]


class Sharded(IterableDataset):
    """The same points in four shards of 14 to 16 samples; which of them are read is noted."""

    num_shards = 4
    shard_lengths = (14, 15, 16, 15)

    def __init__(self):
        self.points, self.read = Noisy(), []

    def __iter__(self):
        worker = get_worker_info()
        assert worker is not None and worker.num_workers == self.num_shards
        first = sum(self.shard_lengths[: worker.id])
        for index in range(first, first + self.shard_lengths[worker.id]):
            self.read.append(index)
            yield self.points[index]


class Telling(Stream):
    """A stream that says where it is, and how many samples it has read to come there."""

    def __init__(self):
        self.points, self.read, self.place, self.start = Noisy(), [], 0, 0

    def __iter__(self):
        self.place, start, self.start = self.start, self.start, 0
        for index in range(start, COUNT):
            self.read.append(index)
            self.place = index + 1
            yield self.points[index]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.start = state["place"]


class Broken(Noisy):
    """One sample cannot be read."""

    def __getitem__(self, index):
        if index == 7:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


class Reversed:
    """A sampler of the user's."""

    def __len__(self):
        return COUNT

    def __iter__(self):
        return iter(range(COUNT - 1, -1, -1))


def weighted():
    weights = torch.rand(COUNT, generator=torch.Generator().manual_seed(2))
    return WeightedRandomSampler(weights, 50)


LOADERS = {
    "shuffled": lambda **settings: DataLoader(Noisy(), batch_size=20, shuffle=True, **settings),
    "in order": lambda **settings: DataLoader(Noisy(), batch_size=20, **settings),
    "weighted": lambda **settings: DataLoader(Noisy(), batch_size=20, sampler=weighted(), **settings),
    "own sampler": lambda **settings: DataLoader(Noisy(), batch_size=20, sampler=Reversed(), **settings),
    "own batches": lambda **settings: DataLoader(
        Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy()), 12, False), **settings
    ),
    "shards": lambda **settings: DataLoader(Sharded(), batch_size=20, **settings),
    "telling": lambda **settings: DataLoader(Telling(), batch_size=20, **settings),
    "stream": lambda **settings: DataLoader(Stream(), batch_size=20, **settings),
    "data set": lambda **settings: Noisy(),
    "broken": lambda **settings: DataLoader(Broken(), batch_size=20, **settings),
}


def network():
    layers = [nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers)


def problem(loader: str = "shuffled", workers: int = 0):
    """A problem of one of the loaders."""
    train = LOADERS[loader](num_workers=workers)
    return Problem(name=loader, network=network(), loss=cross_entropy, train=train, test=Noisy(10), accuracy=True)


def images(width: int = 16, depth: int = 1):
    """A network of images of 4x4 pixels."""
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Tanh(), *hidden, nn.Linear(width, CLASSES))


def half_cross_entropy(outputs, targets):
    """A loss of the user's."""
    return 0.5 * cross_entropy(outputs, targets)


def values(width: int = 8):
    """A network of images of 4x4 pixels to two values."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 2))
