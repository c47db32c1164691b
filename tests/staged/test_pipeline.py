"""What travels between stages, and what a stage does with its micro-batches, against torch alone on one rank."""

import copy

import pytest
import torch
from networks import cross_entropy, options
from staged_networks import NETWORKS, built, compare, images, resnet, staged, tuples, whole_state
from torch import nn

from apts_mpi import StagedAPTS
from apts_mpi.errors import StageError, StallError
from apts_mpi.network.activations import store
from apts_mpi.network.partition import split
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.staged.pipeline import Pipeline
from apts_mpi.staged.schedules import SCHEDULES, forwards
from apts_mpi.tools.events import Events


def gradient_in_parts(network, batch, micro_batches):
    """Loss and gradients of the mean over all samples, one micro-batch after the other."""
    network.zero_grad()
    total = 0.0
    for index in range(micro_batches):
        own = slice(*split(len(batch[0]), micro_batches, index))
        loss = cross_entropy(network(batch[0][own]), batch[1][own]) * len(batch[1][own]) / len(batch[1])
        loss.backward()
        total += float(loss.detach())
    return total, {name: parameter.grad.clone() for name, parameter in network.named_parameters()}


@pytest.mark.mpi
@pytest.mark.all_sizes(schedule="1f1b", recompute=False)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recompute", [False, True])
def test_tuples_of_any_dtype(world, schedule, recompute):
    """Rounding to bfloat16 is the same everywhere; sums are formed in the same order."""
    batch = images(23, 1, 10)
    chosen = staged(
        options(subdomains=None), micro_batches=5, schedule=schedule, recompute=recompute, solver="tr", iterations=2
    )
    solver = StagedAPTS(built(tuples), cross_entropy, comm=world, options=chosen)
    judged = solver.step(batch).schwarz
    assert judged.accepted
    loss, gradients = gradient_in_parts(built(tuples), batch, 5)
    assert judged.loss == pytest.approx(loss, rel=1e-13)
    for entry in solver.holding.objective.vector.entries:
        own = solver.holding.objective.reduction.total[entry.start : entry.stop]
        torch.testing.assert_close(own, gradients[entry.name].flatten(), rtol=1e-12, atol=1e-15)
    expected = gradient_in_parts(_loaded(tuples, whole_state(solver)), batch, 5)[0]
    assert judged.trial_loss == pytest.approx(expected, rel=1e-13)


def _loaded(builder, state):
    network = built(builder)
    network.load_state_dict(state)
    return network


def resnet_with_batch_norm():
    return resnet(norm=True)


@pytest.mark.mpi
def test_batch_normalisation_with_one_micro_batch_is_that_of_the_batch(world, monkeypatch):
    monkeypatch.setitem(NETWORKS, "norm", (resnet_with_batch_norm, *NETWORKS["resnet"][1:]))
    # The bias before a normalisation has a gradient of zero up to rounding: not with Adam.
    chosen = staged(options(subdomains=None, initial_radius=0.1), solver="tr", iterations=2, micro_batches=1)
    compare(world, chosen, "norm", monkeypatch)


@pytest.mark.mpi
@pytest.mark.all_sizes(recompute=True)
@pytest.mark.parametrize("recompute", [False, True])
def test_batch_normalisation_over_micro_batches_by_hand(world, recompute):
    """Each micro-batch has its own statistics, in both evaluations; running ones move by the mean change, once."""
    batch = images(23, 1, 36)
    chosen = staged(
        options(subdomains=None, initial_radius=0.1), solver="tr", iterations=2, micro_batches=3, recompute=recompute
    )
    solver = StagedAPTS(built(resnet_with_batch_norm), cross_entropy, comm=world, options=chosen)
    judged = solver.step(batch).schwarz
    assert judged.accepted
    start = built(resnet_with_batch_norm)
    assert judged.loss == pytest.approx(gradient_in_parts(copy.deepcopy(start), batch, 3)[0], rel=1e-12)
    state = whole_state(solver)
    parameters = {name: value for name, value in state.items() if "running" not in name and "tracked" not in name}
    start.load_state_dict(parameters, strict=False)
    moved = {name: torch.zeros_like(value) for name, value in start.named_buffers()}
    losses = []
    for index in range(3):
        own = slice(*split(23, 3, index))
        run = copy.deepcopy(start)
        share = len(batch[1][own]) / 23
        losses.append(share * float(cross_entropy(run(batch[0][own]), batch[1][own]).detach()))
        for (name, after), before in zip(run.named_buffers(), start.buffers(), strict=True):
            moved[name] += (after - before) * share if after.is_floating_point() else after * (index == 2)
    assert judged.trial_loss == pytest.approx(sum(losses), rel=1e-12)
    for name, before in start.named_buffers():
        torch.testing.assert_close(state[name], before + moved[name], rtol=1e-12, atol=1e-14)


