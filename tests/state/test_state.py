"""What an iteration leaves behind: everything after an accepted step, nothing after a rejected one."""

import copy
import math

import pytest
import torch
from networks import SAMPLES, classified, classifier, cross_entropy, flat, make_solver, numbers, options, squared_error
from torch import nn

variants = pytest.mark.parametrize("variant", ["exact", "inexact"])

# Nearly no step is good enough for these, however short.
REJECTING = {"eta1": 0.9999, "shrink_below": 0.9999, "eta2": 0.99995}


def noisy_classifier():
    return classifier(batch_norm=True, dropout=0.3)


def snapshot(network):
    return {name: value.clone() for name, value in network.state_dict().items()}, torch.get_rng_state()


def assert_unchanged(network, before):
    state, random_state = before
    for name, value in network.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.mpi
@variants
@pytest.mark.parametrize("solver", ["sgd", "tr", "adam"])
def test_rejected_step_restores_everything_to_the_bit(world, variant, solver):
    network = noisy_classifier()
    chosen = options(variant=variant, solver=solver, iterations=2, initial_radius=1.0, **REJECTING)
    solver = make_solver(world, chosen, network)
    torch.manual_seed(5)
    before = snapshot(network)
    results = [solver.step(classified()), solver.step(), solver.step(), solver.step(classified(97))]
    assert not any(result.accepted for result in results)
    assert_unchanged(network, before)
    radii = [result.schwarz.next_radius for result in results]
    assert radii == sorted(radii, reverse=True) and radii[-1] < radii[0]


@pytest.mark.mpi
@variants
def test_loss_of_a_point_is_the_same_number_each_time(world, variant):
    """The masks and the statistics of a batch are those of its first evaluation."""
    solver = make_solver(world, options(variant=variant, initial_radius=1.0, **REJECTING), noisy_classifier())
    losses = [solver.step(classified()).schwarz.loss]
    losses += [solver.step().schwarz.loss for _ in range(3)]
    assert len(set(losses)) == 1


@pytest.mark.mpi
@variants
def test_loss_after_an_accepted_step_is_its_trial_loss(world, variant):
    """Whether the trial's own evaluation is taken over (second turn on) or made again (first)."""
    solver = make_solver(world, options(variant=variant, initial_radius=0.05), noisy_classifier())
    before = solver.step(classified()).schwarz
    for _ in range(3):
        assert before.accepted
        after = solver.step().schwarz
        assert after.loss == pytest.approx(before.trial_loss, rel=1e-14)
        before = after


@pytest.mark.mpi
def test_masks_differ_from_batch_to_batch_and_from_seed_to_seed(world):
    def losses(seed):
        solver = make_solver(world, options(seed=seed, initial_radius=1.0, **REJECTING), classifier(dropout=0.3))
        return [solver.step(classified()).schwarz.loss for _ in range(3)]

    found = losses(0) + losses(1)
    assert len(set(found)) == 6


@pytest.mark.mpi
@pytest.mark.all_sizes(local_data="shard", subdomains=8)
@pytest.mark.parametrize("local_data", ["shard", "full"])
@pytest.mark.parametrize("subdomains", [1, 8])
def test_accepted_step_moves_the_running_statistics_once(world, local_data, subdomains):
    """By the mean of what each pass would do alone, weighted by its samples."""
    network = classifier(batch_norm=True)
    twin = copy.deepcopy(network)
    chosen = options(subdomains=subdomains, local_data=local_data, initial_radius=0.05)
    solver = make_solver(world, chosen, network)
    inputs, targets = classified()
    for _ in range(2):
        buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
        assert solver.step((inputs, targets)).accepted
        changes = []
        for rank in range(world.size):
            for start, stop in solver.holding.decomposition.teams.shards(rank, SAMPLES, local_data):
                twin.load_state_dict(dict(network.named_parameters()) | buffers)
                with torch.no_grad():
                    twin(inputs[start:stop])
                after = dict(twin.named_buffers())
                changes.append((stop - start, {name: after[name] - buffers[name] for name in after}))
        total = sum(samples for samples, _ in changes)
        for name, buffer in network.named_buffers():
            if name.endswith("num_batches_tracked"):
                assert buffer == buffers[name] + 1
            else:
                mean = sum(samples * change[name] for samples, change in changes) / total
                assert mean.abs().max() > 0.0
                torch.testing.assert_close(buffer, buffers[name] + mean, rtol=1e-12, atol=1e-13)


@pytest.mark.mpi
def test_evaluation_mode_is_respected(world):
    """In evaluation mode nothing is drawn and the statistics stand still, while the parameters move."""
    network = noisy_classifier().eval()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    solver = make_solver(world, options(initial_radius=0.05), network)
    expected = cross_entropy(network(classified()[0]), classified()[1]).item()
    result = solver.step(classified())
    assert result.accepted and result.schwarz.loss == pytest.approx(expected, rel=1e-13)
    torch.testing.assert_close(dict(network.named_buffers()), buffers, rtol=0, atol=0)


def exponential_error(outputs, targets):
    return squared_error(outputs.exp(), targets)


@pytest.mark.mpi
def test_trial_that_overflows_is_rejected_and_the_ball_shrinks(world):
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    batch = classified()[0][:, :4], torch.full((SAMPLES, 1), 3.0, dtype=torch.float64)
    chosen = options(subdomains=2, initial_radius=1e4, decrease_factor=0.25)
    solver = make_solver(world, chosen, network, exponential_error)
    before = snapshot(network)
    judged = solver.step(batch).schwarz
    assert judged.trial_loss == math.inf and not judged.accepted and judged.rho == -math.inf
    assert judged.next_radius == 0.25e4
    assert_unchanged(network, before)
    results = [solver.step() for _ in range(20)]
    assert any(result.accepted for result in results)
    assert results[-1].schwarz.loss < judged.loss


