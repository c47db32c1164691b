"""Curvature from gradients with random signs, against sums over the samples' own gradients."""

import itertools

import pytest
import torch
from mpi4py import MPI
from networks import CLASSES, FEATURES, classified, classifier, cross_entropy, make_solver, options
from staged_networks import staged
from test_dense import Looking
from torch import nn

from apts_mpi import APTS, APTSOptions, CoarseOptions, LocalOptions, SchwarzOptions, StagedAPTS
from apts_mpi.curvature.layer import LayerBatch
from apts_mpi.curvature.signed import LARGEST_FACTOR, SignedFactors, signed_factors
from apts_mpi.network.partition import split

SAMPLES = 5


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def all_signs(gradients):
    """Gradients of the mean with every choice of signs: their mean is the expectation."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(gradients))), dtype=gradients.dtype)
    return list(signs @ gradients / len(gradients))


def measured(shapes, gradients):
    """The curvature, and what it measures by all signs of the samples' gradients, shape (samples, size)."""
    curvature = SignedFactors([torch.Size(shape) for shape in shapes])
    return curvature, curvature.measure(LayerBatch([], 0, all_signs(gradients), len(gradients)))


def test_expectations_are_second_moments_of_the_samples():
    gradients = normal(SAMPLES, 3 * 4 + 2 + 1 + 2 * 3)
    _, (left, right, vector, scalar, *convolution) = measured([(3, 4), (2,), (), (2, 3, 1)], gradients)
    matrices = gradients[:, :12].view(SAMPLES, 3, 4)
    torch.testing.assert_close(left, sum(m @ m.T for m in matrices) / SAMPLES, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(right, sum(m.T @ m for m in matrices) / SAMPLES, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(vector, gradients[:, 12:14].square().mean(dim=0), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(scalar, gradients[:, 14:15].square().mean(dim=0), rtol=1e-13, atol=1e-14)
    assert [tuple(factor.shape) for factor in convolution] == [(2, 2), (3, 3)]


def test_one_sample_of_a_linear_layer_has_its_exact_fisher_matrix():
    """Its gradient l a^T gives A and G of K-FAC, and A (x) G the square of the gradient."""
    gradient = torch.outer(normal(3), normal(4, seed=1)).flatten()
    curvature, statistics = measured([(3, 4)], gradient[None])
    damping = 1e-2
    curvature.refresh(statistics, damping)
    inverse = -torch.stack([curvature.direction(unit) for unit in torch.eye(12, dtype=torch.float64)], dim=1)
    left, right = (factor / statistics[0].trace().sqrt() for factor in statistics)
    torch.testing.assert_close(torch.kron(left, right), torch.outer(gradient, gradient), rtol=1e-12, atol=1e-13)
    damped = [
        factor + damping**0.5 * factor.trace() / len(factor) * torch.eye(len(factor), dtype=torch.float64)
        for factor in (left, right)
    ]
    torch.testing.assert_close(inverse, torch.linalg.inv(torch.kron(*damped)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (LARGEST_FACTOR + 1, 200)])
def test_sides_that_are_too_long_have_a_diagonal(shape):
    gradients = normal(2, shape[0] * shape[1])
    curvature, statistics = measured([shape], gradients)
    matrices = gradients.view(2, *shape)
    assert sorted(factor.dim() for factor in statistics) == [1, 2]
    for factor, dimension in zip(statistics, (2, 1), strict=True):
        if factor.dim() == 1:
            expected = matrices.square().sum(dim=dimension).mean(dim=0)
            torch.testing.assert_close(factor, expected, rtol=1e-12, atol=1e-14)
    curvature.refresh(statistics, 0.1)
    gradient = gradients.mean(dim=0)
    assert torch.dot(curvature.direction(gradient), gradient) < 0.0


def test_gradients_that_vanish_move_nothing():
    curvature, statistics = measured([(3, 4), (2,)], torch.zeros(2, 14, dtype=torch.float64))
    curvature.refresh(statistics, 0.1)
    assert not curvature.direction(torch.zeros(14, dtype=torch.float64)).any()


def test_parameters_that_are_frozen_or_of_another_layer():
    layer = nn.Bilinear(3, 2, 4)
    layer.bias.requires_grad_(False)
    assert len(signed_factors(layer, 24).shapes) == 1
    assert signed_factors(layer, 5).shapes == [(5,)]  # another layer has the rest


@pytest.mark.mpi
@pytest.mark.all_sizes(variant="inexact", local_data="shard", subdomains=3)
@pytest.mark.parametrize("variant", ["exact", "inexact"])
@pytest.mark.parametrize("local_data", ["shard", "full"])
@pytest.mark.parametrize("subdomains", [1, 3])
def test_signed_gradients_are_sums_over_the_samples(world, variant, local_data, subdomains):
    """Of the shard, whichever ranks of the team have them; the signs are those that torch draws in this order."""
    network, (inputs, targets) = classifier(), classified()
    chosen = options(subdomains=subdomains, variant=variant, local_data=local_data)
    solver = make_solver(world, chosen, network)
    parameters = list(network.parameters())
    index = solver.holding.decomposition.carried[0].index
    extent = solver.holding.decomposition.carried[0]
    first, last = (0, len(inputs)) if local_data == "full" else split(len(inputs), subdomains, index)
    signs = 2.0 * torch.randint(2, (last - first, 2), generator=torch.Generator().manual_seed(3)).double() - 1.0
    expected = torch.zeros(2, solver.holding.objective.vector.values.numel(), dtype=torch.float64)
    for place in range(first, last):
        loss = cross_entropy(network(inputs[place : place + 1]), targets[place : place + 1])
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        expected += torch.outer(signs[place - first], gradient) / (last - first)

    def look(local):
        found = local.signed_gradients(2, key=3)
        for own, whole in zip(found, expected, strict=True):
            torch.testing.assert_close(own, whole[extent.start : extent.stop], rtol=1e-11, atol=1e-14)

    looking = solver.holding.schwarz.solvers[index] = Looking(solver.holding.schwarz.solvers[index], look)
    solver.step((inputs, targets))
    assert looking.seen == 1


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_signs_are_independent_where_every_rank_gives_its_own_samples(world):
    counts = [3 + rank for rank in range(world.size)]
    inputs, targets = classified(sum(counts))
    first = sum(counts[: world.rank])
    own = slice(first, first + counts[world.rank])
    network = classifier()
    solver = make_solver(world, options(subdomains=1, variant="exact", batch="shard"), network)
    signs = 2.0 * torch.randint(2, (len(inputs), 1), generator=torch.Generator().manual_seed(3)).double()[:, 0] - 1.0
    losses = nn.functional.cross_entropy(network(inputs), targets, reduction="none")
    parts = torch.autograd.grad((signs * losses).mean(), list(network.parameters()))

    def look(local):
        (found,) = local.signed_gradients(1, key=3)
        expected = torch.cat([part.flatten() for part in parts])
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)

    looking = solver.holding.schwarz.solvers[0] = Looking(solver.holding.schwarz.solvers[0], look)
    solver.step((inputs[own], targets[own]))
    assert looking.seen == 1


class Named(nn.Module):
    """Returns tensors with names; its loss takes several rows of a sample apart."""

    def __init__(self):
        super().__init__()
        self.cells, self.last = nn.GRU(2, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, inputs):
        states, last = self.cells(inputs.unflatten(1, (FEATURES // 2, 2)))
        return {"scores": self.last(states).flatten(0, 1), "other": (last, torch.arange(2))}


def scores(outputs, targets):
    return cross_entropy(outputs["scores"], targets.repeat_interleave(FEATURES // 2))


@pytest.mark.parametrize(
    ("make", "loss", "tokens"),
    [
        (Named, scores, False),
        (lambda: nn.Sequential(nn.EmbeddingBag(6, 4, sparse=True), nn.Linear(4, CLASSES)), cross_entropy, True),
    ],
    ids=["nested outputs", "sparse gradients"],
)
def test_networks_that_only_the_plain_sum_can_take(make, loss, tokens):
    torch.manual_seed(0)
    chosen = APTSOptions(subdomains=1, local=LocalOptions(solver="kfac"), coarse=CoarseOptions(model="none"))
    solver = APTS(make().double(), loss, comm=MPI.COMM_SELF, options=chosen)
    inputs, targets = classified()
    inputs = (3.0 * inputs).long().clamp(0, 5) if tokens else inputs
    losses = [solver.step((inputs, targets)).schwarz.loss for _ in range(5)]
    assert losses[-1] < losses[0]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.GRU(2, 6, batch_first=True)

    def forward(self, inputs):
        return self.cells(inputs)[0].flatten(1)


def recurrent():
    torch.manual_seed(0)
    return nn.Sequential(nn.Unflatten(1, (FEATURES // 2, 2)), Recurrent(), nn.Linear(30, CLASSES)).double()


@pytest.mark.mpi
@pytest.mark.all_sizes(schwarz={})
@pytest.mark.parametrize("schwarz", [{}, {"variant": "exact"}, {"decomposition": "data"}], ids=str)
def test_iterates_do_not_depend_on_the_ranks(world, schwarz):
    def iterates(comm):
        chosen = APTSOptions(subdomains=2, local=LocalOptions(solver="kfac"), schwarz=SchwarzOptions(**schwarz))
        solver = APTS(recurrent(), cross_entropy, comm=comm, options=chosen)
        losses = [solver.step(classified(seed=index)).schwarz.loss for index in range(6)]
        kinds = {type(layer[0]) for local in solver.holding.schwarz.solvers.values() for layer in local.layers}
        return losses, solver.holding.objective.vector.values, kinds

    losses, values, _ = iterates(world)
    serial_losses, serial_values, kinds = iterates(MPI.COMM_SELF)
    assert SignedFactors in kinds
    # Sums in another order, through inverses with a condition of up to 1e3.
    assert losses == pytest.approx(serial_losses, rel=1e-8)
    torch.testing.assert_close(values, serial_values, rtol=1e-8, atol=1e-10)


def test_state_goes_on_in_another_solver():
    def solver():
        chosen = APTSOptions(subdomains=2, local=LocalOptions(solver="kfac"))
        return APTS(recurrent(), cross_entropy, comm=MPI.COMM_SELF, options=chosen)

    first, second = solver(), solver()
    for index in range(7):
        first.step(classified(seed=index))
    for index, local in first.holding.schwarz.solvers.items():
        second.holding.schwarz.solvers[index].restore(local.state())
    for index, local in first.holding.schwarz.solvers.items():
        gradient = normal(local.layers[-1][2].stop)
        assert torch.equal(local.direction(gradient), second.holding.schwarz.solvers[index].direction(gradient))


class Bent(nn.Linear):
    """Of unknown kind, as a subclass may compute anything."""

    def forward(self, inputs):
        return super().forward(inputs).sin()


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_micro_batches_have_the_signs_of_the_batch(world):
    def losses(micro_batches):
        torch.manual_seed(0)
        layers = [Bent(FEATURES, FEATURES) for _ in range(world.size)]
        network = nn.Sequential(*layers, nn.Linear(FEATURES, CLASSES)).double()
        chosen = staged(APTSOptions(), solver="kfac", micro_batches=micro_batches)
        solver = StagedAPTS(network, cross_entropy, comm=world, options=chosen)
        found = [solver.step(classified(seed=index)).schwarz.loss for index in range(4)]
        kinds = {type(layer[0]) for local in solver.holding.schwarz.solvers.values() for layer in local.layers}
        assert SignedFactors in kinds
        return found

    assert losses(3) == pytest.approx(losses(1), rel=1e-9)
