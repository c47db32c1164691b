"""A batch cut into the passes of this rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.network.partition import Layout, Subdomain, split
from apts_mpi.objective.objective import Pass
from apts_mpi.options import LocalData
from apts_mpi.parallel.communicator import Communicator


def samples_of_pass(network: torch.nn.Module) -> int:
    """Samples that a pass needs at least: batch normalisation takes no statistics of a single one."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    return 2 if any(module.training or module.running_mean is None for module in norms) else 1


def passes_of_batch(
    batch: tuple[torch.Tensor, torch.Tensor],
    rows: torch.Tensor | None,
    *,
    layout: Layout,
    subdomains: Sequence[Subdomain],
    comm: Communicator,
    local_data: LocalData,
    whole: bool,
    stream: tuple[int, ...],
    least: int = 1,
) -> tuple[list[Pass], int]:
    """This rank's passes, and the number of samples of the batch. Collective.

    Parameters
    ----------
    batch
        Inputs and targets, samples in the first dimension: of the whole batch, or (``whole`` false) those of this
        rank alone, in the order of its passes.
    rows
        Samples of ``batch`` that count, in this order; None: all.
    layout, subdomains, comm
        Who owns what.
    local_data
        See `Layout.shards`.
    whole
        Whether every rank was given the whole batch.
    stream
        First part of the keys of the random streams.
    least
        Samples that a pass needs, see `samples_of_pass`.

    Raises
    ------
    InvalidInput
        On every rank, if inputs and targets differ in samples on one, or if a pass would have too few.
    """
    inputs, targets = batch
    team = layout.team_of(comm.rank)
    carried = [subdomains[index] for index in layout.subdomains_of(team)]
    member = comm.rank - layout.ranks_of(team).start
    groups = [(subdomain,) for subdomain in carried] if local_data == "shard" else [tuple(carried)]
    count = len(inputs) if rows is None else len(rows)
    with comm.shared_errors():
        if len(inputs) != len(targets):
            raise InvalidInput(f"batch: {len(inputs)} inputs but {len(targets)} targets; give as many of each")
        if whole:
            ranges = layout.shards(comm.rank, count, local_data)
            needed = least * layout.smallest_batch(local_data)
        else:
            ranges = [split(count, len(groups), index) for index in range(len(groups))]
            needed = least * len(groups)
        if count < needed:
            each = f", {least} a pass for batch normalisation" if least > 1 else ""
            where = "the batch" if whole else "a rank's shard of the batch"
            raise InvalidInput(
                f"batch_size: {where} has {count} samples, but {layout.ranks} ranks with {layout.subdomains} "
                f"subdomains need {needed}{each}; give a larger batch, or fewer ranks or subdomains"
            )
    own = sum(stop - start for start, stop in ranges)
    # With local_data full every team evaluates the whole batch, so that samples are seen more than once.
    total = comm.total(own) if not whole else count * (layout.teams if local_data == "full" else 1)
    batch_size = total // (layout.teams if local_data == "full" else 1)
    passes = []
    for (start, stop), group in zip(ranges, groups, strict=True):
        shard = (0, count) if local_data == "full" else split(count, layout.subdomains, group[0].index)
        part = slice(start, stop) if rows is None else rows[start:stop]
        passes.append(
            Pass(
                inputs[part],
                targets[part],
                weight=(stop - start) / total,
                stream=(*stream, group[0].index if local_data == "shard" else 0, member),
                subdomains=group,
                position=start - shard[0] if whole else 0,
                shard_size=shard[1] - shard[0] if whole else stop - start,
            )
        )
    return passes, batch_size


def team_shares(passes: Sequence[Pass], team: Communicator) -> list[float]:
    """This rank's share of its team's samples in each pass. Collective over the team."""
    if team.size == 1:
        return [1.0] * len(passes)
    return [part.samples / team.total(part.samples) for part in passes]
