"""Losses with a denominator of their own: the same on any number of ranks as torch's mean over the whole batch.

Numbers of several ranks agree with those of one to rounding, which a few iterations, conjugate gradients and the
subtraction in rho magnify; 1e-8 is asked for.
"""

import functools
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, flat, numbers, options
from staged_networks import PATIENCE, built, mlp
from torch import nn

from apts_mpi import (
    APTS,
    APTSOptions,
    CoarseOptions,
    GlobalStepOptions,
    InvalidInput,
    LocalOptions,
    PipelineOptions,
    SchwarzOptions,
    StagedAPTS,
    TrustRegionOptions,
    losses,
)
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.train.baselines import DataParallel
from apts_mpi.train.options import BaselineOptions

F = nn.functional
TOLERANCE = 1e-8
WEIGHTS = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)


def padded(samples=61, seed=1):
    """The first third, all of the first of three ranks, does not count, and some others do not."""
    inputs, targets = classified(samples, seed)
    targets[: samples // 3 + 1] = -100
    targets[samples // 2 :: 5] = -100
    return inputs, targets


def own_pair(outputs, targets):
    """As a user writes it, with a number and with weights of the samples."""
    each = F.cross_entropy(outputs, targets, reduction="none", ignore_index=-100)
    weights = 0.5 + (targets == 1)
    return (weights * each).sum(), float((weights * (targets != -100)).sum())


def mean_of_own_pair(outputs, targets):
    total, count = own_pair(outputs, targets)
    return total / count


# What the solver is given, and what torch makes of the whole batch.
LOSSES = {
    "ignored": (F.cross_entropy, F.cross_entropy),
    "weights": (nn.CrossEntropyLoss(weight=WEIGHTS), nn.CrossEntropyLoss(weight=WEIGHTS)),
    "smooth": (
        losses.cross_entropy(weight=WEIGHTS, ignore_index=1, label_smoothing=0.2),
        lambda outputs, targets: F.cross_entropy(
            outputs, targets.clamp_min(1), WEIGHTS, ignore_index=1, label_smoothing=0.2
        ),
    ),
    "partial": (functools.partial(F.cross_entropy, weight=WEIGHTS), functools.partial(F.cross_entropy, weight=WEIGHTS)),
    "own": (own_pair, mean_of_own_pair),
}


class Case(NamedTuple):
    """Options of a run."""

    solver: str
    local_data: str
    variant: str = "exact"
    iterations: int = 1
    coarse: str = "none"
    samples: float | None = None
    global_step: str = "none"
    initial_radius: float | None = 0.3

    def options(self, subdomains):
        chosen = options(
            subdomains=subdomains,
            solver=self.solver,
            local_data=self.local_data,
            variant=self.variant,
            iterations=self.iterations,
            global_step=self.global_step,
            initial_radius=self.initial_radius,
        )
        return replace(chosen, coarse=CoarseOptions(model=self.coarse, samples=self.samples))


CASES = {
    "plain": Case("sgd", "shard"),
    "corrected": Case("adam", "shard", "inexact", 3, "gauss-newton", 0.5),
    "whole": Case("adam", "full", "exact", 2, "gauss-newton", 1.0, "first-order"),
    "kfac": Case("kfac", "shared", "inexact", 1, "gauss-newton"),
    "kfac of teams": Case("kfac", "full", "exact", 1, "gauss-newton", 0.3),
    "dense": Case("gauss-newton", "full", "exact", 1, "gauss-newton", 1.0),
    "dense shards": Case("gauss-newton", "shard", "exact", 2, "gauss-newton", 0.4),
    "second order": Case("steihaug", "shard", "exact", 2, "none", None, "steihaug"),
    "secants": Case("lsr1", "full", "inexact", 3, "none", None, "lsr1"),
}


def targets_for(name, batch):
    inputs, targets = batch
    return (inputs, targets.clamp_min(1)) if name == "smooth" else batch


def steps(solver, batches):
    """Numbers of five iterations: a batch, twice more the same one, another one, and the first again."""
    results = [solver.step(batches[0]), solver.step(), solver.step(), solver.step(batches[1]), solver.step(batches[0])]
    return [judged for result in results for judged in numbers(result)]


def close(found, expected):
    pair = (torch.tensor(part, dtype=torch.float64) for part in (found, expected))
    torch.testing.assert_close(*pair, rtol=TOLERANCE, atol=TOLERANCE)


def narrow():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(10 if index == 0 else 5, 5), nn.Tanh()) for index in range(3)]
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


