"""Stored samples of earlier tasks, which join the batches of the present one.

Which they are depends on the seed alone, so that a run that goes on has the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apts_mpi.problems import Task

# Between the seeds of one run, and apart from those of its order.
_STRIDE, _OFFSET = 1_000_003, 700_001


def stored(tasks: Sequence[Task], count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` samples of each task, inputs and targets; all of a task that has no more."""
    inputs, targets = [], []
    for number, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(seed * _STRIDE + _OFFSET + number)
        rows = torch.randperm(len(task.train[0]), generator=generator)[:count]
        inputs.append(task.train[0][rows])
        targets.append(task.train[1][rows])
    return torch.cat(inputs), torch.cat(targets)


def replayed(samples: int, size: int, seed: int, epoch: int, number: int) -> torch.Tensor:
    """Which of so many stored samples join a batch of ``size``: as many, none twice as long as others are left."""
    generator = torch.Generator().manual_seed(((seed * _STRIDE + _OFFSET) * 10_007 + epoch) * 10_007 + number)
    drawn = [torch.randperm(samples, generator=generator) for _ in range(-(-size // samples))]
    return torch.cat(drawn)[:size]
