"""Whatever the options: steps stay in the ball, the loss falls, the radius keeps to its rule."""

import itertools
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI
from networks import CLASSES, FEATURES, classified, flat, make_solver, options
from torch import nn

ROUNDING = 1.0 + 1e-10


def small_network(seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES)]
    return nn.Sequential(*layers).double()


@st.composite
def choices(draw, **fixed):
    norm = draw(st.sampled_from(["2", "inf"]))
    drawn = {
        "subdomains": draw(st.integers(1, 3)),
        "variant": draw(st.sampled_from(["exact", "inexact"])),
        "partition": draw(st.sampled_from(["layer", "index"])),
        "overlap": draw(st.integers(0, 2)),
        "type": draw(st.sampled_from(["basic", "restrict"])),
        "local_data": draw(st.sampled_from(["shard", "full"])),
        "damping": draw(st.sampled_from([1.0, 0.4])),
        "solver": draw(st.sampled_from(["sgd", "tr", "adam"])),
        "iterations": draw(st.integers(1, 3)),
        "norm": norm,
        "global_step": draw(st.sampled_from(["none", "first-order"])),
        # From far below to far above what suits.
        "initial_radius": 10.0 ** draw(st.floats(-6.0, 3.0)),
    }
    return options(**(drawn | fixed)), draw(st.integers(0, 5))


class Watched:
    """A local solver whose displacement is compared with the radius that it was given."""

    def __init__(self, solver):
        self.solver = solver
        self.radii = []

    def solve(self, local, radius, kind):
        start = local.block.clone()
        self.solver.solve(local, radius, kind)
        self.radii.append(radius)
        moved = torch.linalg.vector_norm(local.block - start, ord=float(kind))
        assert moved <= radius * ROUNDING


def judged_steps(result):
    return [step for step in (result.schwarz, result.global_step) if step is not None]


@given(choices())
@settings(max_examples=60)
def test_steps_stay_in_the_ball_and_are_judged_by_the_rule(case):
    chosen, seed = case
    rule, network = chosen.trust_region, small_network(seed)
    kind = 2.0 if rule.norm == "2" else math.inf
    solver = make_solver(MPI.COMM_SELF, chosen, network)
    watched = {index: Watched(local) for index, local in solver.holding.schwarz.solvers.items()}
    solver.holding.schwarz.solvers.update(watched)
    batches = classified(30, seed), None, None, classified(30, seed + 1)
    radius = rule.initial_radius
    for batch in batches:
        before = flat(network.parameters())
        result = solver.step(batch)
        steps = judged_steps(result)
        for judged in steps:
            assert judged.radius == radius
            assert judged.step_norm <= radius * ROUNDING
            assert judged.predicted_reduction > 0.0
            assert judged.actual_reduction == judged.loss - judged.trial_loss
            noise = rule.noise * sys.float_info.epsilon * judged.loss
            assert judged.rho == (judged.actual_reduction + noise) / (judged.predicted_reduction + noise)
            assert judged.accepted == (judged.rho >= rule.eta1)
            assert not judged.accepted or judged.trial_loss < judged.loss + noise
            assert rule.min_radius <= judged.next_radius <= rule.max_radius
            radius = judged.next_radius
        moved = torch.linalg.vector_norm(flat(network.parameters()) - before, ord=kind).item()
        reach = sum(judged.radius for judged in steps if judged.accepted)
        assert moved <= reach * ROUNDING + 1e-14
        assert (moved > 0.0) == result.accepted
    for local in watched.values():
        count = len(watched) if rule.norm == "2" else 1
        assert local.radii[0] == pytest.approx(rule.initial_radius / math.sqrt(count), rel=1e-14)


@given(choices(initial_radius=0.2))
@settings(max_examples=20)
def test_loss_falls_on_a_repeated_batch(case):
    """From step to step the loss is the trial loss of the last accepted step, and it never rises."""
    chosen, seed = case
    solver = make_solver(MPI.COMM_SELF, chosen, small_network(seed))
    results = [solver.step(classified(30, seed))] + [solver.step() for _ in range(7)]
    steps = [judged for result in results for judged in judged_steps(result)]
    for before, after in itertools.pairwise(steps):
        expected = before.trial_loss if before.accepted else before.loss
        assert after.loss == pytest.approx(expected, rel=1e-13)
    assert steps[-1].loss < steps[0].loss


@given(bounds=st.tuples(st.floats(-3.0, 0.0), st.floats(0.1, 0.5)), seed=st.integers(0, 5))
@settings(max_examples=20)
def test_radius_keeps_within_its_bounds(bounds, seed):
    """Bounds so close that rejections meet the lower one, or growth the upper one."""
    low = 10.0 ** bounds[0]
    high = low * 10.0 ** bounds[1]
    chosen = options(subdomains=2, min_radius=low, max_radius=high, initial_radius=low * 1.01)
    solver = make_solver(MPI.COMM_SELF, chosen, small_network(seed))
    radii = [solver.step(classified(30, seed)).schwarz.next_radius for _ in range(12)]
    assert all(low <= radius <= high for radius in radii)
    assert low in radii or high in radii


@pytest.mark.parametrize("window", [0, 1, 3])
def test_window_of_earlier_losses(window):
    """The reference is the maximum of this loss and of the last ``window`` losses at which a step was accepted."""
    rises = 0
    for seed in range(3):
        chosen = options(subdomains=3, window=window, initial_radius=2.0, min_radius=0.7, increase_factor=3.0)
        solver = make_solver(MPI.COMM_SELF, chosen, small_network(seed))
        earlier = []
        for iteration in range(25):
            judged = solver.step(classified(30, seed=iteration % 3)).schwarz
            reference = max([judged.loss, *earlier[max(len(earlier) - window, 0) :]])
            assert judged.actual_reduction == reference - judged.trial_loss
            assert judged.accepted == (judged.actual_reduction / judged.predicted_reduction >= 1e-4)
            if judged.accepted:
                earlier.append(judged.loss)
                rises += judged.trial_loss > judged.loss
    assert (rises > 0) == (window > 0)


def test_automatic_radius_is_the_length_of_the_cauchy_step():
    """On a quadratic: |g|^3 / g.Hg, the minimiser along the gradient."""
    inputs, _ = classified(50)
    network = nn.Sequential(nn.Linear(FEATURES, 1, bias=False)).double()
    targets = inputs.sum(dim=1, keepdim=True)
    weights = network[0].weight.detach().clone()
    hessian = 2.0 * inputs.T @ inputs / 50
    gradient = (weights - 1.0) @ hessian
    length = gradient.norm() ** 3 / (gradient @ hessian @ gradient.T)
    solver = make_solver(MPI.COMM_SELF, options(subdomains=1, initial_radius=None), network, nn.functional.mse_loss)
    judged = solver.step((inputs, targets)).schwarz
    # The curvature is a finite difference of gradients with steps of 1e-8.
    assert judged.radius == pytest.approx(length.item(), rel=1e-6)
    assert judged.rho == pytest.approx(0.5, rel=1e-5)
