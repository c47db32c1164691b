"""Batches that say nothing about the ball: not finite, or without a gradient; steps of no length; convergence."""

import dataclasses
import math

import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy, flat, make_solver, options
from torch import nn

from apts_mpi import APTS, APTSOptions, LocalOptions, StagedAPTS
from apts_mpi.schwarz.coarse import LARGEST

BAD = math.nan, math.inf


def spoiled(batch, value, sample=3):
    """The batch with a feature of one sample that is no number."""
    inputs = batch[0].clone()
    inputs[sample, 2] = value
    return inputs, batch[1]


def default_solver(world, solver="auto", subdomains=3, **keywords):
    chosen = APTSOptions(subdomains=subdomains, local=LocalOptions(solver=solver), **keywords)
    network = classifier()
    if keywords.get("layout") == "staged":
        return StagedAPTS(network, cross_entropy, comm=world, options=chosen)
    return APTS(network, cross_entropy, comm=world, options=chosen)


def unchanged(result, before):
    """That a step was skipped, and left the radius."""
    judged = result.schwarz
    return judged.skipped and not result.accepted and judged.next_radius == judged.radius == before


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("solver", ["auto", "adam", "lsr1", "gauss-newton"])
def test_first_good_batch_after_80_bad_ones_is_a_normal_one(world, solver):
    """Neither radius nor damping nor the local solvers' memory keep anything of them."""
    one, other = default_solver(world, solver), default_solver(world, solver)
    batches = [classified(seed=seed) for seed in range(4)]
    for batch in batches[:2]:
        one.step(batch)
        other.step(batch)
    radius = one.state.radius
    for index in range(80):
        assert unchanged(one.step(spoiled(batches[2], BAD[index % 2])), radius)
    assert one.state.skipped == 80 and one.state.rejected == other.state.rejected
    # Its random streams are numbered by batches.
    one.state.functions = other.state.functions
    for batch in batches[2:]:
        ours, theirs = one.step(batch), other.step(batch)
        assert dataclasses.asdict(ours.schwarz) == dataclasses.asdict(theirs.schwarz)
    assert torch.equal(flat(one.network.parameters()), flat(other.network.parameters()))


@pytest.mark.mpi(min_size=2)
def test_staged_skips_as_well(world):
    solver = default_solver(world, layout="staged", subdomains=max(3, world.size))
    good = classified()
    solver.step(good)
    radius, point = solver.state.radius, flat(solver.network.parameters())
    assert unchanged(solver.step(spoiled(good, math.nan)), radius)
    assert torch.equal(flat(solver.network.parameters()), point)
    assert solver.step(good).accepted


@pytest.mark.mpi
def test_bad_first_batch_does_not_set_the_radius(world):
    """The automatic one is measured on the first batch that can tell it."""
    one, other = default_solver(world), default_solver(world)
    assert one.step(spoiled(classified(), math.nan)).skipped
    assert one.state.radius is None
    one.state.functions -= 1
    assert one.step(classified()).schwarz.radius == other.step(classified()).schwarz.radius


def test_given_first_radius_stays():
    solver = make_solver(MPI.COMM_SELF, options(initial_radius=0.125))
    solver.step(spoiled(classified(), math.inf))
    assert solver.state.radius == 0.125


def hinge(outputs, targets):
    """Zero, with a zero gradient, once every sample is on its side."""
    return (1.0 - outputs[:, 0] * (2.0 * targets - 1.0)).clamp(min=0.0).mean()


@pytest.mark.mpi
@pytest.mark.parametrize("global_step", ["none", "lsr1", "steihaug"])
def test_solved_batch_is_skipped(world, global_step):
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    solver = make_solver(world, options(subdomains=2, global_step=global_step), network, hinge)
    inputs, targets = torch.eye(4, dtype=torch.float64).repeat(6, 1), torch.ones(24)
    with torch.no_grad():
        network[2].bias.fill_(-0.5)
    for _ in range(40):
        result = solver.step((inputs, targets))
        if result.schwarz.gradient_norm == 0.0:
            break
    radius, point = solver.state.radius, flat(network.parameters())
    for _ in range(5):
        result = solver.step()
        assert unchanged(result, radius) and result.at_rest and result.global_step is None
    assert torch.equal(flat(network.parameters()), point)


