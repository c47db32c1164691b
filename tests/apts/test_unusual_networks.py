"""Networks whose modules do more than compute their outputs: hooks, dropout within, statistics, work in place."""

import copy
from dataclasses import replace

import pytest
import torch
from mpi4py import MPI
from networks import CLASSES, FEATURES, classified, cross_entropy, flat
from torch import nn

from apts_mpi import (
    APTS,
    APTSOptions,
    CoarseOptions,
    GlobalStepOptions,
    InvalidInput,
    LocalOptions,
    SchwarzOptions,
    TrustRegionOptions,
)
from apts_mpi.curvature.linearisation import Column, Linearisation
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.objective.mean_loss import MeanLoss
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Pass
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.environment import seed_stream
from apts_mpi.tools.events import Events


class BentLinear(nn.Linear):
    def forward(self, inputs):
        return torch.tanh(super().forward(inputs))


class ResidualDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, inputs):
        return inputs + self.dropout(torch.tanh(self.linear(inputs)))


class RunningMean(nn.Module):
    """Subtracts a mean that follows the batches."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, inputs):
        self.mean.mul_(0.9).add_(0.1 * inputs.detach().mean(0))
        return inputs - self.mean


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, inputs):
        tokens = self.linear(inputs.view(-1, 1, 5, 2))
        return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, is_causal=True).flatten(1)


class Step(nn.Module):
    """Without a derivative."""

    def forward(self, inputs):
        return (inputs > 0.0).to(inputs)


class Sine(torch.autograd.Function):
    """With neither forward mode nor a rule for `torch.func`."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.sin()

    @staticmethod
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        return gradient * inputs.cos()


class SineLinear(nn.Linear):
    def forward(self, inputs):
        return Sine.apply(super().forward(inputs))