def right_numbers(mean, network, batch):
    """Loss and norm of the gradient of torch's mean over the whole batch."""
    loss = mean(network(batch[0]), batch[1])
    gradient = torch.autograd.grad(loss, list(network.parameters()))
    return float(loss.detach()), float(flat(gradient).norm())


@pytest.mark.mpi
@pytest.mark.all_sizes(case="kfac", name="ignored")
@pytest.mark.all_sizes(case="corrected", name="own")
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_as_in_one_process(world, case, name):
    loss, mean = LOSSES[name]
    batches = [targets_for(name, padded(samples, seed)) for samples, seed in ((61, 1), (53, 2))]
    network = narrow()
    expected = right_numbers(mean, network, batches[0])
    chosen = CASES[case].options(3)
    solver = APTS(network, loss, comm=world, options=chosen)
    first = solver.step(batches[0])
    assert (first.schwarz.loss, first.schwarz.gradient_norm) == pytest.approx(expected, rel=1e-12)
    if first.schwarz.accepted and first.global_step is None:
        after = float(mean(network(batches[0][0]), batches[0][1]).detach())
        assert first.schwarz.trial_loss == pytest.approx(after, rel=1e-12)
    found = steps(solver, batches)
    if world.rank == 0:
        alone = narrow()
        serial = APTS(alone, loss, comm=MPI.COMM_SELF, options=chosen)
        serial.step(batches[0])
        close(found, steps(serial, batches))
        close(flat(network.parameters()).tolist(), flat(alone.parameters()).tolist())


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("name", LOSSES)
def test_first_radius(world, name):
    """It is given to seven digits, of which the last may be another one."""
    batch = targets_for(name, padded())
    chosen = CASES["plain"]._replace(initial_radius=None).options(3)
    radius = APTS(narrow(), LOSSES[name][0], comm=world, options=chosen).step(batch).schwarz.radius
    alone = APTS(narrow(), LOSSES[name][0], comm=MPI.COMM_SELF, options=replace(chosen, subdomains=1)).step(batch)
    assert radius == pytest.approx(alone.schwarz.radius, rel=1e-5)


@pytest.mark.mpi
@pytest.mark.all_sizes(name="own")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("solver", ["kfac", "adam", "gauss-newton"])
@pytest.mark.parametrize("name", LOSSES)
def test_stages(world, name, solver, recompute):
    """Micro-batches of which the first does not count; as with the replicated layout in one process."""
    loss, mean = LOSSES[name]
    batches = [targets_for(name, padded(samples, seed)) for samples, seed in ((61, 1), (53, 2))]

    def chosen(layout, iterations=2 if solver == "adam" else 1):
        return APTSOptions(
            layout=layout,
            subdomains=max(world.size, 3),
            stall_timeout=PATIENCE if layout == "staged" else None,
            schwarz=SchwarzOptions(variant="inexact", local_data="full"),
            local=LocalOptions(solver=solver, iterations=iterations, damping=0.1),
            coarse=CoarseOptions(model="gauss-newton", samples=1.0),
            global_step=GlobalStepOptions(model="steihaug" if solver == "adam" else "none"),
            trust_region=TrustRegionOptions(initial_radius=0.3),
            pipeline=PipelineOptions(micro_batches=4, recompute=recompute),
        )

    parts = built(mlp)
    right = right_numbers(mean, parts, batches[0])
    network = StagedAPTS(parts, loss, comm=world, options=chosen("staged"))
    given = [
        (inputs if world.rank == 0 else None, targets if world.rank == world.size - 1 else None)
        for inputs, targets in batches
    ]
    found = steps(network, given)
    assert found[0][0] == pytest.approx(right[0], rel=1e-12)
    if world.rank == 0:
        serial = APTS(built(mlp), loss, comm=MPI.COMM_SELF, options=chosen("replicated"))
        close(found, steps(serial, batches))


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("name", ["ignored", "own"])
def test_shards_of_ranks(world, name):
    """Each rank is given its own samples; nothing counts on the first."""
    loss, mean = LOSSES[name]
    inputs, targets = classified(20 * world.size)
    targets[: 20 if world.size > 1 else 5] = -100
    own = slice(20 * world.rank, 20 * world.rank + 20)
    network = narrow()
    expected = right_numbers(mean, network, (inputs, targets))
    chosen = replace(CASES["plain"].options(world.size), batch="shard")
    chosen = replace(chosen, schwarz=replace(chosen.schwarz, partition="index"))
    result = APTS(network, loss, comm=world, options=chosen).step((inputs[own], targets[own]))
    assert (result.schwarz.loss, result.schwarz.gradient_norm) == pytest.approx(expected, rel=1e-12)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_a_batch_in_which_nothing_counts(world):
    """It teaches nothing, and nothing becomes NaN."""
    solver = APTS(narrow(), F.cross_entropy, comm=world, options=CASES["kfac"].options(3))
    inputs, targets = padded()
    assert solver.step((inputs, targets)).schwarz.accepted
    result = solver.step((inputs, torch.full_like(targets, -100)))
    assert result.schwarz.loss == 0.0 and result.skipped
    assert solver.step((inputs, targets)).schwarz.accepted


