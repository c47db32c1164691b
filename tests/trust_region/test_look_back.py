"""Noisy batches: steps that are taken without a trial, and taken back where the next batch finds them bad."""

import math

import networks
import pytest
import torch
from mpi4py import MPI

from apts_mpi import APTS, APTSOptions
from apts_mpi.checkpoint import CheckpointDirectory, newest_valid
from apts_mpi.options import LocalOptions, TrustRegionOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.result import State
from apts_mpi.staged import StagedAPTS
from apts_mpi.tools.events import Events
from apts_mpi.trust_region.acceptance import Judged, untried
from apts_mpi.trust_region.next_batch import FAR, SHORTER, TRIALS

# A first radius near the one to which it comes.
LONG_ENOUGH = TrustRegionOptions(initial_radius=0.5)


def batch(number, samples=48):
    inputs, targets = networks.classified()
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(number))[:samples]
    return inputs[rows], targets[rows]


def broken(samples):
    inputs = samples[0].clone()
    inputs[3] = math.nan
    return inputs, samples[1]


def noisy_classifier():
    return networks.classifier(batch_norm=True, dropout=0.2)


def overflowing(outputs, targets):
    """The loss, which is no number where outputs are large."""
    return networks.cross_entropy(outputs, targets) + 0.0 * outputs.exp().mean()


def make(comm=MPI.COMM_SELF, network=networks.classifier, layout="replicated", loss=networks.cross_entropy, **changes):
    kind = StagedAPTS if layout == "staged" else APTS
    chosen = {"noise": "batches", "subdomains": 2, "layout": layout, "trust_region": LONG_ENOUGH} | changes
    torch.manual_seed(0)
    return kind(network(), loss, comm=comm, options=APTSOptions(**chosen))


def steady(solver, steps=30):
    """The solver after steps of which the last ones were not tried."""
    for number in range(steps):
        solver.step(batch(number))
    assert not solver.state.is_on_trial and solver.state.slope < 0.0
    return solver


def values_of(solver):
    return solver.holding.objective.vector.values


def make_step_bad(solver, factor=50.0):
    """Let the last step be so much longer, as if the ball had been so; return where it began."""
    step, values = solver.holding.last_step.vector, values_of(solver)
    start = values - step
    values.add_(step, alpha=factor - 1.0)
    step.mul_(factor)
    return start


def buffers_of(solver):
    return [buffer.clone() for buffer in solver.network.buffers()]


layouts = pytest.mark.parametrize("layout", ["replicated", "staged"])


def skip_more_stages_than_layers(world, layout):
    if layout == "staged" and world.size > 2:
        pytest.skip("there are two subdomains")


@pytest.mark.mpi
@layouts
def test_steady_step_costs_one_evaluation(world, layout):
    skip_more_stages_than_layers(world, layout)
    solver = make(world, layout=layout, subdomains=None if layout == "staged" else 2)
    first = solver.step(batch(0)).schwarz
    assert math.isfinite(first.trial_loss) and first.accepted
    steady(solver)
    result = solver.step(batch(20))
    assert result.accepted and math.isnan(result.schwarz.trial_loss) and math.isnan(result.schwarz.rho)
    if layout == "replicated" and world.size <= 2:
        assert result.gradient_evaluations == pytest.approx(1.0)


@pytest.mark.mpi
@layouts
def test_bad_step_is_taken_back(world, layout):
    """The point is that where it began, the radius half of what it was, and the same batch has another try there."""
    skip_more_stages_than_layers(world, layout)
    solver = steady(make(world, layout=layout, subdomains=None if layout == "staged" else 2))
    start, radius = make_step_bad(solver), solver.state.present_radius
    result = solver.step(batch(20))
    assert not result.accepted and not result.skipped
    assert result.schwarz.trial_loss - result.schwarz.loss > result.schwarz.predicted_reduction > 0.0
    assert "the last one had rho -" in result.reason
    torch.testing.assert_close(values_of(solver), start, rtol=0.0, atol=1e-12)
    assert solver.state.present_radius == pytest.approx(SHORTER * radius)
    again = solver.step()
    assert again.accepted and again.schwarz.loss == pytest.approx(result.schwarz.loss, rel=1e-12)
    assert again.schwarz.trial_loss < again.schwarz.loss  # tried on its own batch, as nothing vouches for the ball


