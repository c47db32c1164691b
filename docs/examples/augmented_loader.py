"""Digits that are shifted at random each time, from a DataLoader with two workers.

mpirun -n 2 python -m apts_mpi.train --problem augmented_loader.py:problem --epochs 3
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from apts_mpi.problems import Problem, build


class ShiftedDigits(Dataset):
    """Images of 8x8 pixels and their classes; each image is moved by up to one pixel, and has some noise."""

    def __init__(self, images, labels):
        self.images, self.labels = images.reshape(-1, 8, 8), labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        rows, columns = torch.randint(-1, 2, (2,)).tolist()
        moved = self.images[index].roll((rows, columns), (0, 1))
        return moved + 0.05 * torch.randn(8, 8), int(self.labels[index])


def problem(width: int = 64, workers: int = 2):
    """A network 64-width-width-10 on shifted digits; ``--problem.args.width 32`` makes it narrower."""
    digits = build("digits")
    loader = DataLoader(ShiftedDigits(*digits.train), batch_size=200, shuffle=True, num_workers=workers)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    images, labels = digits.test
    return Problem(
        name="shifted-digits",
        network=network,
        loss=cross_entropy,
        train=loader,
        test=(images.reshape(-1, 8, 8), labels),
        accuracy=True,
        epochs=3,
    )