@pytest.mark.mpi
@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
@pytest.mark.parametrize("name", LOSSES)
def test_other_optimizers(world, name, optimizer):
    loss, mean = LOSSES[name]
    batch = targets_for(name, padded())
    network = narrow()
    expected = right_numbers(mean, network, batch)
    solver = DataParallel(network, loss, comm=world, options=BaselineOptions(optimizer=optimizer, learning_rate=0.1))
    result = solver.step(batch)
    assert (result.loss, result.gradient_norm) == pytest.approx(expected, rel=1e-12)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_noisy_batches(world):
    """Each gradient has the denominator of its own batch."""
    chosen = APTSOptions(subdomains=3, noise="batches")
    batches = [padded(61, 1), padded(53, 2), padded(47, 3)]

    def run(comm):
        solver = APTS(narrow(), F.cross_entropy, comm=comm, options=chosen)
        return [judged for batch in batches for judged in numbers(solver.step(batch))]

    found = run(world)
    if world.rank == 0:
        close(found, run(MPI.COMM_SELF))


def late(targets, place):
    targets = targets.clone()
    targets[place] = -100
    return targets


@pytest.mark.mpi
@pytest.mark.all_sizes(staged=False)
@pytest.mark.parametrize("staged", [False, True])
def test_padding_that_comes_later_is_named(world, staged):
    """Of a loss that nobody knows, and whose first batches are right."""

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets)

    inputs, targets = classified(120)
    network = built(mlp)
    if staged:
        solver = StagedAPTS(network, loss, comm=world, options=APTSOptions(layout="staged", stall_timeout=PATIENCE))
    else:
        solver = APTS(network, loss, comm=world, options=APTSOptions(subdomains=3))
    assert all(solver.step((inputs, targets)).schwarz.accepted for _ in range(2))
    before = flat(network.parameters())
    with pytest.raises(SharedInvalidInput, match="loss: it is not the mean over the samples of this batch"):
        solver.step((inputs, late(targets, slice(3, 7))))
    assert torch.equal(flat(network.parameters()), before)
    assert solver.step((inputs, targets)).schwarz.accepted


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_padding_that_comes_later_with_other_optimizers(world):
    inputs, targets = classified(120)
    solver = DataParallel(
        narrow(),
        lambda outputs, targets: F.cross_entropy(outputs, targets),
        comm=world,
        options=BaselineOptions(optimizer="sgd", learning_rate=0.1),
    )
    solver.step((inputs, targets))
    with pytest.raises(SharedInvalidInput, match="loss: it is not the mean over the samples of this batch"):
        solver.step((inputs, late(targets, slice(3, 7))))


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_a_loss_is_a_pair_always_or_never(world):
    """On the last rank alone it is one at first; then it is one no more on the first."""

    def by_rank(outputs, targets):
        return own_pair(outputs, targets) if world.rank == world.size - 1 else F.cross_entropy(outputs, targets)

    batch = classified(120)
    if world.size > 1:
        with pytest.raises(SharedInvalidInput, match=r"a pair \(sum, count\) for some samples"):
            APTS(narrow(), by_rank, comm=world, options=CASES["plain"].options(3)).step(batch)

    is_pair = True

    def changing(outputs, targets):
        pair = own_pair(outputs, targets)
        return pair if is_pair or world.rank > 0 else pair[0] / pair[1]

    solver = APTS(narrow(), changing, comm=world, options=CASES["plain"].options(3))
    solver.step(batch)
    is_pair = False
    with pytest.raises(SharedInvalidInput, match=r"a pair \(sum, count\) for some samples"):
        solver.step(batch)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, targets: (outputs.square().mean(), len(outputs)), "not a sum over the samples with its count"),
        (lambda outputs, targets: (outputs.square().sum(), 1.0), "which differ in their counts"),
        (lambda outputs, targets: (outputs.square().sum(), (outputs > 0.1).sum()), "its count is .* for some outputs"),
        (lambda outputs, targets: (outputs.square().sum(), outputs.abs().sum()), "its count has a gradient"),
        (lambda outputs, targets: (outputs.square().sum(), -1.0), "it counts -1"),
        (lambda outputs, targets: (outputs.square().sum(), "many"), "it counts with str 'many'"),
        (lambda outputs, targets: (outputs.square().sum(), targets), r"it counts with a tensor of .*shape \(24,\)"),
        (lambda outputs, targets: (outputs.square(), 24), r"it returns a tensor of torch.float64 with shape \(24, 3\)"),
        (lambda outputs, targets: (outputs.sum(), 24, 1), "it returns tuple"),
    ],
    ids=["mean", "one", "moves", "gradient", "negative", "text", "vector", "each", "three"],
)
def test_pairs_that_are_none(loss, message):
    solver = APTS(narrow(), loss, comm=MPI.COMM_SELF, options=CASES["plain"].options(1))
    with pytest.raises(InvalidInput, match=message):
        solver.step(classified(24))


