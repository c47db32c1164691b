"""What an iteration costs: passes through the network, and messages."""

import pickle
from dataclasses import replace

import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy, loss_and_gradient, make_solver, options
from torch import nn

from apts_mpi import APTS, APTSOptions, StagedAPTS

# Multiplications a sample of the classifier's six layers.
MULTIPLICATIONS = [10 * 16, 16 * 16, 16 * 16, 16 * 16, 16 * 16, 16 * 3]
SHARES = [count / sum(MULTIPLICATIONS) for count in MULTIPLICATIONS]
FORWARD, BACKWARD = 1.0 / 3.0, 2.0 / 3.0


def even_batch(world):
    """A batch that one subdomain a rank cuts into equal shards."""
    return classified(24 * world.size)


@pytest.mark.mpi
def test_evaluations_with_one_local_iteration(world):
    """The first local iteration is free: one gradient and one trial."""
    solver = make_solver(world, options(subdomains=world.size, partition="index", initial_radius=0.05))
    result = solver.step(even_batch(world))
    assert result.accepted
    assert result.gradient_evaluations == pytest.approx(1.0 + FORWARD, rel=1e-12)
    # The trial kept no graph, so the point is evaluated again; this time it does.
    assert solver.step().gradient_evaluations == pytest.approx(1.0 + FORWARD, rel=1e-12)
    assert solver.step().gradient_evaluations == pytest.approx(BACKWARD + FORWARD, rel=1e-12)
    assert solver.state.gradient_evaluations == pytest.approx(3.0 + 2.0 * FORWARD, rel=1e-12)


@pytest.mark.mpi
def test_step_after_a_rejection_costs_a_forward_pass_and_no_gradient(world):
    chosen = options(subdomains=world.size, partition="index", solver="tr", iterations=3, initial_radius=1e3)
    solver = make_solver(world, chosen)
    solver._trials._doubts = 4  # whether the loss is the same each time is looked into after the 1st, 2nd, 4th odd step
    assert not solver.step(even_batch(world)).accepted
    messages = {name: event.messages for name, event in solver.events.operations.items()}
    backward = []
    solver.network[0].weight.register_hook(lambda _: backward.append(1))
    result = solver.step()
    assert result.gradient_evaluations == pytest.approx(FORWARD, rel=1e-12)
    assert not backward
    # No gradient, no correction: ranks look for changes of the network and agree on the trial, and that is all.
    after = {name: event.messages for name, event in solver.events.operations.items()}
    for operation in ("collect", "agree", "decide"):
        assert after.pop(operation) == messages.pop(operation) + 1
    assert after == messages


@pytest.mark.mpi
@pytest.mark.parametrize("solver", ["sgd", "adam"])
@pytest.mark.parametrize("variant", ["exact", "inexact"])
def test_evaluations_of_local_iterations_by_hand(world, variant, solver):
    """On one rank with six subdomains: each runs its sixth of the batch through its part of the network."""
    chosen = options(subdomains=6, variant=variant, solver=solver, iterations=3, initial_radius=0.05)
    ours = make_solver(MPI.COMM_SELF, chosen)
    result = ours.step(classified(60))
    parts = [sum(SHARES[d:]) if variant == "exact" else SHARES[d] for d in range(6)]
    local = 2 * sum(parts) / 6
    assert result.gradient_evaluations == pytest.approx(1.0 + local + FORWARD, rel=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize("variant", ["exact", "inexact"])
def test_evaluations_of_the_local_trust_region_by_hand(world, variant):
    """Its last iteration is a trial without a gradient; every subdomain has the whole batch here."""
    chosen = options(subdomains=6, variant=variant, solver="tr", iterations=2, local_data="full", initial_radius=0.05)
    result = make_solver(MPI.COMM_SELF, chosen).step(classified(60))
    parts = sum(sum(SHARES[d:]) if variant == "exact" else SHARES[d] for d in range(6))
    assert result.gradient_evaluations == pytest.approx(1.0 + parts * (1.0 + FORWARD) + FORWARD, rel=1e-12)


@pytest.mark.mpi
def test_evaluations_with_a_global_step_and_an_automatic_radius(world):
    chosen = options(subdomains=world.size, partition="index", global_step="first-order", initial_radius=None)
    solver = make_solver(world, chosen)
    batch = even_batch(world)
    first = solver.step(batch)
    assert first.schwarz.accepted
    # One more for the curvature of the first batch, then gradient and trial for each of the two steps.
    assert first.gradient_evaluations == pytest.approx(3.0 + 2.0 * FORWARD, rel=1e-12)
    assert solver.step(batch).gradient_evaluations == pytest.approx(2.0 + 2.0 * FORWARD, rel=1e-12)


class Meter:
    """Counts multiplications of linear layers as torch calls them, forwards and backwards."""

    def __init__(self, network):
        self.work = 0.0
        for module in network.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self.see)

    def see(self, module, inputs, outputs):
        multiplications = len(inputs[0]) * module.weight.numel() / sum(MULTIPLICATIONS)
        self.work += FORWARD * multiplications
        if outputs.requires_grad:
            outputs.register_hook(lambda _: self.add(BACKWARD * multiplications))

    def add(self, work):
        self.work += work


