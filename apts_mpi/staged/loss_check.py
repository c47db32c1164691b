"""The check of a loss where each rank has a stage."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from apts_mpi.objective.batch import Batch
from apts_mpi.objective.loss_check import check_loss, some_rows
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.staged.objective import StagedObjective


def check_staged_objective(
    objective: StagedObjective, batch: Batch, count: int, replica: int, comm: Communicator
) -> None:
    """`apts_mpi.objective.loss_check.check_objective` where each rank has a stage. Collective.

    Parameters
    ----------
    objective, batch
        As there; the first stage has inputs and the last one targets.
    count
        Number of samples that the ranks of this replica were given.
    replica
        Number of this replica.
    comm
        All ranks.
    """
    inputs, targets = batch.samples
    few = some_rows(count, batch.rows, batch.passes[0].samples, replica)
    entering = inputs[few] if objective.pipeline.is_first and inputs is not None else few
    found: list[Any] = []
    with objective.replayed():
        objective.infer([entering], lambda _, outputs: found.append(outputs))
    with comm.shared_refusals(), torch.enable_grad():
        for outputs in found:  # on the last stage
            assert targets is not None
            check_loss(objective.loss, tree_map_only(torch.Tensor, _as_point, outputs), targets[few])


def _as_point(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())