class Slope(nn.Module):
    """Values, and their derivatives by the inputs as most programs compute them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1))

    def forward(self, inputs):
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            values = self.layers(inputs)
            (slope,) = torch.autograd.grad(values.sum(), inputs, create_graph=True)
            return torch.cat([values, slope], dim=1)


class BentInPlace(nn.Module):
    def forward(self, inputs):
        return inputs.relu_()


def bent_by_a_hook():
    linear = nn.Linear(FEATURES, 8)
    linear.register_forward_hook(lambda module, inputs, outputs: torch.tanh(outputs))
    return linear


def shifted_by_a_hook():
    linear = nn.Linear(FEATURES, 8)
    linear.register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))
    return linear


NETWORKS = {
    "subclass of a layer": lambda: [BentLinear(FEATURES, 8), nn.Linear(8, CLASSES)],
    "hook": lambda: [bent_by_a_hook(), nn.Linear(8, CLASSES)],
    "hook before": lambda: [shifted_by_a_hook(), nn.Linear(8, CLASSES)],
    "dropout in blocks": lambda: [
        nn.Linear(FEATURES, 8),
        ResidualDropout(),
        nn.Dropout(0.3),
        ResidualDropout(),
        nn.Linear(8, CLASSES),
    ],
    "instance normalisation": lambda: [
        nn.Unflatten(1, (2, 5)),
        nn.Conv1d(2, 4, 3),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    ],
    "fused attention": lambda: [Attention(), nn.Linear(40, CLASSES)],
    "custom function": lambda: [nn.Linear(FEATURES, 8), SineLinear(8, 8), SineLinear(8, CLASSES)],
    "autograd.grad within": lambda: [Slope(), nn.Linear(FEATURES + 1, CLASSES)],
    "step function": lambda: [nn.Linear(FEATURES, 8), Step(), nn.Linear(8, CLASSES)],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_reduced_matrix_equals_the_dense_one_in_one_pass(name):
    torch.manual_seed(0)
    network = nn.Sequential(*NETWORKS[name]()).double()
    inputs, targets = classified(9)
    before = copy.deepcopy(network.state_dict())
    expected_network = copy.deepcopy(network)
    vector, segmented = FlatParameters(network), SegmentedNetwork(network, None)
    size = vector.values.numel()
    columns = [Column(a, b, torch.randn(b - a, dtype=torch.float64)) for a, b in [(0, size), (5, 40), (30, size)]]
    dense = torch.zeros(size, len(columns), dtype=torch.float64)
    for number, column in enumerate(columns):
        dense[column.start : column.stop, number] = column.values

    seed_stream(torch.device("cpu"), 7)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs = expected_network(inputs)
    parameters = list(expected_network.parameters())
    rows = [
        torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in outputs.flatten()
    ]
    product = torch.stack([flat(row) for row in rows]) @ dense
    hessian = torch.autograd.functional.hessian(
        lambda point: cross_entropy(point.view(outputs.shape), targets), outputs.detach().flatten()
    )
    segmented.measure(inputs)
    network.load_state_dict(before)
    objective = Objective(
        segmented=segmented,
        vector=vector,
        loss=MeanLoss(cross_entropy),
        inexact=False,
        keep_gradients=False,
        comm=Communicator(MPI.COMM_SELF, Events()),
    )
    found = Linearisation(objective).reduced(Pass(inputs, targets, 1.0, (7,), (), 0, 9), columns)
    # Both are sums of a few hundred float64 products.
    torch.testing.assert_close(found, product.T @ hessian @ product, rtol=1e-10, atol=1e-14)
    for tensor, saved in zip(network.state_dict().values(), before.values(), strict=True):
        assert torch.equal(tensor, saved)


def train(comm, network, steps=3, **options):
    solver = APTS(network, cross_entropy, comm=comm, options=APTSOptions(**options))
    results = [solver.step(classified()) for _ in range(steps)]
    return solver, results


@pytest.mark.mpi
@pytest.mark.parametrize("options", [{}, {"local": LocalOptions(solver="tr"), "subdomains": 2}], ids=["default", "tr"])
@pytest.mark.parametrize("bent", [nn.ReLU, nn.ELU, nn.Hardswish])
def test_modules_that_may_work_in_place_train_the_same(world, bent, options):
    def network(inplace):
        torch.manual_seed(0)
        layers = [bent(inplace=inplace), nn.Linear(FEATURES, 8), bent(inplace=inplace), nn.Linear(8, CLASSES)]
        return nn.Sequential(*layers).double()

    inputs = classified()[0].clone()
    vectors = [
        train(world, network(inplace), **options)[0].holding.objective.vector.values for inplace in (False, True)
    ]
    assert torch.equal(*vectors)
    assert torch.equal(classified()[0], inputs)


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (lambda: [BentInPlace(), nn.Linear(FEATURES, CLASSES)], "BentInPlace overwrites its inputs"),
        (lambda: [nn.Linear(FEATURES, 8), BentInPlace(), nn.Linear(8, CLASSES)], "BentInPlace overwrites"),
        (lambda: [nn.LazyLinear(8), nn.Linear(8, CLASSES)], "call it once before"),
        (lambda: [torch.jit.script(nn.Linear(FEATURES, CLASSES))], "network: 0 is a module of torch.jit's"),
        (lambda: [nn.ReLU(), torch.jit.trace(nn.Linear(FEATURES, CLASSES), torch.ones(2, FEATURES))], "network: 1 is"),
    ],
    ids=["data", "activations", "lazy", "scripted", "traced"],
)
def test_networks_that_cannot_be_trained_are_refused_by_name(world, layers, words):
    with pytest.raises(InvalidInput, match=words):
        train(world, nn.Sequential(*layers()).double())


@pytest.mark.mpi
def test_an_embedding_that_changes_its_weights_is_refused(world):
    network = nn.Sequential(nn.Embedding(10, 4, max_norm=0.5), nn.Flatten(), nn.Linear(8, CLASSES))
    with pytest.raises(InvalidInput, match=r"network: 0 with max_norm=0.5"):
        APTS(network, cross_entropy, comm=world)


@pytest.mark.mpi
def test_the_coarse_level_moves_no_buffers(world):
    """On a share of the samples some ranks linearise nothing: what the others moved would set the ranks apart."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(FEATURES, 8), RunningMean(), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    plain = copy.deepcopy(network)
    _, results = train(world, network, steps=1, coarse=CoarseOptions(samples=0.02))
    assert results[0].accepted
    # Buffers move by the change of the evaluation at the accepted point, over the whole batch.
    plain[0].load_state_dict(network[0].state_dict())
    plain(classified()[0])
    torch.testing.assert_close(network[1].mean, plain[1].mean, rtol=1e-12, atol=1e-14)


