"""How many iterations on its samples bring an earlier task back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from apts_mpi.problems import Task

# Of the accuracy that the task had when it was learnt.
SHARE = 0.95

# Iterations after which it counts as not come back, and the step size of Adam. The same for all methods, so that what
# is measured is the point from which they begin.
LIMIT, RATE = 200, 1e-3


def iterations_to_recover(
    network: torch.nn.Module,
    loss: Callable[[Any, Any], Any],
    task: Task,
    accuracy: float,
    batch_size: int,
    seed: int,
) -> int:
    """Iterations of Adam on a copy of the network until the task's accuracy is 0.95 of what it was; 200 at most.

    Parameters
    ----------
    network, loss
        As they are after the last task.
    task
        The earlier one, on the network's device.
    accuracy
        On its held-out samples when it was learnt.
    batch_size, seed
        Which samples an iteration takes.
    """
    network = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = task.train
    for done in range(LIMIT):
        if accuracy_of(network, task.test) >= SHARE * accuracy:
            return done
        rows = torch.randint(len(inputs), (batch_size,), generator=generator).to(inputs.device)
        network.train()
        optimizer.zero_grad()
        loss(network(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    return LIMIT


@torch.no_grad()
def accuracy_of(network: torch.nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Share of the samples whose class has the highest score, in evaluation mode."""
    network.eval()
    inputs, targets = data
    return float((network(inputs).argmax(dim=1) == targets).double().mean())
