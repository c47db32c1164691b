"""The first step of the library: the same batch, network, options and loss on all ranks, and a loss that repeats."""

import math
import random

import pytest
import torch
from networks import classified, classifier, cross_entropy, flat, make_solver, options
from staged_networks import mlp

from apts_mpi import APTS, APTSOptions, PipelineOptions, StagedAPTS
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.objective.repeatable import ELSEWHERE, ONE_HOST, Value, value_of
from apts_mpi.staged.build import build_stage


def is_last(world):
    return world.rank == world.size - 1


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_labels_of_one_rank_are_named(world):
    inputs, targets = classified()
    solver = make_solver(world, options())
    before = flat(solver.network.parameters())
    with pytest.raises(
        SharedInvalidInput, match=f"batch: rank {world.size - 1} has other targets than rank 0, first in"
    ):
        solver.step((inputs, 2 - targets if is_last(world) else targets))
    assert torch.equal(flat(solver.network.parameters()), before)
    assert solver.step((inputs, targets)).accepted


@pytest.mark.mpi(min_size=2)
def test_rows_of_one_rank_are_named(world):
    """Only the rows that count are compared, and in their order."""
    inputs, targets = classified()
    inputs[100:] += world.rank
    rows = torch.arange(90)
    assert make_solver(world, options()).step((inputs, targets), rows).accepted
    with pytest.raises(SharedInvalidInput, match="batch: rank . has other inputs than rank 0, first in sample 0"):
        make_solver(world, options()).step((inputs, targets), rows.flip(0) if is_last(world) else rows)


@pytest.mark.mpi(min_size=2)
def test_number_of_samples_of_one_rank_is_named(world):
    batch = classified(100 if is_last(world) else 121)
    message = r"batch: rank . has another shape of the inputs than rank 0, \(100, 10\) and \(121, 10\)"
    with pytest.raises(SharedInvalidInput, match=message):
        make_solver(world, options()).step(batch)


@pytest.mark.mpi(min_size=2)
def test_shards_differ(world):
    chosen = options(subdomains=world.size, partition="index", batch="shard")
    assert make_solver(world, chosen).step(classified(30, seed=world.rank)).accepted


@pytest.mark.mpi(min_size=2)
def test_networks_and_options_of_one_rank_are_named(world):
    with pytest.raises(SharedInvalidInput, match=f"network: rank {world.size - 1} has another network than rank 0"):
        make_solver(world, options(), classifier(width=12 if is_last(world) else 16))
    with pytest.raises(SharedInvalidInput, match=f"options: rank {world.size - 1} has another local.iterations than"):
        make_solver(world, options(iterations=2 if is_last(world) else 1))
    forward = (lambda network, inputs: network(inputs)) if is_last(world) else None
    with pytest.raises(SharedInvalidInput, match="rank . has another (forward|network) than rank 0"):
        APTS(classifier(), cross_entropy, comm=world, options=APTSOptions(), forward=forward)


@pytest.mark.mpi(min_size=2)
def test_stages_and_options_of_one_rank_are_named(world):
    def chosen(seed=0):
        return APTSOptions(layout="staged", seed=seed, stall_timeout=60.0)

    def make():
        return classifier(width=12 if is_last(world) else 16)

    message = f"network: rank {world.size - 1} has another network than rank 0, 0: Linear"
    with pytest.raises(SharedInvalidInput, match=message):
        StagedAPTS(make(), cross_entropy, comm=world, options=chosen())
    with pytest.raises(SharedInvalidInput, match=message):
        build_stage(make, comm=world, options=chosen())
    with pytest.raises(SharedInvalidInput, match=f"options: rank {world.size - 1} has another seed than rank 0, "):
        StagedAPTS(classifier(), cross_entropy, comm=world, options=chosen(seed=int(is_last(world))))


