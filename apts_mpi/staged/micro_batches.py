"""A batch cut into micro-batches for a pipeline, of which the first stage reads the inputs and the last the targets."""

from __future__ import annotations

import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.partition import split
from apts_mpi.objective.batch import Batch, Samples, Selection, as_batch, check_counts, check_groups, check_rows
from apts_mpi.objective.passes import Pass
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.trees import Tree, count_samples, numbers_of_sample


def placeholder(samples: int, numbers: int) -> torch.Tensor:
    """A tensor that stands for samples of so many numbers each, which another stage has; it takes no memory."""
    return torch.zeros(1, 1, dtype=torch.uint8).expand(samples, numbers)


def cut_micro_batches(
    samples: Samples,
    rows: torch.Tensor | None,
    *,
    options: APTSOptions,
    decomposition: Decomposition,
    stages: Communicator,
    comm: Communicator,
    stream: tuple[int, ...],
) -> Batch:
    """Cut a batch into the micro-batches of this replica. Collective.

    Parameters
    ----------
    samples
        Inputs, which the first stage needs, and targets, which the last stage needs: of the whole batch, or (batch
        ``shard``) of this replica's share.
    rows
        Those that count, in this order; None: all.
    options
        The number of micro-batches, whether the batch is that of all replicas, and which samples belong together: where
        all do, every replica has them in one micro-batch.
    decomposition
        Of this stage; its team holds the stage, one a replica.
    stages
        The ranks of this replica, one a stage.
    comm
        The ranks of all replicas.
    stream
        First part of the keys of the random streams.

    Raises
    ------
    InvalidInput
        On every rank of the replica, if inputs and targets differ in samples, or there are too few.
    """
    team, group, whole = decomposition.team, options.group, options.batch == "whole"
    micro_batches = options.pipeline.micro_batches
    with stages.shared_errors():
        samples = as_batch(samples)
    inputs = samples[0] if stages.rank == 0 else None
    targets = samples[1] if stages.rank == stages.size - 1 else None
    numbers = 0 if targets is None else numbers_of_sample(targets)
    # The first and the last stage alone have numbers to tell.
    count, others, numbers = stages.largest(_count(inputs, rows), _count(targets, rows), numbers)
    with stages.shared_errors():
        if count < 0 or others < 0:
            raise InvalidInput(
                "batch: the first stage was given no inputs or the last one no targets; give them on those ranks"
            )
        check_counts(count, others)
        for given in (inputs, targets):
            if given is not None and rows is not None:
                check_rows(rows, count_samples(given))
        check_groups(count, group)
        size = group or max(count, 1)
        start, stop = split(count // size, team.size, team.rank) if whole and group else (0, count // size)
        smallest = count // size // team.size if whole and group else count // size
        if options.most is not None:
            # As many on all replicas.
            largest = -(-count // size // team.size) if whole else count // size
            micro_batches = max(micro_batches, -(-largest // max(options.most // size, 1)))
        if smallest < micro_batches:
            each = "" if size == 1 else f" in groups of {size}"
            raise InvalidInput(
                f"batch_size: {count} samples{each} do not make {micro_batches} micro-batches on {team.size} replicas; "
                "give a larger batch, or fewer --micro-batches"
            )
    copies = 1 if group else team.size
    total = count * copies if whole else team.total(count)
    entering = Selection(placeholder(count, 0)) if inputs is None else Selection(inputs, rows)
    compared = Selection(placeholder(count, numbers)) if targets is None else Selection(targets, rows)
    edges = [split(stop - start, micro_batches, index) for index in range(micro_batches)]
    ranges = [((start + first) * size, (start + last) * size) for first, last in edges]
    with comm.shared_errors():
        # What is read may be wrong in one replica.
        parts = [(entering.part(*place), compared.part(*place)) for place in ranges]
    passes = [
        Pass(
            *part,
            weight=(last - first) / total,
            stream=(*stream, team.rank if group else 0, index, stages.rank),
            subdomains=decomposition.carried,
            position=first,
            shard_size=count,
            group=size,
        )
        for index, (part, (first, last)) in enumerate(zip(parts, ranges, strict=True))
    ]
    own = sum(part.samples for part in passes)
    return Batch(samples, rows, passes, total // copies, [own / team.total(own)])


def _count(data: Tree | None, rows: torch.Tensor | None) -> int:
    return -1 if data is None else len(Selection(data, rows))
