"""The check of a loss where each rank has a stage."""

from __future__ import annotations

from typing import Any

import torch

from apts_mpi.network.activations import at_point
from apts_mpi.objective.batch import Batch
from apts_mpi.objective.loss_check import SHARED, agree_on_kind, check_loss, some_rows
from apts_mpi.objective.repeatable import Value, check_repeated, check_same_loss, value_of
from apts_mpi.objective.same_batch import check_same_batch
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.staged.objective import StagedObjective
from apts_mpi.tools.environment import kept_generators, random_state
from apts_mpi.tools.trees import take


def check_staged_objective(
    objective: StagedObjective,
    batch: Batch,
    count: int,
    replica: int,
    comm: Communicator,
    whole: bool,
    doubted: bool = False,
) -> None:
    """`apts_mpi.objective.loss_check.check_objective` where each rank has a stage. Collective.

    Parameters
    ----------
    objective, batch, whole, doubted
        As there; the first stage has inputs and the last one targets.
    count
        Number of samples that the ranks of this replica were given.
    replica
        Number of this replica.
    comm
        All ranks.
    """
    inputs, targets = batch.samples
    pipeline, device = objective.pipeline, objective.vector.values.device
    if whole:
        needed = {"inputs": inputs if pipeline.is_first else None, "targets": targets if pipeline.is_last else None}
        check_same_batch({name: data for name, data in needed.items() if data is not None}, batch.rows, comm)
    samples = min(comm.collect(batch.passes[0].samples))
    draws = False

    def outputs_of(few: torch.Tensor) -> list[Any]:
        """What the last stage has of these samples, as points to differentiate at; nothing on the others."""
        nonlocal draws
        found: list[Any] = []
        entering = take(inputs, few) if pipeline.is_first and inputs is not None else few
        with objective.replayed((SHARED,)):
            before = random_state(device)
            objective.infer([entering], lambda _, outputs: found.append(outputs))
            draws = not torch.equal(before, random_state(device))
        return [at_point(outputs)[0] for outputs in found]

    loss, group = objective.loss, batch.passes[0].group
    few = some_rows(count, batch.rows, samples, replica, group)
    with kept_generators(device):
        found = outputs_of(few)
        with comm.shared_refusals(), objective.replayed((SHARED,)), torch.enable_grad():
            for outputs in found:
                assert targets is not None
                own = take(targets, few)
                loss.is_compared = check_loss(loss.evaluate, outputs, own, loss.group)
                loss.term(outputs, own)
    agree_on_kind(loss, comm)
    if whole:
        few = some_rows(count, batch.rows, samples, SHARED, group)

    def evaluate() -> Value | None:
        value = None
        for outputs in outputs_of(few):
            assert targets is not None
            with objective.replayed((SHARED,)), torch.enable_grad():
                value = value_of(loss(outputs, take(targets, few)), outputs)
        return value

    value = check_repeated(evaluate, device, comm, doubted)
    if whole:
        (drawn,) = comm.agree([draws], lambda table: [table.max()])
        check_same_loss(value, bool(drawn), device, comm, objective.epsilon)