@pytest.mark.mpi(min_size=4)
def test_samples_of_one_replica_are_named(world):
    chosen = APTSOptions(layout="staged", replicas=2, stall_timeout=60.0, pipeline=PipelineOptions(micro_batches=2))
    torch.manual_seed(0)
    solver = StagedAPTS(mlp().double(), cross_entropy, comm=world, options=chosen)
    inputs, targets = classified(60)
    wrong = (inputs, 2 - targets if is_last(world) else targets)
    with pytest.raises(SharedInvalidInput, match=r"batch: rank 3 has other targets than rank \d, first in sample"):
        solver.step(wrong)
    assert solver.step((inputs, targets)).accepted


@pytest.mark.mpi
def test_shard_with_a_random_loss_is_named(world):
    chosen = options(subdomains=world.size, partition="index", batch="shard")
    solver = make_solver(world, chosen, loss=lambda *pair: cross_entropy(*pair) * random.uniform(0.9, 1.1))
    with pytest.raises(SharedInvalidInput, match="loss: that of the first batch is .* once and .* another time"):
        solver.step(classified(30, seed=world.rank))


@pytest.mark.mpi(min_size=2)
def test_reason_names_the_rank(world):
    """Of shards, which are not compared, one has a sample that is not a number."""
    chosen = options(subdomains=world.size, partition="index", batch="shard")
    solver = make_solver(world, chosen)
    inputs, targets = classified(30, seed=world.rank)
    assert solver.step((inputs, targets)).reason == ""
    inputs[7, 3] = math.nan if is_last(world) else inputs[7, 3]
    result = solver.step((inputs, targets))
    assert not result.accepted
    assert f"the loss is not finite on rank {world.size - 1}; look for nan and inf in" in result.reason


@pytest.mark.mpi
def test_reason_of_all_ranks_names_none(world):
    inputs, targets = classified()
    inputs[:] = math.nan
    result = make_solver(world, options()).step((inputs, targets))
    assert result.reason.startswith("the loss is not finite; look for nan")


def test_tolerances():
    """Rounding passes, a thousandth does not; the coarser dtype and the larger outputs count."""
    outputs = torch.tensor([[1.0, -4.0]])
    value = value_of(torch.tensor(2.0), [outputs, torch.tensor([7])])
    assert value == Value(2.0, 4.0, torch.finfo(torch.float32).eps)
    assert 20 * value.epsilon < value.tolerance(ONE_HOST) < 1e-4 < value.tolerance(ELSEWHERE) < 2e-3
    assert value_of(torch.tensor(2.0), outputs.bfloat16()).epsilon == torch.finfo(torch.bfloat16).eps
    assert value_of(torch.tensor(2.0), torch.tensor([math.inf])).largest == 0.0


class Varying(torch.nn.Module):
    """Scores that are other ones at some calls, by means that torch does not seed."""

    def __init__(self, factor):
        super().__init__()
        self.linear, self.factor, self.calls = torch.nn.Linear(10, 3), factor, 0

    def forward(self, inputs):
        self.calls += 1
        return self.linear(inputs) * self.factor(self.calls)


GENERATOR = random.Random(3)

VARYING = {
    "every second pair of calls": lambda calls: 1.0 + calls // 2 % 2,
    "every third call": lambda calls: 1.0 + (calls % 3 == 0),
    "from some call on": lambda calls: 1.0 if calls < 40 else 1.0 + GENERATOR.random(),
    "seldom": lambda calls: 3.0 if GENERATOR.random() < 0.1 else 1.0,
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", VARYING)
@pytest.mark.parametrize("staged", [False, True])
def test_scores_that_vary_are_named(world, name, staged):
    """Also where the first evaluations come out alike: the steps that follow are like none that a model predicts."""
    if staged and world.size > 2:
        pytest.skip("a module for each of two stages")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Tanh(), Varying(VARYING[name])).double()
    if staged:
        chosen = APTSOptions(layout="staged", stall_timeout=60.0)
        solver = StagedAPTS(network, cross_entropy, comm=world, options=chosen)
    else:
        solver = APTS(network, cross_entropy, comm=world)
    with pytest.raises(SharedInvalidInput, match=r"loss: that of (the first|one) batch is .* once and .* another time"):
        for _ in range(40):
            solver.step(classified())