@pytest.mark.mpi
def test_dropout_draws_the_same_masks_in_all_evaluations(world):
    """A step of no length has the loss of the point; repeated runs are equal to the bit."""

    def build():
        layers = [module for _ in range(8) for module in (nn.Linear(10, 10), nn.Tanh(), nn.Dropout(0.3))]
        return nn.Sequential(*layers, nn.Linear(10, 3))

    found = []
    for recompute in (False, True):
        chosen = staged(
            options(subdomains=None, initial_radius=1e-7), solver="tr", iterations=2, micro_batches=3,
            recompute=recompute,
        )  # fmt: skip
        judged = StagedAPTS(built(build), cross_entropy, comm=world, options=chosen).step(images(23, 1, 10)).schwarz
        assert judged.rho == pytest.approx(1.0, abs=1e-3)
        found.append(judged)
    assert found[0] == found[1]


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_caches_in_another_dtype_change_a_local_solve_a_little(world, dtype):
    steps = []
    for cache_dtype in ("auto", dtype):
        chosen = staged(
            options(subdomains=None, initial_radius=0.5), solver="tr", iterations=4, micro_batches=3,
            cache_dtype=cache_dtype,
        )  # fmt: skip
        solver = StagedAPTS(built(NETWORKS["mlp"][0]), cross_entropy, comm=world, options=chosen)
        judged = solver.step(NETWORKS["mlp"][1][0]).schwarz
        steps.append((judged, whole_state(solver)["9.weight"]))
    (exact, at), (rounded, near) = steps
    assert rounded.loss == exact.loss and rounded.gradient_norm == exact.gradient_norm
    difference = float((at - near).norm() / at.norm())
    assert 0.0 < difference < (1e-5 if dtype == "float32" else 3e-2)


def test_stored_bundles():
    bundle = (torch.tensor([1.0, 1.0 / 3.0]), torch.tensor([5]))
    kept = store(bundle, torch.bfloat16)
    assert [tensor.dtype for tensor in kept.kept] == [torch.bfloat16, torch.int64]
    assert [tensor.dtype for tensor in kept.load()] == [torch.float32, torch.int64]
    assert store(bundle, None).load()[0].data_ptr() == bundle[0].data_ptr()


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_shapes_are_agreed_once(world):
    """One description a stage, kind of pass and size of micro-batches, and one message a micro-batch and direction."""
    chosen = staged(options(subdomains=None), micro_batches=5)
    solver = StagedAPTS(built(NETWORKS["mlp"][0]), cross_entropy, comm=world, options=chosen)
    batch = NETWORKS["mlp"][1][0]
    counts = []
    for _ in range(2):
        before = solver.events.operations["pipeline"].messages
        solver.step(batch)
        counts.append(solver.events.operations["pipeline"].messages - before)
    first, last = world.rank == 0, world.rank == world.size - 1
    # Gradient and trial: two forward passes to the next stage, one backward pass to the one before.
    messages = 5 * (2 * (not last) + (not first))
    # Micro-batches of 7 and 8 samples; and the samples on which the loss is tried, five times.
    assert counts == [messages + 2 * (not last) + 6 * (not last), messages]


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_a_stage_that_raises_is_named(world):
    comm = Communicator(type(world).Dup(world), Events())
    comm.limit_patience(2.0, [f"stage {rank}" for rank in range(world.size)])
    pipeline = Pipeline(comm, [f"stage {rank}" for rank in range(world.size)], torch.device("cpu"))

    def forward(index, entering):
        if pipeline.stage == 1:
            raise ValueError("no luck")
        return torch.zeros(3)

    if world.rank == 1:
        with pytest.raises(StageError, match="stage 1 failed in the forward pass of micro-batch 0: ValueError: no lu"):
            pipeline.run(forwards(2), ["a", "a"], forward)
    elif world.rank == 0:
        pipeline.run(forwards(2), ["a", "a"], forward)
    else:
        # The stage before has left without a word. Those behind it wait, and name it.
        with pytest.raises(StallError, match="no sign of .*stage 1"):
            pipeline.run(forwards(2), ["a", "a"], forward)
