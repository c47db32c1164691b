"""Noisy batches: the radius as the next batch judges it, and what goes with it."""

import dataclasses
import math

import networks
import numpy as np
import pytest
import torch
from mpi4py import MPI

from apts_mpi import APTS, APTSOptions, InvalidInput
from apts_mpi.local import LocalObjective
from apts_mpi.local.kfac import OFTEN
from apts_mpi.local.solver import displacement_of
from apts_mpi.options import CoarseOptions, GlobalStepOptions, LocalOptions, SchwarzOptions, TrustRegionOptions
from apts_mpi.result import State
from apts_mpi.trust_region.acceptance import Judged
from apts_mpi.trust_region.next_batch import (
    AFTER_REJECTION,
    BEGIN,
    CONSTANT,
    FASTER,
    RATE,
    SHORT,
    SHORTER,
    following,
    is_short,
    length_in_walk,
    share_of_radius,
)


@pytest.mark.parametrize(
    ("before", "after", "factor"),
    [
        (-2.0, -2.0, math.exp(RATE)),
        (-2.0, -9.0, math.exp(RATE)),
        (-2.0, -1.0, math.exp(0.5 * RATE)),
        (-2.0, 0.0, 1.0),
        (-2.0, 1.0, math.exp(-0.5 * RATE)),
        (-2.0, 5.0, math.exp(-RATE)),
        (0.0, 5.0, 1.0),  # there was no step before
        (-2.0, math.nan, 1.0),
        (-math.inf, 1.0, 1.0),
    ],
)
def test_rule(before, after, factor):
    assert following(3.0, before, after) == pytest.approx(3.0 * factor, rel=1e-15)


@pytest.mark.parametrize(("after", "short"), [(-2.0, True), (-2.1 * SHORT, True), (-1.9 * SHORT, False), (1.0, False)])
def test_first_steps_grow_fast_while_they_are_short(after, short):
    assert is_short(-2.0, after) == short
    assert following(3.0, -2.0, after, starting=True) == (3.0 * FASTER if short else following(3.0, -2.0, after))


def moved(state, accepted, after=-1.0, predicted=1.0):
    """The state after a step whose batch has the slope ``after`` along the one before."""
    judged = Judged(1.0, 0.9, predicted, 0.1, 0.1, accepted, state.present_radius, math.nan, 0.1)
    options = TrustRegionOptions()
    judged, state.starting, state.retry = state.judged_by_next(judged, after, options)
    state.move(judged, options)
    return state.present_radius, state.radius


def test_rejected_batch_has_smaller_balls_of_its_own():
    """Halved for its next tries, and less so for the batches after it."""
    state = State(radius=1.0, slope=-1.0)
    assert moved(state, True) == (FASTER, FASTER)
    assert moved(state, False) == pytest.approx((SHORTER * AFTER_REJECTION * FASTER, AFTER_REJECTION * FASTER))
    assert not state.starting
    kept = AFTER_REJECTION**2 * FASTER
    assert moved(state, False) == pytest.approx((SHORTER**2 * kept, kept))
    assert moved(state, True) == pytest.approx((kept, kept))  # it has judged the step before already
    assert moved(state, True) == pytest.approx((kept * math.exp(RATE),) * 2)


def test_skipped_batch_leaves_the_radius_as_it_was():
    state = State(radius=1.0, slope=-1.0, rejected=1)
    moved(state, False)
    assert moved(state, False, predicted=-1.0) == pytest.approx((AFTER_REJECTION, AFTER_REJECTION))


def moved_to(state, farthest, least, accepted=True):
    judged = Judged(1.0, 0.9, 1.0, 0.1, 0.1, accepted, state.present_radius, math.nan, 0.1)
    options = TrustRegionOptions()
    judged, state.starting, state.retry = state.judged_by_next(judged, 1.0, options, least)
    state.farthest = farthest
    state.move(judged, options)
    return state.radius