@pytest.mark.mpi
@pytest.mark.all_sizes(choice={"variant": "exact", "solver": "adam", "iterations": 3})
@pytest.mark.parametrize(
    "choice",
    [
        {"variant": "exact", "solver": "adam", "iterations": 3},
        {"variant": "inexact", "solver": "tr", "iterations": 2, "global_step": "first-order"},
        {"variant": "inexact", "solver": "sgd", "iterations": 2, "overlap": 1, "local_data": "full"},
        {"variant": "exact", "solver": "tr", "iterations": 1, "subdomains": 1, "initial_radius": 50.0},
    ],
    ids=lambda choice: "-".join(map(str, choice.values())),
)
def test_evaluations_are_what_torch_was_asked_for(world, choice):
    """On the busiest rank, in evaluations of an even share of the batch; counted by hooks of torch's."""
    network = classifier()
    solver = make_solver(world, options(**choice), network)
    solver._trials._doubts = 4  # as above
    solver.step(classified())  # the first one measures the layers as well
    meter = Meter(network)
    # A repeated batch is counted alike, but less is run.
    for batch, samples in ((classified(), 121), (None, 121), (None, 121), (classified(97), 97), (None, 97)):
        meter.work = 0.0
        result = solver.step(batch)
        busiest = world.allreduce(meter.work, MPI.MAX)
        assert result.gradient_evaluations == pytest.approx(busiest * world.size / samples, rel=1e-12)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_messages_do_not_grow_with_the_number_of_tensors(world):
    def messages(depth):
        layers = [module for _ in range(depth) for module in (nn.Linear(10, 10), nn.Tanh())]
        network = nn.Sequential(*layers, nn.Linear(10, 3)).double()
        solver = make_solver(world, options(subdomains=2, partition="index"), network)
        found = []
        for seed in range(2):
            solver.events.clear()
            solver.step(classified(seed=seed))
            found.append({name: event.messages for name, event in solver.events.operations.items()})
        # Ranks that share a subdomain agree on their shares of its samples, and on whether they solve.
        for counts in found:
            for name in ("collect", "decide"):
                counts[name] -= solver.holding.decomposition.team.size > 1
        return found

    found = messages(1)
    assert found == messages(20)
    first, second = found
    # Several ranks look whether they have the same batch.
    several = 1 * (world.size > 1)
    # On the trial, and of cross entropy on the denominator of the batch.
    assert second == {"sum": 1, "gather": 1, "agree": 2, "decide": 2, "collect": 2 + several}
    # Also on the local solvers, the loss, its kind and the memory, and whether all have the same batch and loss, twice.
    assert first == {"sum": 1, "gather": 1, "agree": 6, "decide": 6, "collect": 11 + several}


@pytest.mark.mpi
def test_collectives_of_an_iteration_with_the_defaults(world):
    """The seventh, in which K-FAC measures nothing; what ranks agree on counts twice, to rank 0 and back."""
    solver = APTS(classifier(), cross_entropy, comm=world, options=APTSOptions(subdomains=min(world.size, 6)))
    for seed in range(7):
        solver.events.clear()
        solver.step(classified(seed=seed))
    operations = solver.events.operations
    assert sum(event.messages for event in operations.values()) <= 11, operations


@pytest.mark.mpi
@pytest.mark.parametrize("layout", ["replicated", "staged"])
def test_no_object_is_pickled_in_an_iteration(world, layout):
    """Of a network with running statistics, with a batch of its own."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(10, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).double()
    kind = APTS if layout == "replicated" else StagedAPTS
    solver = kind(network, cross_entropy, comm=world, options=APTSOptions())
    for seed in range(2):
        solver.step(classified(seed=seed))
    pickled = []
    MPI.pickle.__init__(lambda value, protocol=None: pickled.append(value) or pickle.dumps(value), pickle.loads)
    try:
        assert solver.step(classified(seed=2)).accepted
    finally:
        MPI.pickle.__init__(pickle.dumps, pickle.loads)
    assert pickled == []


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_gradient_of_several_buckets(world):
    """Beyond a megabyte the gradient goes in several messages."""
    torch.manual_seed(0)
    layers = [nn.Linear(10, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 400), nn.Linear(400, 3)]
    network = nn.Sequential(*layers).double()
    expected = loss_and_gradient(network, cross_entropy, classified())[1]
    solver = make_solver(world, options(partition="index"), network)
    solver.step(classified())
    torch.testing.assert_close(solver.holding.objective.reduction.total, expected, rtol=1e-10, atol=1e-15)
    assert solver.events.operations["sum"].messages == 3
    assert solver.events.operations["sum"].bytes == 8 * len(expected)


@pytest.mark.mpi
def test_tensor_that_the_loss_does_not_reach_has_a_zero_gradient(world):
    """Its part of the sum is sent although the backward pass never comes to it."""
    network = nn.Sequential(nn.Linear(10, 3), nn.Identity()).double()
    network[1].unused = nn.Parameter(torch.ones(7, dtype=torch.float64))
    solver = make_solver(world, options(subdomains=2, partition="index"), network)
    for _ in range(2):
        solver.holding.objective.reduction.total.fill_(torch.nan)
        solver.holding.objective.vector.gradients.fill_(torch.nan)
        assert solver.step(classified()).accepted
        assert (solver.holding.objective.reduction.total[-7:] == 0.0).all()
    assert torch.equal(network[1].unused, torch.ones(7, dtype=torch.float64))


@pytest.mark.mpi
def test_layers_are_recorded_where_statistics_are_due_alone(world):
    """On every rank, also where it measures for subdomains that other ranks solve."""
    chosen = options(subdomains=4, solver="kfac", local_data="shared")
    chosen = replace(chosen, noise="batches", local=replace(chosen.local, damping=1.0, refresh=8, decay=0.9))
    solver = make_solver(world, chosen)
    observed = []
    for number in range(24):
        batch = classified(24 * world.size, seed=number)
        solver.step(batch)
        observed.append(solver.holding.objective.observes())
    # For the next iteration: statistics move fast at first, see `KFAC.is_due`.
    assert [number for number, due in enumerate(observed, 1) if due] == [1, 2, 3, 4, 5, 8, 16, 24]