BROADCAST = {
    "function": F.mse_loss,
    "module": nn.MSELoss(),
    "lambda": lambda outputs, targets: ((outputs - targets) ** 2).mean(),
    "absolute": F.l1_loss,
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.mpi
@pytest.mark.parametrize("name", BROADCAST)
@pytest.mark.parametrize("turned", [False, True])
def test_shapes_that_are_broadcast_are_named(world, name, turned):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 4), nn.Tanh(), nn.Linear(4, 1), *([nn.Flatten(0)] if turned else [])).double()
    inputs = classified(40)[0]
    targets = inputs[:, :1] if turned else inputs[:, 0]
    solver = APTS(network, BROADCAST[name], comm=world, options=CASES["plain"].options(1))
    shapes = (
        r"are broadcast to \(\d+, \d+\), each output with the targets of all samples; give both one shape, such as "
    )
    remedy = r"outputs\[:, None\]" if turned else r"targets\[:, None\]"
    with pytest.raises(InvalidInput, match=shapes + remedy):
        solver.step((inputs, targets))
    assert solver.step((inputs, targets[:, 0] if turned else targets[:, None])).schwarz.accepted


def test_a_recognised_loss_is_told():
    chosen = CASES["plain"].options(1)
    text = APTS(classifier(), nn.CrossEntropyLoss(ignore_index=2), comm=MPI.COMM_SELF, options=chosen).describe()
    assert "loss: CrossEntropyLoss, as a sum and its count: CrossEntropy(weight=None, ignore_index=2" in " ".join(
        text.split()
    )


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_messages(world):
    """A mean costs none more than the trial's; a pair one for each new batch, and none for the batch before."""

    def mean(outputs, targets):
        return F.cross_entropy(outputs, targets)

    def agreed(loss, again):
        solver = APTS(narrow(), loss, comm=world, options=CASES["plain"].options(3))
        solver.step(classified(120))
        before = solver.events.operations["agree"].messages
        solver.step(None if again else classified(120, seed=2))
        return solver.events.operations["agree"].messages - before

    assert [agreed(loss, again) for loss in (mean, F.cross_entropy, own_pair) for again in (False, True)] == [
        1, 1, 2, 1, 2, 1
    ]  # fmt: skip
