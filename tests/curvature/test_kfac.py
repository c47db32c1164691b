"""K-FAC: factors and directions against dense formulas."""

import dataclasses
import math

import networks
import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn
from torch.func import functional_call, grad, vmap

from apts_mpi import CoarseOptions, LocalOptions
from apts_mpi.curvature.kinds import (
    EmbeddingFactors,
    KroneckerFactors,
    NormalisationDiagonal,
    make_curvature,
)
from apts_mpi.curvature.layer import LayerBatch
from apts_mpi.curvature.signed import SignedFactors
from apts_mpi.network.recorder import LayerRecorder


def recorded(network, layer, inputs, targets, loss):
    """Records of a layer in one gradient evaluation, its gradient, and per-sample gradients by torch.func."""
    recorder = LayerRecorder([layer])
    with recorder.recording() as records:
        value = loss(network(inputs), targets)
    value.backward()
    for record in records:
        record.complete(1.0)
    gradient = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])
    return records, gradient


def per_sample_gradients(network, layer, inputs, targets, loss):
    """Gradients of each sample's own loss with respect to a layer, shape (samples, size)."""
    names = [name for name, value in network.named_parameters() if any(value is other for other in layer.parameters())]
    values = {name: dict(network.named_parameters())[name].detach() for name in names}

    def of_sample(values, sample, target):
        return loss(functional_call(network, values, (sample[None],)), target[None])

    gradients = vmap(grad(of_sample), in_dims=(None, 0, 0))(values, inputs, targets)
    return torch.cat([gradients[name].flatten(1) for name in names], dim=1)


def batch_of(records, gradient, samples):
    return LayerBatch(records, samples, [gradient], samples)


def inverse_of(curvature, size):
    """The matrix that `direction` multiplies a gradient by, with the other sign."""
    return -torch.stack([curvature.direction(unit) for unit in torch.eye(size, dtype=torch.float64)], dim=1)


def test_one_sample_has_its_exact_fisher_matrix():
    """For one sample g = l (x) a exactly, so A (x) G is g g^T."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs, targets = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)
    layer = network[0]
    records, gradient = recorded(network, layer, inputs, targets, nn.functional.mse_loss)
    activations, outputs = KroneckerFactors(layer).measure(batch_of(records, gradient, 1))
    # kron in the order of the flat vector: rows of W over [a, 1], then the bias.
    whole = torch.kron(outputs, activations).view(3, 5, 3, 5)
    order = [(row, column) for row in range(3) for column in range(4)] + [(row, 4) for row in range(3)]
    fisher = torch.stack([torch.stack([whole[i, j, k, m] for k, m in order]) for i, j in order])
    torch.testing.assert_close(fisher, torch.outer(gradient, gradient), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["linear", "no bias", "tokens", "convolution"])
def test_direction_is_the_damped_inverse_of_the_factors(kind):
    torch.manual_seed(0)
    if kind == "convolution":
        network = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2))
        inputs = torch.randn(6, 2, 5, 5, dtype=torch.float64)
    else:
        network = nn.Sequential(nn.Linear(4, 3, bias=kind != "no bias"), nn.Tanh(), nn.Linear(3, 2))
        inputs = torch.randn(*((6, 5, 4) if kind == "tokens" else (6, 4)), dtype=torch.float64)
    network.double()
    targets = torch.zeros_like(network(inputs))
    layer = network[0]
    records, gradient = recorded(network, layer, inputs, targets, nn.functional.mse_loss)
    curvature = KroneckerFactors(layer)
    statistics = curvature.measure(batch_of(records, gradient, 6))
    damping = 1e-2
    curvature.refresh(statistics, damping)

    # By hand: activations and output gradients as rows, one a sample and position.
    if kind == "convolution":
        rows = nn.functional.unfold(inputs, 3, padding=1, stride=2).transpose(1, 2).reshape(-1, 18)
    else:
        rows = inputs.reshape(-1, 4)
    if kind != "no bias":
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    activations = rows.T @ rows / 6
    torch.testing.assert_close(statistics[0], activations, rtol=1e-12, atol=1e-14)
    outputs = statistics[1]
    # Damped relative to the mean eigenvalue of each.
    left, right = (
        torch.linalg.inv(factor + damping**0.5 * factor.trace() / len(factor) * torch.eye(len(factor)).double())
        for factor in (outputs, activations)
    )
    weights = gradient[: layer.weight.numel()].view(3, -1)
    if kind != "no bias":
        weights = torch.cat([weights, gradient[layer.weight.numel() :, None]], dim=1)
    expected = -left @ weights @ right
    flat = expected.flatten() if kind == "no bias" else torch.cat([expected[:, :-1].flatten(), expected[:, -1]])
    torch.testing.assert_close(curvature.direction(gradient), flat, rtol=1e-9, atol=1e-12)


def test_output_factor_is_the_second_moment_of_per_sample_gradients():
    """The bias's gradient of a sample is its output gradient, so G is the mean of their outer products."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs, targets = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 2, (7,))
    layer, loss = network[0], nn.functional.cross_entropy
    samples = per_sample_gradients(network, layer, inputs, targets, loss)[:, -3:]
    records, gradient = recorded(network, layer, inputs, targets, loss)
    _, outputs = KroneckerFactors(layer).measure(batch_of(records, gradient, 7))
    torch.testing.assert_close(outputs, samples.T @ samples / 7, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["layer norm", "batch norm"])