@pytest.mark.mpi
def test_step_to_where_the_loss_is_not_finite_is_taken_back(world):
    solver = steady(make(world, loss=overflowing))
    make_step_bad(solver, 1e6)
    result = solver.step(batch(20))
    assert not result.accepted and not result.skipped and not math.isfinite(result.schwarz.trial_loss)
    assert "the loss after the step is not finite" in result.reason
    assert math.isfinite(solver.step().schwarz.loss)


@pytest.mark.mpi
@layouts
def test_batch_that_is_not_finite_says_nothing_of_the_step(world, layout):
    """It is skipped, the step stands, and the batch after it judges that."""
    skip_more_stages_than_layers(world, layout)
    made = [make(world, layout=layout, subdomains=None if layout == "staged" else 2) for _ in range(2)]
    solver, other = map(steady, made)
    before, radius, slope = values_of(solver).clone(), solver.state.radius, solver.state.slope
    result = solver.step(broken(batch(20)))
    assert result.skipped and not result.accepted
    assert torch.equal(values_of(solver), before) and (solver.state.radius, solver.state.slope) == (radius, slope)
    follow, expected = solver.step(batch(21)), other.step(batch(21))
    assert repr(networks.numbers(follow)) == repr(networks.numbers(expected))


def test_hard_batch_is_no_reason_to_go_back():
    """Its loss is far above that of others on both sides of the step, which then stays, to the bit."""
    solver, other = steady(make(network=noisy_classifier)), steady(make(network=noisy_classifier))
    inputs, targets = batch(20)
    hard = 3.0 * inputs, (targets + 1) % 3
    before = values_of(solver).clone()
    solver.step(hard)
    assert solver.state.rejected == 0
    if not torch.equal(values_of(solver), before):
        other.state.loss = math.inf  # nothing is doubtful beside it
        other.step(hard)
        assert torch.equal(values_of(solver), values_of(other))
        assert all(map(torch.equal, buffers_of(solver), buffers_of(other)))


def test_running_statistics_do_not_follow_a_step_that_is_taken_back():
    solver = steady(make(network=noisy_classifier))
    make_step_bad(solver)
    before = buffers_of(solver)
    assert not solver.step(batch(20)).accepted
    assert all(map(torch.equal, buffers_of(solver), before))


def test_point_of_the_users_own_is_not_left():
    """Parameters that were changed since the last step are none of its end."""
    solver = steady(make())
    make_step_bad(solver)
    with torch.no_grad():
        for parameter in solver.network.parameters():
            parameter.mul_(0.5)
    before = values_of(solver).clone()
    result = solver.step(batch(20))
    assert math.isfinite(result.schwarz.trial_loss)
    assert result.accepted or torch.equal(values_of(solver), before)


def reloaded(solver, fresh, directory):
    """What a new process would have: a fresh solver with the state from a file."""
    comm = Communicator(fresh.comm.mpi, Events())
    arrays, metadata = solver.save()
    with CheckpointDirectory(directory, comm) as checkpoints:
        checkpoints.save(arrays, metadata, 0)
    checkpoint, _ = newest_valid(directory, comm)
    with checkpoint:
        assert fresh.load(checkpoint, checkpoint.metadata) == []
    return fresh


@pytest.mark.mpi
@pytest.mark.parametrize("bad", [True, False])
def test_checkpoint_between_a_step_and_its_judge(world, tmp_path, bad):
    """The resumed run takes the step back, or lets it stand, with the bits of the one that was not interrupted."""
    path = world.bcast(tmp_path)
    solver = steady(make(world, network=noisy_classifier))
    if bad:
        make_step_bad(solver)
    resumed = reloaded(solver, make(world, network=noisy_classifier), path)
    for number in (20, 21, 22, 23):
        results = [own.step(batch(number)) for own in (solver, resumed)]
        assert repr(networks.numbers(results[0])) == repr(networks.numbers(results[1]))
        assert number > 20 or results[0].accepted != bad
        assert torch.equal(values_of(solver), values_of(resumed))
        assert all(map(torch.equal, buffers_of(solver), buffers_of(resumed)))


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_other_ranks_take_back_the_same_step(world, tmp_path):
    """What was saved before the judgement on one rank is judged by all."""
    path = world.bcast(tmp_path)
    alone = steady(make())
    make_step_bad(alone)
    comm = Communicator(MPI.COMM_SELF, Events())
    if world.rank == 0:
        arrays, metadata = alone.save()
        with CheckpointDirectory(path, comm) as checkpoints:
            checkpoints.save(arrays, metadata, 0)
    world.barrier()
    solver, together = make(world), Communicator(world, Events())
    checkpoint, _ = newest_valid(path, together)
    with checkpoint:
        solver.load(checkpoint, checkpoint.metadata)
    for number in (20, 21):
        results = [own.step(batch(number)) for own in (alone, solver)]
        assert [result.accepted for result in results] == [number > 20] * 2
    torch.testing.assert_close(values_of(solver), values_of(alone), rtol=1e-9, atol=1e-12)


