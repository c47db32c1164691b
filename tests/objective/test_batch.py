"""A batch cut into passes that are large enough for what the network does."""

import math

import pytest
import torch
from networks import classified, classifier, cross_entropy, make_solver, options
from torch import nn

from apts_mpi import APTSOptions, CoarseOptions, InvalidInput, PipelineOptions, StagedAPTS
from apts_mpi.objective.batch import samples_of_pass
from apts_mpi.train.baselines import DataParallel
from apts_mpi.train.options import BaselineOptions

NORMS = {
    "batch": lambda: nn.BatchNorm1d(4),
    "batch, evaluated": lambda: nn.BatchNorm1d(4).eval(),
    "batch, without running means": lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
    "layer": lambda: nn.LayerNorm(4),
    "within": lambda: nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.BatchNorm1d(4))),
}


@pytest.mark.parametrize("name", NORMS)
def test_smallest_pass_is_what_torch_can_run(name):
    network = NORMS[name]()
    least = samples_of_pass(network)
    assert network(torch.ones(least, 4)).shape == (least, 4)
    if least > 1:
        with pytest.raises(ValueError, match="more than 1 value"):
            network(torch.ones(least - 1, 4))


def data_parallel(world):
    return DataParallel(
        classifier(batch_norm=True),
        cross_entropy,
        comm=world,
        options=BaselineOptions(optimizer="sgd", learning_rate=0.01),
    )


def staged(world):
    chosen = APTSOptions(
        layout="staged",
        stall_timeout=60.0,
        pipeline=PipelineOptions(micro_batches=2),
        coarse=CoarseOptions(samples=1.0),
    )
    # Of the norms all are on the first stage.
    layers = [nn.Linear(10, 10), nn.BatchNorm1d(10), *(nn.Linear(10, 10) for _ in range(5)), nn.Linear(10, 3)]
    return StagedAPTS(nn.Sequential(*layers).double(), cross_entropy, comm=world, options=chosen)


SOLVERS = {
    "shards": lambda world: make_solver(world, options(subdomains=3), classifier(batch_norm=True)),
    "whole batch": lambda world: make_solver(
        world, options(subdomains=1, local_data="full"), classifier(batch_norm=True)
    ),
    "data-parallel": data_parallel,
    "staged": staged,
}


@pytest.mark.mpi
@pytest.mark.all_sizes(name="shards")
@pytest.mark.parametrize("name", SOLVERS)
def test_batch_normalisation_has_two_samples_in_each_pass(world, name):
    solver = SOLVERS[name](world)
    least = solver.smallest_batch
    # Ranks beyond three share the samples of a subdomain.
    passes = {"shards": 3 * math.ceil(world.size / 3), "staged": 2}.get(name, world.size)
    assert least == 2 * passes
    with pytest.raises(InvalidInput, match="batch_size: .*normalisation"):
        solver.step(classified(least - 1))
    for seed in range(2):
        solver.step(classified(least, seed=seed))


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_shards_with_batch_normalisation(world):
    solver = make_solver(world, options(subdomains=world.size, batch="shard"), classifier(batch_norm=True))
    samples = 1 if world.rank == world.size - 1 else 5
    with pytest.raises(InvalidInput, match="a rank's shard of the batch has 1 samples.* need 2, 2 a pass for batch"):
        solver.step(classified(samples))
    solver.step(classified(samples + 1))


@pytest.mark.mpi
@pytest.mark.all_sizes(name="shards")
@pytest.mark.parametrize("name", ["shards", "data-parallel"])
def test_others_can_have_one(world, name):
    solver = (
        make_solver(world, options(subdomains=world.size, partition="index"))
        if name == "shards"
        else data_parallel(world)
    )
    solver.network.eval()
    assert solver.smallest_batch == world.size
    solver.step(classified(world.size))