def test_radius_stays_above_the_steps_of_a_walk_which_a_rejection_ends():
    state = State(radius=1.0, slope=-1.0, walked=3, has_end=True)
    assert moved_to(state, 9.0, 2.0) == 2.0
    assert (state.walked, state.farthest) == (4, 9.0)
    assert moved_to(state, 9.0, 0.5) == pytest.approx(2.0 * math.exp(-RATE))
    assert moved_to(state, 9.0, 9.0, accepted=False) == pytest.approx(2.0 * AFTER_REJECTION * math.exp(-RATE))
    assert (state.walked, state.farthest) == (0, 0.0)
    moved_to(state, 1.0, 0.0)
    state.forget_step()
    assert (state.walked, state.farthest) == (0, 0.0)
    without_end = State(radius=1.0, slope=-1.0, walked=3)
    assert moved_to(without_end, 9.0, 2.0) == pytest.approx(math.exp(-RATE))


def test_runs_without_noise_walk_nowhere():
    """So that one which goes on with noisy batches begins its walk there."""
    solver = make(noise="none")
    for number in range(3):
        solver.step(batch(number))
    assert solver.state.accepted and (solver.state.walked, solver.state.farthest) == (0, 0.0)


@pytest.mark.parametrize("option", [{"norm": "inf"}, {"metric": "fisher"}])
def test_walk_is_none_of_balls_of_other_norms_and_steps_not_taken_are_no_part_of_it(option):
    lengths = []
    for done in (None, 0.1):
        solver = make(trust_region=TrustRegionOptions(**option))
        for number in range(25):
            solver.step(batch(number), done=done)
        lengths.append(solver.state.present_radius)
        begun = solver.holding.last_step.start
        distance = float((solver.holding.objective.vector.values - begun).norm())
        assert solver.state.farthest >= distance * (1.0 - 1e-12)
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_length_in_walk_is_that_of_steps_along_means_of_noise(momentum):
    """300 walks of 2000 steps in 40 dimensions: the mean square of their distance is within a few per cent."""
    random, mean, place = np.random.default_rng(0), np.zeros((300, 40)), np.zeros((300, 40))
    for _ in range(2000):
        mean = momentum * mean + (1.0 - momentum) * random.normal(size=mean.shape)
        place += 0.3 * mean / np.linalg.norm(mean, axis=1, keepdims=True)
    distance = math.sqrt(np.mean(np.sum(place**2, axis=1)))
    assert length_in_walk(distance, 2000, momentum) == pytest.approx(0.3, rel=0.03)


@pytest.mark.parametrize("first", [1e-3, 30.0])
def test_radius_comes_to_the_minimum_along_the_steps(first):
    """Of the loss of all samples, 1/2 |x|^2, of which each batch shows a gradient with noise; in 50 dimensions.

    A step of length r along p ends at that minimum where r = -<x, p>. All steps begin at one point: those of a run that
    go on from each other at one length end as far from the minimum as they began, and let the radius shrink for ever.
    """
    random = np.random.default_rng(0)
    point, radius, lengths, best = np.full(50, 0.5), first, [], []
    for iteration in range(4000):
        gradient = point + random.normal(size=50)
        direction = -gradient / np.linalg.norm(gradient)
        step = radius * direction
        radius = following(radius, gradient @ step, (point + step + random.normal(size=50)) @ step)
        if iteration >= 1000:
            lengths.append(radius)
            best.append(-point @ direction)
    assert np.mean(lengths) == pytest.approx(np.mean(best), rel=0.05)


def test_radius_goes_to_zero_at_the_end():
    assert [share_of_radius(done) for done in (None, 0.0, CONSTANT, 1.0)] == [1.0, 1.0, 1.0, 1e-3]
    assert share_of_radius(0.5 * (1.0 + CONSTANT)) == pytest.approx(0.5)


def batch(number, samples=40):
    inputs, targets = networks.classified()
    rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(number))[:samples]
    return inputs[rows], targets[rows]


def noisy(**changes):
    return APTSOptions(**{"noise": "batches", "subdomains": 2, **changes})


