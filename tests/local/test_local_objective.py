"""The first-order consistent local objective: f_d(x) + <R_d g - grad f_d(x_k), x - x_k>."""

import pytest
import torch
from networks import classified, classifier, cross_entropy, flat, make_solver, options
from torch import nn

NETWORKS = {
    "plain": classifier,
    "normalised": lambda: classifier(batch_norm=True),
    "dropout": lambda: classifier(dropout=0.4),
}


class Probe:
    """Takes the place of a local solver: lets a test look at the local objective during a step."""

    def __init__(self, subdomain, look):
        self.subdomain, self.look = subdomain, look
        self.seen = False

    def solve(self, local, radius, kind):
        local.begin()
        self.look(self.subdomain, local)
        self.seen = True


def visit(solver, batch, look):
    """Call ``look(subdomain, local objective)`` for each subdomain of this rank, at the point where the solver is."""
    probes = {subdomain.index: Probe(subdomain, look) for subdomain in solver.holding.decomposition.carried}
    solver.holding.schwarz.solvers.update(probes)
    solver.step(batch)
    assert probes and all(probe.seen for probe in probes.values())


def direction(local, seed=0):
    """A unit vector, the same on all ranks of a team."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(local.block), generator=generator, dtype=torch.float64)
    return vector / vector.norm()


variants = pytest.mark.parametrize("variant", ["exact", "inexact"])
partitions = pytest.mark.parametrize("partition", ["layer", "index"])
data = pytest.mark.parametrize("local_data", ["shard", "full"])
networks = pytest.mark.parametrize("build", NETWORKS.values(), ids=NETWORKS.keys())


def chosen_options(**changes):
    return options(solver="sgd", iterations=2, **changes)


@pytest.mark.mpi
@pytest.mark.all_sizes(variant="inexact", partition="layer", local_data="shard", build=NETWORKS["normalised"])
@variants
@partitions
@data
@networks
def test_gradient_at_the_start_is_the_global_one(world, variant, partition, local_data, build):
    """Whatever data and approximation f_d uses; the subtraction of its own gradient leaves rounding alone."""
    chosen = chosen_options(variant=variant, partition=partition, local_data=local_data, overlap=1)
    solver = make_solver(world, chosen, build())

    def look(subdomain, local):
        value, found = local.value_and_gradient()
        restricted = solver.holding.objective.reduction.total[subdomain.start : subdomain.stop]
        assert restricted.norm() > 1e-3
        torch.testing.assert_close(found, restricted, rtol=1e-11, atol=1e-14)
        # A cached value is that of the same masks and statistics.
        torch.testing.assert_close(local.start_value, value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(local.value(), value, rtol=1e-13, atol=1e-14)

    visit(solver, classified(), look)


@pytest.mark.mpi
@variants
@partitions
@networks
def test_gradient_away_from_the_start_is_of_order_2(world, variant, partition, build):
    """Taylor: what is left of the change of the value after its linear part falls with the square of the step."""
    chosen = chosen_options(variant=variant, partition=partition, subdomains=5, overlap=1)
    solver = make_solver(world, chosen, build())

    def look(_, local):
        local.block += 0.3 * direction(local, seed=1)
        value, gradient = local.value_and_gradient()
        gradient = gradient.clone()
        start = local.block.clone()
        # Several directions: along one the second derivative may happen to be small, or zero for linear layers.
        alongs = [direction(local, seed) for seed in range(3)] + [gradient / gradient.norm()]
        remainders = []
        for size in (2e-3, 1e-3):
            remainders.append(0.0)
            for along in alongs:
                local.block.copy_(start + size * along)
                remainders[-1] += (local.value() - value - size * torch.dot(gradient, along)).abs().item()
        assert remainders[1] < remainders[0] / 3.5 + 1e-14
        assert remainders[0] < 1e-4

    visit(solver, classified(), look)


@pytest.mark.mpi
@data
def test_correction_reaches_the_gradient_away_from_the_start(world, local_data):
    """The gradient has the linear term in it, not the value alone: they agree in a finite difference.

    On shards, whose own gradient differs from the global one.
    """
    solver = make_solver(world, chosen_options(variant="exact", local_data=local_data))

    def look(_, local):
        along = direction(local)
        local.block += 0.2 * along
        start = local.block.clone()
        found = torch.dot(local.value_and_gradient()[1], along).item()
        values = []
        for side in (1.0, -1.0):
            local.block.copy_(start + side * 1e-5 * along)
            values.append(local.value().item())
        # Central differences of a value near 1: truncation 1e-10, rounding 1e-16 / 1e-5.
        assert found == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-9)

    visit(solver, classified(), look)


def shard_of(solver, subdomain, batch):
    count, samples = len(solver.holding.decomposition.subdomains), len(batch[0])
    if solver.options.schwarz.local_data == "full":
        return batch
    own = slice(samples * subdomain.index // count, samples * (subdomain.index + 1) // count)
    return batch[0][own], batch[1][own]


@pytest.mark.mpi
@partitions
@data
def test_exact_objective_is_the_loss_with_the_rest_frozen(world, partition, local_data):
    """Against the loss of a second network, into which the whole parameter vector is copied."""
    batch, other = classified(), classifier()
    solver = make_solver(world, chosen_options(variant="exact", partition=partition, local_data=local_data))
    theta = solver.holding.objective.vector.values.clone()

    def loss_and_slope(values, samples):
        nn.utils.vector_to_parameters(values, other.parameters())
        loss = cross_entropy(other(samples[0]), samples[1])
        return loss.item(), flat(torch.autograd.grad(loss, list(other.parameters())))

    gradient = loss_and_slope(theta, batch)[1]

    def look(subdomain, local):
        samples = shard_of(solver, subdomain, batch)
        block = slice(subdomain.start, subdomain.stop)
        correction = (gradient - loss_and_slope(theta, samples)[1])[block]
        displacement = 0.7 * direction(local)
        local.block += displacement
        value, slope = local.value_and_gradient()
        moved = theta.clone()
        moved[block] += displacement
        expected_value, expected_slope = loss_and_slope(moved, samples)
        assert value.item() == pytest.approx(expected_value + torch.dot(correction, displacement).item(), rel=1e-12)
        torch.testing.assert_close(slope, expected_slope[block] + correction, rtol=1e-10, atol=1e-14)

    visit(solver, batch, look)


@pytest.mark.mpi
@data
def test_inexact_objective_is_the_product_of_outputs_and_their_gradient(world, local_data):
    """One layer a subdomain: <lambda, out(a)> with lambda and a from the start; the true loss for the last layer."""
    batch, network = classified(), classifier()
    solver = make_solver(world, chosen_options(variant="inexact", local_data=local_data), network)

    def look(subdomain, local):
        inputs, targets = shard_of(solver, subdomain, batch)
        own = network[2 * subdomain.index : 2 * subdomain.index + 2]
        rest = network[2 * subdomain.index + 2 :]
        entering = network[: 2 * subdomain.index](inputs).detach()
        leaving = own(entering).detach().requires_grad_()
        (weights,) = torch.autograd.grad(cross_entropy(rest(leaving), targets), leaving)

        def value_and_slope():
            outputs = own(entering)
            last = len(rest) == 0
            value = cross_entropy(outputs, targets) if last else (outputs * weights).sum()
            return value.item(), flat(torch.autograd.grad(value, list(own.parameters())))

        correction = local.gradient - value_and_slope()[1]
        displacement = 0.7 * direction(local)
        local.block += displacement
        value, slope = local.value_and_gradient()
        expected_value, expected_slope = value_and_slope()
        assert value.item() == pytest.approx(expected_value + torch.dot(correction, displacement).item(), rel=1e-11)
        torch.testing.assert_close(slope, expected_slope + correction, rtol=1e-10, atol=1e-14)

    visit(solver, batch, look)


@pytest.mark.mpi
def test_first_inexact_gradient_is_the_exact_one(world):
    """With one local iteration the two variants are one method."""
    correction = []
    for variant in ("exact", "inexact"):
        solver = make_solver(world, options(variant=variant, solver="sgd", iterations=1))
        solver.step(classified())
        correction.append(solver.holding.schwarz.correction)
    torch.testing.assert_close(*correction, rtol=1e-12, atol=1e-15)


@pytest.mark.mpi
@variants
def test_local_evaluations_leave_buffers_and_random_state_alone(world, variant):
    network = classifier(batch_norm=True, dropout=0.4)
    solver = make_solver(world, chosen_options(variant=variant), network)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    torch.manual_seed(11)
    state = torch.get_rng_state()

    def look(_, local):
        local.block += 0.1
        local.value_and_gradient()
        local.value()
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(dict(network.named_buffers()), buffers, rtol=0, atol=0)

    visit(solver, classified(), look)


@pytest.mark.mpi
@variants
def test_local_evaluations_run_no_layer_that_they_can_leave_out(world, variant):
    """Exact: from the subdomain's layer to the loss. Inexact: that layer alone."""
    calls = []
    network = classifier()
    solver = make_solver(world, chosen_options(variant=variant), network)
    for index, module in enumerate(network):
        module.register_forward_hook(lambda *_, index=index: calls.append(index))

    def look(subdomain, local):
        first = 2 * subdomain.index
        stop = first + 2 if variant == "inexact" else 11
        calls.clear()
        local.value_and_gradient()
        assert calls == list(range(first, min(stop, 11)))
        calls.clear()
        local.value()
        assert calls == list(range(first, min(stop, 11)))

    visit(solver, classified(), look)