def test_a_first_radius_far_too_large_is_found_out():
    solver = make(trust_region=TrustRegionOptions(initial_radius=100.0), local=LocalOptions(damping=1e-3))
    for number in range(30):
        solver.step(batch(number))
    inputs, targets = networks.classified()
    assert networks.cross_entropy(solver.network(inputs), targets).item() < 1.2


def state(**changes):
    return State(**{"radius": 2.0, "slope": -1.0, "starting": False, "loss": 0.5, "spread": 0.1} | changes)


@pytest.mark.parametrize(
    ("loss", "far"), [(0.5 + 0.99 * FAR * 0.1, False), (0.5 + 1.01 * FAR * 0.1, True), (math.nan, True), (-9.0, False)]
)
def test_far_losses(loss, far):
    assert state().is_far(loss) == far
    unknown = state(spread=0.0, loss=None)
    assert not unknown.is_far(9.0) and unknown.is_far(math.inf)


@pytest.mark.parametrize(
    ("before", "after", "stands"),
    [
        (0.5, 0.89, True),
        (0.5, 1.0, False),
        (0.76, 1.0, True),  # most of it is the batch's own
        (0.74, 1.0, False),
        (math.nan, math.nan, True),
        (math.inf, 0.5, True),
        (0.5, math.nan, False),
        (0.5, math.inf, False),
        (5.0, 4.0, True),
    ],
)
def test_last_step_as_the_next_batch_judges_it(before, after, stands):
    judged = state().taken_back(before, after, 1.0, TrustRegionOptions())
    assert judged.accepted == stands
    assert judged.next_radius == (2.0 if stands else 2.0 * SHORTER)


def test_batches_that_are_learnt_by_heart_take_no_step_back():
    """Each step then raises the loss of the next batch by more than it promises to lower that of its own."""
    inputs = torch.randn(60, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    targets = torch.randint(3, (60,), generator=torch.Generator().manual_seed(4))
    solver = make(network=lambda: networks.classifier(width=64))
    radius = math.inf
    for number in range(300):
        rows = slice(number % 4 * 15, number % 4 * 15 + 15)
        solver.step((inputs[rows], targets[rows]))
        radius = min(radius, solver.state.present_radius)
    assert networks.cross_entropy(solver.network(inputs), targets).item() < 0.05
    assert radius > 1e-3


def test_usual_difference_of_losses():
    """A running mean, in which steps that are not accepted have no part."""
    found = state(spread=0.0, loss=None)
    for number, (loss, spread) in enumerate(((1.0, 0.0), (1.5, 0.5), (1.5, 0.45)), start=1):
        found.move(untried(loss, 1.0, 1.0, 1.0), TrustRegionOptions())
        assert (found.loss, found.spread, found.tried) == (loss, pytest.approx(spread), number)
    found.move(Judged(9.0, 9.0, 1.0, 0.0, 0.0, False, 1.0, 1.0, 1.0), TrustRegionOptions())
    assert (found.loss, found.spread, found.slope, found.tried) == (1.5, pytest.approx(0.45), 0.0, 0)


@pytest.mark.parametrize("changes", [{"tried": TRIALS - 1}, {"tried": TRIALS, "starting": True}])
def test_first_steps_are_tried(changes):
    found = state(**changes)
    assert found.is_on_trial == (found.tried < TRIALS)
    found.move(untried(1.0, 1.0, 1.0, 1.0), TrustRegionOptions())
    assert found.is_on_trial == found.starting


def test_skipped_batch_leaves_the_step_before_to_be_judged():
    found = state()
    found.move(Judged(math.nan, math.nan, 1.0, 0.0, 0.0, False, 2.0, 2.0, 1.0, skipped=True), TrustRegionOptions())
    assert found.slope == -1.0


@pytest.mark.parametrize(("predicted", "length", "accepted"), [(1.0, 1.0, True), (0.0, 1.0, False), (1.0, 0.0, False)])
def test_step_without_a_trial_goes_down_by_its_model(predicted, length, accepted):
    assert untried(1.0, predicted, length, 1.0).accepted == accepted
    assert not untried(1.0, math.inf, 1.0, 1.0).accepted