def test_normalisation_has_the_diagonal_of_the_fisher_matrix(kind):
    torch.manual_seed(0)
    if kind == "layer norm":
        network = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 2)).double()
    else:
        network = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double().eval()
        network[1].running_mean.normal_()
    layer, loss = network[1], nn.functional.cross_entropy
    inputs, targets = torch.randn(7, 4, dtype=torch.float64), torch.randint(0, 2, (7,))
    samples = per_sample_gradients(network, layer, inputs, targets, loss)
    records, gradient = recorded(network, layer, inputs, targets, loss)
    (diagonal,) = NormalisationDiagonal(layer).measure(batch_of(records, gradient, 7))
    torch.testing.assert_close(diagonal, samples.square().mean(dim=0), rtol=1e-11, atol=1e-15)


def test_embedding_equals_a_linear_layer_on_unit_vectors():
    torch.manual_seed(0)
    tokens = torch.randint(0, 5, (6, 3))
    embedding = nn.Embedding(5, 4).double()
    linear = nn.Linear(5, 4, bias=False).double()
    linear.weight.data.copy_(embedding.weight.data.T)
    unit = nn.functional.one_hot(tokens, 5).double()
    targets = torch.zeros(6, 3, 4, dtype=torch.float64)
    found = {}
    for name, layer, inputs, make in (
        ("embedding", embedding, tokens, EmbeddingFactors),
        ("linear", linear, unit, KroneckerFactors),
    ):
        records, gradient = recorded(layer, layer, inputs, targets, nn.functional.mse_loss)
        curvature = make(layer)
        curvature.refresh(curvature.measure(batch_of(records, gradient, 6)), 1e-2)
        found[name] = curvature.direction(gradient)
    torch.testing.assert_close(found["embedding"], found["linear"].view(4, 5).T.flatten(), rtol=1e-9, atol=1e-12)


def test_kinds_of_layers():
    def kind(module, size=None):
        size = sum(value.numel() for value in module.parameters()) if size is None else size
        return type(make_curvature(module, size))

    assert kind(nn.Linear(2, 3)) is KroneckerFactors
    assert kind(nn.Conv2d(2, 4, 3)) is KroneckerFactors
    assert kind(nn.Conv2d(2, 4, 3, groups=2)) is SignedFactors
    assert kind(nn.Embedding(3, 2)) is EmbeddingFactors
    assert kind(nn.BatchNorm2d(3)) is NormalisationDiagonal
    assert kind(nn.PReLU()) is SignedFactors
    assert kind(nn.Linear(2, 3), size=6) is SignedFactors  # a frozen bias


def kfac(**changes):
    base = networks.options(**{"solver": "kfac", "variant": "inexact", **changes})
    return dataclasses.replace(
        base, local=LocalOptions(solver="kfac", decay=0.9, refresh=2), coarse=CoarseOptions(model="none")
    )


def test_running_means_follow_the_decay_and_the_interval():
    solver = networks.make_solver(MPI.COMM_SELF, kfac(subdomains=1))
    local = solver.holding.schwarz.solvers[0]
    seen = []
    for index in range(5):
        solver.step(networks.classified(seed=index))
        seen.append((local.count, local.updates))
    # Twice at the start, then every second iteration.
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4)]