def test_solved_batches_among_others_cost_nothing():
    """Every third batch solved: the others go on as if it were not there, but for the global number of the batch."""

    def trained(with_solved):
        torch.manual_seed(3)
        network = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        solver = APTS(network, hinge, comm=MPI.COMM_SELF, options=APTSOptions(subdomains=2))
        data = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        labels = (data.prod(dim=1) > 0.0).double()
        for step in range(30):
            part = slice(20 * (step % 2), 20 * (step % 2) + 20)
            solver.step((data[part], labels[part]))
            if with_solved:
                assert solver.step((data[part], solved(network, data[part]))).skipped
        return hinge(network(data), labels).item()

    def solved(network, inputs):
        """Targets, outside of 0 and 1, that make the loss of any outputs zero."""
        with torch.no_grad():
            return 0.5 + 10.0 / network(inputs)[:, 0]

    assert trained(True) == pytest.approx(trained(False), rel=1e-12)


@pytest.mark.parametrize("solver", ["auto", "gauss-newton", "adam"])
def test_loss_that_is_exactly_zero_stays_so(solver):
    """513 steps more; it ended in an error of the eigenvalue solver."""
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    solver = APTS(
        network,
        nn.functional.mse_loss,
        comm=MPI.COMM_SELF,
        options=APTSOptions(subdomains=2, local=LocalOptions(solver=solver)),
    )
    inputs = torch.randn(20, 3, dtype=torch.float64)
    result = solver.step((inputs, torch.zeros(20, 1, dtype=torch.float64)))
    for _ in range(512):
        result = solver.step()
    assert result.skipped and result.at_rest and solver.state.skipped == 513


def test_damping_is_bounded_and_comes_back():
    """Also where every step is rejected for a good reason: nothing goes down from a point that the loss forbids."""
    network = classifier()
    start = flat(network.parameters())
    forbidden = []

    def loss(outputs, targets):
        value = cross_entropy(outputs, targets)
        moved = not torch.equal(flat(network.parameters()), start)
        return value * math.nan if moved and forbidden else value

    solver = APTS(network, loss, comm=MPI.COMM_SELF, options=APTSOptions(subdomains=3))
    solver.step(classified())
    start = flat(network.parameters())
    forbidden.append(True)
    for _ in range(60):
        solver.step(classified())
    assert solver.holding.coarse.raised == LARGEST
    assert solver.state.radius == pytest.approx(1e-8)
    forbidden.clear()
    losses = [solver.step(classified()).schwarz.loss for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]


def test_damping_of_a_saved_state_is_bounded():
    solver = APTS(classifier(), cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions(subdomains=3))
    state = solver.holding.coarse.state() | {"raised": math.inf}
    solver.holding.coarse.restore(state)
    assert solver.holding.coarse.raised == LARGEST


@pytest.mark.mpi
def test_step_that_changes_nothing_is_not_accepted(world):
    """One in float32 that is lost in rounding; the radius grows, so that the next ones may be seen."""
    network = classifier().float()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(100.0 * parameter.sign())
    chosen = options(initial_radius=1e-8, subdomains=2)
    solver = make_solver(world, chosen, network, lambda outputs, targets: (outputs * 1e-3).square().mean())
    inputs, targets = classified()
    point = flat(network.parameters())
    result = solver.step((inputs.float(), targets))
    assert not result.accepted and not result.skipped and result.schwarz.step_norm == 0.0
    assert torch.equal(flat(network.parameters()), point)
    for _ in range(60):
        result = solver.step()
        if result.accepted:
            break
    assert result.accepted and result.schwarz.step_norm > 0.0


def test_small_gradients_in_single_precision_are_gradients():
    """Their squares are zero in float32."""
    network = nn.Linear(2, 1, bias=False)
    solver = make_solver(
        MPI.COMM_SELF, options(subdomains=1), network, lambda outputs, targets: 1e-25 * (outputs - 1e3).mean()
    )
    result = solver.step((torch.ones(4, 2), torch.zeros(4)))
    assert not result.skipped and result.schwarz.gradient_norm == pytest.approx(math.sqrt(2) * 1e-25, rel=1e-5)
