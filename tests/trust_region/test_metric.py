"""The Fisher metric of earlier tasks against dense matrices, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apts_mpi import APTS, APTSOptions, GlobalStepOptions, InvalidInput, TrustRegionOptions

OPTIONS = APTSOptions(trust_region=TrustRegionOptions(metric="fisher", metric_radius=0.1))


def data(seed, samples=12):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (samples,), generator=generator)


def network(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3)).double()


def solver(own, world, options=OPTIONS):
    return APTS(own, cross_entropy, comm=world, options=options)


def dense_factors(own, inputs):
    """A and G of each linear layer, by the definition: sample by sample, and over all labels with their odds."""
    found = []
    for place in range(0, len(own), 2):
        before, behind = own[:place], own[place + 1 :]
        sides = []
        for sample in inputs:
            given = before(sample)
            hidden = own[place](given).detach().requires_grad_()
            scores = behind(hidden)
            given = given if own[place].bias is None else torch.cat([given, torch.ones(1).double()])
            odds, square = torch.softmax(scores, 0), 0.0
            for label in range(3):
                (slope,) = torch.autograd.grad(torch.log_softmax(scores, 0)[label], hidden, retain_graph=True)
                square = square + odds[label].detach() * torch.outer(slope, slope)
            sides.append((torch.outer(given, given).detach(), square))
        found.append([torch.stack(side).mean(0) for side in zip(*sides, strict=True)])
    return found


def dense(own, factors):
    """F in the order of the parameters: of each layer weights row by row, then biases."""
    blocks = []
    for place, (inputs, outputs) in zip(range(0, len(own), 2), factors, strict=True):
        block = torch.kron(outputs, inputs)
        columns, size = own[place].in_features, len(block)
        numbers = torch.arange(size).view(len(outputs), -1)
        block = block[order := torch.cat([numbers[:, :columns].flatten(), numbers[:, columns:].flatten()])][:, order]
        blocks.append(block)
    return torch.block_diag(*blocks)


@pytest.mark.mpi
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_dense_matrix_of_the_mean_factors_of_the_tasks(world, bias):
    """To rounding, as the factors are sums over samples that are 12 here."""
    own = network(bias)
    metric = solver(own, world).holding.inner.metric
    way = torch.randn(len(metric.centre), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert metric.square(way) == 0.0 and metric.nearest(way) is way
    found = []
    for seed in (0, 1):
        inputs, targets = data(seed)
        metric.remember(inputs, targets)
        found.append(dense_factors(own, inputs))
        with torch.no_grad():
            own[0].weight += 0.1
    means = [[(one + other) / 2 for one, other in zip(*layer, strict=True)] for layer in zip(*found, strict=True)]
    matrix = dense(own, means)
    assert metric.square(way) == pytest.approx(float(way @ matrix @ way), rel=1e-12)
    nearest = metric.nearest(way)
    assert metric.square(nearest) == pytest.approx(0.1**2, rel=1e-8)
    # The condition of the nearest point: way - nearest = mu F nearest with one mu >= 0, (I + mu F) nearest = way.
    multiplier = float((way - nearest) @ (matrix @ nearest) / (matrix @ nearest).square().sum())
    assert multiplier > 0.0
    torch.testing.assert_close(nearest + multiplier * matrix @ nearest, way, rtol=1e-9, atol=1e-9)
    inside = nearest * 0.99
    assert metric.nearest(inside) is inside


@pytest.mark.mpi
@pytest.mark.parametrize("noise", ["none", "batches"])
def test_steps_stay_within_both_bounds_and_go_down(world, noise):
    own, (inputs, targets) = network(), data(0, samples=24)
    one_step = {"noise": noise, "global_step": GlobalStepOptions(model="none")}
    options = APTSOptions(trust_region=OPTIONS.trust_region, **one_step)
    apts = solver(own, world, options)
    metric = apts.holding.inner.metric
    metric.remember(inputs, targets)
    values = apts.holding.objective.vector.values
    others = inputs.flip(1), targets.roll(1)
    free = copy.deepcopy(own)
    losses, longest = [], 0.0
    for _ in range(12):
        before = values.clone()
        judged = apts.step(others).schwarz
        losses.append(judged.loss)
        assert (values - before).norm() <= judged.radius * (1.0 + 1e-12)
        longest = max(longest, metric.square(values - metric.centre))
    assert losses[-1] < losses[0]
    # Half of the bound at least is used, or this shows nothing; without the metric it is broken.
    assert 0.5 * 0.1**2 < longest <= 0.1**2 * (1.0 + 1e-6)
    plain = solver(free, world, APTSOptions(**one_step))
    for _ in range(12):
        plain.step(others)
    assert metric.square(plain.holding.objective.vector.values - metric.centre) > 0.1**2


@pytest.mark.mpi
def test_a_step_that_would_lead_uphill_is_that_of_the_steepest_descent(world):
    apts = solver(network(), world)
    metric = apts.holding.inner.metric
    metric.remember(*data(0))
    point, step = metric.centre, torch.ones_like(metric.centre)
    bounded, predicted = metric.within(point, step.clone(), step, 1.0)
    assert predicted is None and float(bounded @ step) < 0.0
    assert bounded.norm() <= step.norm() * (1.0 + 1e-12)
    assert metric.within(point, step, 1e-6 * step, 1.0)[1] == 1.0


@pytest.mark.mpi
def test_layers_without_factors_are_named(world):
    own = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    with pytest.raises(InvalidInput, match="trust_region.metric: 'fisher' is for .* layer '1' is LayerNorm"):
        solver(own, world)
