"""Ranks that are to have the same batch and have not are told so, at the first batch or at a later one."""

import pytest
import torch
from networks import classified, classifier, cross_entropy

from apts_mpi import APTS, APTSOptions, InvalidInput, StagedAPTS


def make(world, layout):
    options = APTSOptions(layout=layout, replicas=world.size if layout == "staged" else 1)
    kind = StagedAPTS if layout == "staged" else APTS
    return kind(classifier(), cross_entropy, comm=world, options=options)


DIFFERENCES = {
    "samples": lambda inputs, targets: (classified(seed=7)[0], targets),
    "order": lambda inputs, targets: (inputs.flip(0), targets.flip(0)),
    "targets": lambda inputs, targets: (inputs, (targets + 1) % 3),
    "count": lambda inputs, targets: (inputs[:-1], targets[:-1]),
}


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("layout", ["replicated", "staged"])
@pytest.mark.parametrize("name", DIFFERENCES)
@pytest.mark.parametrize("before", [0, 2], ids=["at first", "later"])
def test_another_batch_on_one_rank_is_refused_on_all(world, layout, name, before):
    solver = make(world, layout)
    for _ in range(before):
        solver.step(classified())
    batch = classified()
    if world.rank == world.size - 1:
        batch = DIFFERENCES[name](*batch)
    with pytest.raises(InvalidInput, match=r"batch: rank . has (other|another) .*; give all ranks the same, or choose"):
        solver.step(batch)


@pytest.mark.mpi(min_size=2)
def test_other_rows_on_one_rank_are_refused_on_all(world):
    solver = make(world, "replicated")
    inputs, targets = classified(2000)
    solver.step((inputs, targets), torch.arange(500))
    with pytest.raises(InvalidInput, match="batch: rank . has other inputs than rank ., first in sample"):
        solver.step((inputs, targets), torch.arange(500) + (3 if world.rank == 1 else 0))


@pytest.mark.mpi(min_size=2)
def test_rounding_is_no_difference_and_shards_are_not_compared(world):
    solver = make(world, "replicated")
    inputs, targets = classified()
    for _ in range(3):
        solver.step((inputs * (1.0 + 1e-16 * 3 * (world.rank == 1)), targets))
    own = APTS(classifier(), cross_entropy, comm=world, options=APTSOptions(batch="shard"))
    for _ in range(2):
        own.step(classified(seed=world.rank))