class SpoiltLoss:
    """Cross entropy, until it is spoilt on one rank."""

    def __init__(self):
        self.spoil = None

    def __call__(self, outputs, targets):
        loss = cross_entropy(outputs, targets)
        if self.spoil == "trial" and not torch.is_grad_enabled():
            return loss * math.nan
        if self.spoil == "gradient":  # zero, whose derivative is not a number
            return loss + (0.0 * outputs.sum()).sqrt()
        return loss


@pytest.mark.mpi
@pytest.mark.parametrize("spoil", ["trial", "gradient"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_not_a_number_on_one_rank_is_a_rejection_on_all(world, spoil, iterations):
    loss, network = SpoiltLoss(), classifier()
    chosen = options(solver="adam", variant="exact", iterations=iterations, initial_radius=0.1)
    solver = make_solver(world, chosen, network, loss)
    assert solver.step(classified()).accepted
    before, radius = snapshot(network), solver.state.radius
    if world.rank == world.size - 1:
        loss.spoil = spoil
    judged = solver.step(classified()).schwarz
    # A gradient that is no number is of the batch, a trial that is none is of the step.
    assert not judged.accepted and judged.next_radius == (radius if spoil == "gradient" else 0.25 * radius)
    assert_unchanged(network, before)
    for adam in solver.holding.schwarz.solvers.values():
        assert adam.first_moment.isfinite().all() and adam.second_moment.isfinite().all()
    loss.spoil = None
    assert solver.step(classified()).accepted
    assert flat(network.parameters()).isfinite().all()


@pytest.mark.mpi
@pytest.mark.parametrize("solver", ["sgd", "adam", "tr"])
def test_input_that_is_not_a_number_changes_nothing(world, solver):
    inputs, targets = classified()
    broken = inputs.clone()
    broken[7] = math.nan
    network = classifier()
    solver = make_solver(world, options(solver=solver, iterations=2, initial_radius=0.1), network)
    before = snapshot(network)
    results = [solver.step((broken, targets)), solver.step()]
    assert not any(result.accepted for result in results)
    assert_unchanged(network, before)
    assert solver.step((inputs, targets)).accepted


@pytest.mark.mpi
@pytest.mark.parametrize("solver", ["sgd", "tr"])
@pytest.mark.parametrize("global_step", ["none", "first-order"])
def test_repeating_the_batch_is_giving_it_again(world, solver, global_step):
    """After rejections and after accepted steps; without a memory in the local solver they are the same."""
    traces = []
    for again in ((), (classified(),)):
        chosen = options(solver=solver, iterations=1, initial_radius=30.0, global_step=global_step)
        ours = make_solver(world, chosen, classifier())
        ours.step(classified())
        results = [ours.step(*again) for _ in range(8)]
        assert {result.accepted for result in results} == {True, False}
        traces.append([judged for result in results for judged in numbers(result)])
    torch.testing.assert_close(*map(torch.tensor, traces), rtol=1e-10, atol=1e-10)


@pytest.mark.mpi
def test_repeating_the_batch_after_accepted_steps_with_adam(world):
    traces = []
    for again in ((), (classified(),)):
        ours = make_solver(world, options(solver="adam", iterations=3, initial_radius=0.05), classifier())
        ours.step(classified())
        results = [ours.step(*again) for _ in range(4)]
        assert all(result.accepted for result in results)
        traces.append([judged for result in results for judged in numbers(result)])
    torch.testing.assert_close(*map(torch.tensor, traces), rtol=1e-10, atol=1e-10)


@pytest.mark.mpi
def test_step_after_a_rejection_is_judged_as_what_it_is(world):
    """Corrections of the larger ball are scaled into the smaller one, and so is the prediction."""
    network = classifier()
    solver = make_solver(world, options(solver="adam", initial_radius=20.0), network)
    judged = solver.step(classified()).schwarz
    shrunk = 0
    while not judged.accepted:
        before = flat(network.parameters())
        gradient = solver.holding.objective.reduction.total.clone()
        judged = solver.step().schwarz
        step = flat(network.parameters()) - before if judged.accepted else solver.holding.schwarz.correction
        assert judged.step_norm <= judged.radius * (1.0 + 1e-12)
        assert judged.step_norm == pytest.approx(step.norm().item(), rel=1e-10)
        assert judged.predicted_reduction == pytest.approx(-torch.dot(gradient, step).item(), rel=1e-10)
        shrunk += 1
    assert shrunk > 1


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_losses_are_those_of_the_network(world):
    """Before and after each step, evaluated by hand."""
    network, (inputs, targets) = classifier(), classified()
    solver = make_solver(world, options(global_step="first-order", initial_radius=5.0), network)
    for _ in range(6):
        before = cross_entropy(network(inputs), targets).item()
        result = solver.step((inputs, targets))
        after = cross_entropy(network(inputs), targets).item()
        assert result.schwarz.loss == pytest.approx(before, rel=1e-13)
        middle = result.schwarz.trial_loss if result.schwarz.accepted else before
        assert result.global_step.loss == pytest.approx(middle, rel=1e-13)
        end = result.global_step.trial_loss if result.global_step.accepted else middle
        assert after == pytest.approx(end, rel=1e-13)
    assert solver.state.accepted + solver.state.rejected == solver.state.iteration == 6