@pytest.mark.mpi
def test_what_cannot_be_differentiated_is_a_named_error(world):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs):
            return 2.0 * inputs

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return 2.0 * gradient

    class Module(nn.Linear):
        def forward(self, inputs):
            return Doubled.apply(super().forward(inputs))

    def network():
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), Module(8, CLASSES)).double()

    with pytest.raises(InvalidInput, match=r"coarse.model: 'gauss-newton' .* choose --coarse none"):
        train(world, network(), coarse=CoarseOptions(model="gauss-newton"))
    _, results = train(world, network(), coarse=CoarseOptions(model="none"), steps=1)
    assert results[0].accepted


class Opaque(Sine):
    """With a backward pass that autograd cannot see through."""

    @staticmethod
    def backward(ctx, gradient):
        with torch.no_grad():
            return Sine.backward(ctx, gradient)


class OpaqueHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)
        self.last.weight.data.zero_()

    def forward(self, inputs):
        return self.last(Opaque.apply(self.first(inputs)))


def test_a_backward_pass_without_derivative_shows_when_it_has_an_effect():
    """Behind weights that are zero at first nothing flows back."""
    with pytest.raises(InvalidInput, match=r"coarse.model: .*a backward pass .* cannot be differentiated"):
        asked = CoarseOptions(model="gauss-newton")
        train(MPI.COMM_SELF, nn.Sequential(OpaqueHead()).double(), steps=3, coarse=asked)
    _, results = train(MPI.COMM_SELF, nn.Sequential(OpaqueHead()).double(), steps=3)
    assert results[-1].accepted and any("differences" in note for result in results for note in result.notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("middle", [lambda: nn.Softmax(1), lambda: nn.LayerNorm(2, elementwise_affine=False)])
def test_derivatives_at_the_level_of_rounding_are_no_error(middle, dtype):
    """Of activations that are saturated, as those of inputs that are not scaled are."""
    for seed in range(12):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(FEATURES, 2), middle(), nn.Linear(2, CLASSES)).to(dtype)
        solver = APTS(network, cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions())
        inputs, targets = classified()
        assert solver.step((255.0 * inputs.abs().to(dtype), targets)).schwarz.predicted_reduction > 0.0


@pytest.mark.mpi
@pytest.mark.parametrize(
    "options",
    [{"local": LocalOptions(solver="steihaug")}, {"global_step": GlobalStepOptions(model="steihaug")}],
    ids=["local", "global"],
)
@pytest.mark.parametrize("product", ["gauss-newton", "hessian"])
def test_second_order_steps_without_second_derivatives(world, options, product):
    """Fused attention has other kernels that have them; torch's bags of embeddings have none at all."""
    options = {name: replace(group, product=product) for name, group in options.items()}
    plain = {"coarse": CoarseOptions(model="none"), "subdomains": 2}
    _, results = train(world, nn.Sequential(Attention(), nn.Linear(40, CLASSES)).double(), **plain, **options)
    assert results[-1].schwarz.loss < results[0].schwarz.loss

    bags = nn.Sequential(nn.EmbeddingBag(6, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double()
    solver = APTS(bags, cross_entropy, comm=world, options=APTSOptions(**plain, **options))
    inputs, targets = classified()
    with pytest.raises(InvalidInput, match=r"'steihaug' differentiates .*_embedding_bag_backward.*; choose others"):
        solver.step(((3.0 * inputs).long().clamp(0, 5), targets))


@pytest.mark.mpi
@pytest.mark.parametrize("norm", ["2", "scaled"])
@pytest.mark.parametrize("ball", ["2", "inf"])
@pytest.mark.parametrize(
    "loss",
    [
        nn.functional.l1_loss,
        lambda outputs, targets: (3.0 * (outputs - targets)).sin().mean(),
        lambda outputs, targets: (outputs * targets).mean(),
    ],
    ids=["without curvature", "not convex", "linear"],
)
def test_losses_of_no_or_negative_curvature_go_down_in_any_ball(world, loss, ball, norm):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    inputs = classified()[0]
    batch = inputs, inputs[:, :1].cos()
    options = APTSOptions(
        subdomains=2,
        schwarz=SchwarzOptions(variant="exact"),
        local=LocalOptions(solver="sgd"),
        coarse=CoarseOptions(norm=norm),
        trust_region=TrustRegionOptions(norm=ball, initial_radius=0.05),
    )
    solver = APTS(network, loss, comm=world, options=options)
    results = [solver.step(batch) for _ in range(6)]
    assert sum(result.accepted for result in results) >= 4
    assert all(result.schwarz.predicted_reduction > 0.0 for result in results)
    assert results[-1].schwarz.loss < results[0].schwarz.loss - 0.01