def test_a_gradient_that_is_not_finite_stays_out_of_the_running_means():
    solver = networks.make_solver(MPI.COMM_SELF, kfac(subdomains=2))
    inputs, targets = networks.classified()
    solver.step((inputs, targets))
    bad = inputs.clone()
    bad[0] = torch.nan
    assert not solver.step((bad, targets)).accepted
    for local in solver.holding.schwarz.solvers.values():
        assert all(mean.isfinite().all() for means in local.statistics for mean in means)
    assert any(solver.step((inputs, targets)).accepted for _ in range(5))


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_iterates_do_not_depend_on_the_ranks(world):
    def iterates(comm):
        solver = networks.make_solver(comm, kfac())
        numbers = [networks.numbers(solver.step(networks.classified(seed=index))) for index in range(5)]
        return np.array(numbers).ravel(), solver.holding.objective.vector.values

    numbers, values = iterates(world)
    serial_numbers, serial_values = iterates(MPI.COMM_SELF)
    # Sums in another order, through inverses with a condition of up to 1e3.
    np.testing.assert_allclose(numbers, serial_numbers, rtol=1e-9)
    torch.testing.assert_close(values, serial_values, rtol=1e-9, atol=1e-12)


def test_weights_used_without_calling_their_layer_fall_back_to_the_gradient():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Linear(networks.FEATURES, 1, bias=False)

        def forward(self, inputs):
            return inputs + self.shift.weight

    torch.manual_seed(0)
    network = nn.Sequential(Shifted(), nn.Linear(networks.FEATURES, networks.CLASSES)).double()
    solver = networks.make_solver(MPI.COMM_SELF, kfac(subdomains=2), network)
    results = [solver.step(networks.classified()) for _ in range(5)]
    kinds = [type(layer[0]) for layer in solver.holding.schwarz.solvers[0].layers]
    assert kinds == [SignedFactors]
    assert results[-1].schwarz.loss < results[0].schwarz.loss


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        (nn.Linear(4, 3), torch.randn(6, 4)),
        (nn.Embedding(5, 3), torch.tensor([0, 1, 2, 3, 4, 0])),
        (nn.LayerNorm(4), torch.randn(6, 4)),
        (nn.Bilinear(4, 4, 3), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_scale_of_the_loss_does_not_matter_but_for_the_length(layer, inputs):
    """A loss times c has c^2 times the curvature by gradients, and c times the gradient: 1/c times the direction."""
    torch.manual_seed(0)
    layer.double()
    inputs = torch.randn(6, 4).double() if inputs is None else inputs.double() if inputs.is_floating_point() else inputs
    pair = isinstance(layer, nn.Bilinear)
    targets = torch.randn_like(layer(inputs, inputs) if pair else layer(inputs))
    curvature = make_curvature(layer, sum(parameter.numel() for parameter in layer.parameters()))

    def direction(scale):
        layer.zero_grad()

        def loss(outputs, targets):
            return scale * nn.functional.mse_loss(outputs, targets)

        if pair:
            gradient = torch.autograd.grad(loss(layer(inputs, inputs), targets), list(layer.parameters()))
            records, flat = [], torch.cat([part.flatten() for part in gradient])
        else:
            records, flat = recorded(nn.Sequential(layer), layer, inputs, targets, loss)
        curvature.refresh(curvature.measure(batch_of(records, flat, 6)), 0.3)
        return curvature.direction(flat)

    torch.testing.assert_close(1e-4 * direction(1e-4), direction(1.0), rtol=1e-9, atol=1e-12)


def test_a_convolution_with_many_patches_is_measured_on_samples_that_are_evenly_spread(monkeypatch):
    monkeypatch.setattr("apts_mpi.curvature.kinds.PATCHES", 16 * 3)
    monkeypatch.setattr("apts_mpi.curvature.kinds.PATCHES_A_COLUMN", 1)
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, padding=1).double()
    network = nn.Sequential(layer, nn.Flatten(), nn.Linear(48, 2).double())
    inputs, targets = torch.randn(7, 2, 4, 4, dtype=torch.float64), torch.zeros(7, 2, dtype=torch.float64)
    records, gradient = recorded(network, layer, inputs, targets, nn.functional.mse_loss)
    activations, outputs = KroneckerFactors(layer).measure(batch_of(records, gradient, 7))
    rows = nn.functional.unfold(inputs[[0, 2, 4]], 3, padding=1).transpose(1, 2).reshape(-1, 18)
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    # As the sum over as many samples as there are, a sample of the seven.
    torch.testing.assert_close(activations, rows.T @ rows / 3, rtol=1e-12, atol=1e-14)
    monkeypatch.undo()
    whole, unchanged = KroneckerFactors(layer).measure(batch_of(records, gradient, 7))
    torch.testing.assert_close(activations[-1, -1], whole[-1, -1], rtol=1e-12, atol=0.0)
    assert torch.equal(outputs, unchanged) and not torch.allclose(activations, whole)


