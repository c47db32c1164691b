"""A batch cut into micro-batches for a pipeline, of which the first stage reads the inputs and the last the targets."""

from __future__ import annotations

import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.network.partition import Subdomain, split
from apts_mpi.objective.objective import Pass
from apts_mpi.parallel.communicator import Communicator

Batch = tuple[torch.Tensor | None, torch.Tensor | None]


def placeholder(samples: int, numbers: int) -> torch.Tensor:
    """A tensor that stands for samples of so many numbers each, which another stage has; it takes no memory."""
    return torch.zeros(1, 1, dtype=torch.uint8).expand(samples, numbers)


def micro_batches_of_batch(
    batch: Batch,
    rows: torch.Tensor | None,
    *,
    micro_batches: int,
    subdomains: tuple[Subdomain, ...],
    stages: Communicator,
    team: Communicator,
    whole: bool,
    stream: tuple[int, ...],
) -> tuple[list[Pass], int]:
    """This rank's micro-batches, and the number of samples of the batch. Collective.

    Parameters
    ----------
    batch
        Inputs, which the first stage needs, and targets, which the last stage needs: of the whole batch, or (``whole``
        false) of this replica's share.
    rows
        Samples of ``batch`` that count, in this order; None: all.
    micro_batches
        Their number.
    subdomains
        Those of this stage.
    stages, team
        The ranks of this replica, one a stage, and those that hold this stage, one a replica.
    whole
        Whether the batch is that of all replicas.
    stream
        First part of the keys of the random streams.

    Raises
    ------
    InvalidInput
        On every rank of the replica, if inputs and targets differ in samples, or there are too few.
    """
    inputs = batch[0] if stages.rank == 0 else None
    targets = batch[1] if stages.rank == stages.size - 1 else None
    numbers = 0 if targets is None else targets[0].numel()
    found = stages.collect((_samples(inputs, rows), _samples(targets, rows), numbers))
    (count, _, _), (others, numbers) = found[0], found[-1][1:]
    with stages.shared_errors():
        if count is None or others is None:
            raise InvalidInput(
                "batch: the first stage was given no inputs or the last one no targets; give them on those ranks"
            )
        if count != others:
            raise InvalidInput(f"batch: {count} inputs but {others} targets; give as many of each")
        start, stop = split(count, team.size, team.rank) if whole else (0, count)
        smallest = count // team.size if whole else count
        if smallest < micro_batches:
            raise InvalidInput(
                f"batch_size: {count} samples do not make {micro_batches} micro-batches on {team.size} replicas; give "
                "a larger batch, or fewer --micro-batches"
            )
    total = count if whole else team.total(count)
    passes = []
    for index in range(micro_batches):
        first, last = (start + edge for edge in split(stop - start, micro_batches, index))
        chosen = slice(first, last) if rows is None else rows[first:last]
        passes.append(
            Pass(
                placeholder(last - first, 0) if inputs is None else inputs[chosen],
                placeholder(last - first, numbers) if targets is None else targets[chosen],
                weight=(last - first) / total,
                stream=(*stream, team.rank, index, stages.rank),
                subdomains=subdomains,
                position=first,
                shard_size=count,
            )
        )
    return passes, total


def _samples(data: torch.Tensor | None, rows: torch.Tensor | None) -> int | None:
    if data is None:
        return None
    return len(data) if rows is None else len(rows)