def make(comm=MPI.COMM_SELF, **changes):
    torch.manual_seed(0)
    return APTS(networks.classifier(), networks.cross_entropy, comm=comm, options=noisy(**changes))


def reference(network, batches, radius, shares, direction):
    """Steps along ``direction(gradient)``, cut to the ball of the radius, with the pull."""
    values = torch.nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    is_matrix = torch.cat([torch.full((own.numel(),), own.dim() > 1) for own in network.parameters()])
    slope, step, found, starting = 0.0, torch.zeros_like(values), [], True
    first, farthest = values, 0.0
    for (inputs, targets), share in zip(batches, shares, strict=True):
        torch.nn.utils.vector_to_parameters(values, network.parameters())
        network.zero_grad()
        networks.cross_entropy(network(inputs), targets).backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
        after = float(gradient @ step)
        cut = direction(gradient)
        present = radius * share
        cut = cut * min(1.0, present / float(cut.norm()))
        weights = values * is_matrix
        step = cut - 0.2 * cut.norm() / weights.norm() * weights
        step = step * min(1.0, present / float(step.norm()))
        starting = starting and (slope == 0.0 or after / slope > SHORT)
        farthest = max(farthest, float((values + step - first).norm()))
        if share == 1.0:
            # A walk along means with momentum 0.9.
            least = farthest * math.sqrt(0.1 / 1.9 / (len(found) + 1))
            radius = max(following(radius, slope, after, starting), least)
        slope = float(gradient @ step)
        values = values + step
        found.append((present, float(step.norm()), -slope))
    return values, found


def test_iterates_are_those_of_a_plain_loop():
    """With the direction of the solver's own K-FAC at each point, which other tests hold to its formula."""
    solver, other = make(trust_region=TrustRegionOptions(initial_radius=0.05)), networks.classifier()
    other.load_state_dict(solver.network.state_dict())
    batches = [batch(number) for number in range(12)]
    shares = [share_of_radius(number / 12) for number in range(12)]
    directions, found = [], []
    for number, samples in enumerate(batches):
        result = solver.step(samples, done=number / 12)
        assert result.accepted
        mean = [solver.holding.schwarz.solvers[part] for part in (0, 1)]
        directions.append(torch.cat([own.direction(own.momentum / (1.0 - 0.9**own.count)) for own in mean]))
        found.append((result.schwarz.radius, result.schwarz.step_norm, result.schwarz.predicted_reduction))
    values, expected = reference(other, batches, 0.05, shares, lambda gradient: directions.pop(0))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    torch.testing.assert_close(solver.holding.objective.vector.values, values, rtol=1e-10, atol=1e-12)


def test_first_radius_is_a_part_of_the_cauchy_step():
    usual = APTS(networks.classifier(), networks.cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions(subdomains=2))
    radius = usual.step(batch(0)).schwarz.radius
    assert make().step(batch(0)).schwarz.radius == pytest.approx(BEGIN * radius)


@pytest.mark.parametrize("subdomains", [2, 3])
def test_iterates_do_not_depend_on_the_number_of_subdomains(subdomains):
    one, several = make(subdomains=1), make(subdomains=subdomains)
    for number in range(8):
        one.step(batch(number), done=number / 8)
        several.step(batch(number), done=number / 8)
    torch.testing.assert_close(
        several.holding.objective.vector.values, one.holding.objective.vector.values, rtol=1e-12, atol=1e-14
    )


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("noise", ["batches", "none"])
def test_statistics_are_those_of_all_ranks(world, noise):
    """Iterates do not depend on the ranks, with more ranks than subdomains and with fewer."""

    def values(comm):
        solver = make(comm, noise=noise, subdomains=3)
        for number in range(6):
            solver.step(batch(number, 45))
        return solver.holding.objective.vector.values

    torch.testing.assert_close(values(world), values(MPI.COMM_SELF), rtol=1e-9, atol=1e-12)