@pytest.mark.parametrize("long", ["inputs", "outputs", "both"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_long_side_has_the_diagonal_of_its_factor(monkeypatch, long, bias):
    torch.manual_seed(0)
    sizes = {"inputs": (7, 3), "outputs": (3, 7), "both": (7, 8)}[long]
    layer = nn.Linear(*sizes, bias=bias).double()
    inputs, targets = torch.randn(6, sizes[0], dtype=torch.float64), torch.zeros(6, sizes[1], dtype=torch.float64)
    records, gradient = recorded(nn.Sequential(layer), layer, inputs, targets, nn.functional.mse_loss)
    curvature = KroneckerFactors(layer)
    whole = curvature.measure(batch_of(records, gradient, 6))
    monkeypatch.setattr("apts_mpi.curvature.kinds.LARGEST_SIDE", 5)
    statistics = curvature.measure(batch_of(records, gradient, 6))
    assert [tuple(factor.shape) for factor in statistics] == curvature.statistics
    assert [factor.dim() for factor in statistics] == [2 - (long != "outputs"), 2 - (long != "inputs")]
    expected = [full.diagonal() if part.dim() == 1 else full for part, full in zip(statistics, whole, strict=True)]
    torch.testing.assert_close(statistics, expected, rtol=1e-12, atol=1e-14)
    # The direction is that of the diagonal as a matrix.
    curvature.refresh(statistics, 0.1)
    found = curvature.direction(gradient)
    curvature.refresh([part.diag() if part.dim() == 1 else part for part in expected], 0.1)
    torch.testing.assert_close(found, curvature.direction(gradient), rtol=1e-10, atol=1e-13)


def test_a_layer_of_very_many_inputs_and_outputs_trains():
    """A matrix of 60,000 columns would take 14 GB."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(60_000, 8), nn.Tanh(), nn.Linear(8, 20_000))
    batch = torch.randn(16, 60_000), torch.randint(0, 20_000, (16,))
    chosen = dataclasses.replace(kfac(subdomains=2), coarse=CoarseOptions())
    solver = networks.make_solver(MPI.COMM_SELF, chosen, network)
    losses = [solver.step(batch).schwarz.loss for _ in range(3)]
    assert losses[-1] < losses[0]
    shapes = [tuple(mean.shape) for local in solver.holding.schwarz.solvers.values() for mean in local.statistics[0]]
    assert shapes == [(60_001,), (8, 8), (9, 9), (20_000,)]


WIDE = {
    "1x1 convolution": lambda: nn.Conv2d(16, 4096, 1),
    "1x1 convolution of 4,096": lambda: nn.Conv2d(4096, 4096, 1),
    "3x3 convolution": lambda: nn.Conv2d(512, 512, 3),
    "wide linear": lambda: nn.Linear(4, 8192),
    "narrow linear": lambda: nn.Linear(8192, 4),
    "a head of one": lambda: nn.Linear(5000, 1),
    "head of classes": lambda: nn.Linear(2048, 1000),
    "embedding": lambda: nn.Embedding(32000, 64),
    "short embedding": lambda: nn.Embedding(2, 4096),
    "attention": lambda: nn.MultiheadAttention(256, 4),
    "LSTM": lambda: nn.LSTM(64, 512),
    "LSTM of few": lambda: nn.LSTM(1, 2048),
    "transposed": lambda: nn.ConvTranspose2d(2048, 4, 2),
    "groups": lambda: nn.Conv2d(2048, 2048, 3, groups=2048),
    "normalisation": lambda: nn.LayerNorm(50000),
}


@pytest.mark.parametrize("name", WIDE)
def test_memory_of_curvature_is_bounded_by_the_parameters(name):
    with torch.device("meta"):
        layer = WIDE[name]()
    own = [value for value in layer.parameters(recurse=False)]
    size = sum(value.numel() for value in own)
    # Factors, and their inverses.
    kept = 2 * sum(math.prod(shape) for shape in make_curvature(layer, size).statistics)
    assert kept <= 65 * size + 2**20


def test_factors_of_layers_in_use_are_full():
    for layer in (nn.Linear(1568, 64), nn.Linear(2048, 100), nn.Linear(511, 1), nn.Conv2d(256, 256, 3)):
        size = sum(value.numel() for value in layer.parameters())
        assert all(len(shape) == 2 for shape in make_curvature(layer, size).statistics)