def test_step_that_memory_leads_uphill_is_skipped():
    """Nothing of the method moves by it but the memory: the next batch has its turn, in the same ball."""
    solver = make()
    inputs, targets = batch(0)
    for _ in range(5):
        solver.step((inputs, targets))
    before = solver.holding.objective.vector.values.clone()
    results = [solver.step((inputs, (targets + 1) % 3)) for _ in range(2)]
    assert results[0].skipped and not results[0].accepted and results[0].schwarz.predicted_reduction < 0.0
    assert results[0].schwarz.next_radius == results[0].schwarz.radius
    if not results[1].accepted:
        torch.testing.assert_close(solver.holding.objective.vector.values, before, rtol=0.0, atol=0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"local": LocalOptions(solver="sgd")},
        {"local": LocalOptions(iterations=2)},
        {"schwarz": SchwarzOptions(decomposition="data")},
    ],
)
def test_what_does_not_go_with_it(changes):
    with pytest.raises(InvalidInput, match="noise: 'batches' needs local.solver kfac or muon .* choose none"):
        make(**changes)


def test_shared_statistics_are_for_solvers_that_do_not_evaluate():
    schwarz = SchwarzOptions(local_data="shared")
    options = dataclasses.replace(networks.options(solver="tr"), schwarz=schwarz)
    with pytest.raises(InvalidInput, match="local_data: 'shared' is for solvers .* choose shard or full"):
        APTS(networks.classifier(), networks.cross_entropy, comm=MPI.COMM_SELF, options=options)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"coarse": CoarseOptions(model="gauss-newton")}, "coarse.model 'gauss-newton'"),
        ({"global_step": GlobalStepOptions(model="first-order")}, "global_step.model 'first-order'"),
    ],
)
def test_steps_of_models_are_not_judged_by_the_next_batch(changes, words):
    with pytest.raises(InvalidInput, match=f"noise: 'batches' does not go with {words}; choose none"):
        make(**changes)


@pytest.mark.parametrize("done", [-0.1, 1.1, math.nan, "half"])
def test_share_that_is_none(done):
    with pytest.raises(InvalidInput, match="done: .* is no share of a run; give a number from 0 to 1"):
        make().step(batch(0), done=done)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_overlapping_corrections_are_weighted(world):
    """Also where a team has several ranks, of which one alone hands its correction out."""

    def values(comm):
        schwarz = SchwarzOptions(overlap=1, type="basic")
        solver = make(comm, subdomains=2, schwarz=schwarz)
        for number in range(4):
            solver.step(batch(number, 45))
        return solver.holding.objective.vector.values

    torch.testing.assert_close(values(world), values(MPI.COMM_SELF), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", ["kfac", "tr"])
def test_layers_are_recorded_where_a_local_solver_looks_at_them(solver):
    """With kfac where its statistics are due; others may look in every iteration."""
    made = (
        make()
        if solver == "kfac"
        else APTS(
            networks.classifier(), networks.cross_entropy, comm=MPI.COMM_SELF, options=networks.options(solver=solver)
        )
    )
    for number in range(8):
        made.step(batch(number))
        run = made.holding.objective.evaluate(made.batch.passes)
        coming = solver != "kfac" or number + 1 <= OFTEN
        assert run.is_observed == made.holding.objective.observes() == coming
        if solver == "kfac":
            assert bool(run.caches[0][0].records) == coming
            assert (run.caches[0][0].output_gradient is not None) == coming


def test_displacement_is_that_of_a_solve():
    """In a ball without end, where the block does not have to move."""
    one, other = make(subdomains=1), make(subdomains=1)
    for number in range(4):
        one.step(batch(number))
        other.step(batch(number))
    gradient = torch.randn(one.parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = []
    for solver in (one, other):
        cache = solver.holding.objective.evaluate(solver.batch.passes).caches[0][0]
        local = LocalObjective(solver.holding.objective, cache, gradient, solver.comm, 1.0)
        before = local.block.clone()
        own = solver.holding.schwarz.solvers[0]
        found.append(own.unbounded(local) if solver is one else displacement_of(own, local, 1e9, "2"))
        assert torch.equal(local.block, before)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)
