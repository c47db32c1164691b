"""K-FAC of all kinds of layers and calls, against what is formed one sample at a time."""

import warnings

import pytest
import torch
from mpi4py import MPI
from networks import CLASSES, FEATURES, classified, cross_entropy, make_solver
from staged_networks import staged
from test_kfac import batch_of, inverse_of, kfac
from torch import nn
from torch.func import jacrev
from torch.nn.utils import parametrizations

from apts_mpi import APTS, APTSOptions, LocalOptions, StagedAPTS
from apts_mpi.curvature.kinds import (
    AttentionFactors,
    EmbeddingFactors,
    KroneckerFactors,
    NormalisationDiagonal,
    make_curvature,
)
from apts_mpi.curvature.signed import SignedFactors
from apts_mpi.network.recorder import LayerRecorder

SAMPLES = 5


def size_of(layer):
    return sum(parameter.numel() for parameter in layer.parameters())


def behind(outputs):
    """A loss of each sample alone, with another gradient at every output."""
    weights = torch.linspace(-1.0, 1.5, outputs[0].numel(), dtype=outputs.dtype).view(outputs.shape[1:])
    return (outputs + weights).square().mul(weights).flatten(1).sum(dim=1).sin()


def recorded(layer, inputs, call=None):
    """The layer's record in the gradient of the mean loss, and its parameters' gradient."""
    recorder = LayerRecorder([layer])
    with recorder.recording() as records:
        outputs = (call or layer)(inputs)
    layer.zero_grad()
    (3.0 * behind(outputs).mean()).backward()
    for record in records:
        record.complete(3.0)
    return records, torch.cat([parameter.grad.flatten() for parameter in layer.parameters()]) / 3.0


def measured(layer, inputs, call=None):
    records, gradient = recorded(layer, inputs, call)
    curvature = make_curvature(layer, size_of(layer))
    return curvature.measure(batch_of(records, gradient, len(inputs)))


def output_gradients(layer, inputs, between=lambda outputs: outputs):
    """Of each sample's own loss with respect to what the layer returns, one sample at a time."""
    found = []
    for sample in inputs:
        outputs = layer(sample[None]).detach().requires_grad_()
        found.append(*torch.autograd.grad(behind(between(outputs)).sum(), outputs))
    return torch.cat(found)


def parameter_gradients(layer, inputs):
    """Of each sample's own loss with respect to the layer's parameters, one sample at a time."""
    return torch.stack(
        [
            torch.cat([part.flatten() for part in torch.autograd.grad(behind(layer(sample[None])).sum(), parameters)])
            for parameters in [list(layer.parameters())]
            for sample in inputs
        ]
    )


CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 3, 3), (2, 7)),
    "1d strided": (nn.Conv1d(2, 3, 2, stride=3, padding=1, dilation=2), (2, 7)),
    "same": (nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)), (2, 5, 6)),
    "valid": (nn.Conv2d(2, 3, 3, padding="valid", bias=False), (2, 5, 4)),
    "two paddings": (nn.Conv2d(2, 3, 3, padding=(2, 0), stride=(1, 2)), (2, 5, 6)),
    "circular": (nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 5)),
    "reflected": (nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"), (2, 6)),
    "3d": (nn.Conv3d(2, 3, (2, 3, 2), padding=(0, 1, 2), dilation=(1, 2, 1)), (2, 3, 5, 4)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    """The inputs of an output's weights are its derivatives by them."""
    torch.manual_seed(0)
    layer, shape = CONVOLUTIONS[name]
    layer.double()
    inputs = torch.randn(SAMPLES, *shape, dtype=torch.float64)
    activations, outputs = measured(layer, inputs)

    def first_channel(weight, bias):
        parameters = {"weight": weight} | ({} if bias is None else {"bias": bias})
        return torch.func.functional_call(layer, parameters, (inputs,))[:, 0].flatten()

    by_weight = jacrev(first_channel, argnums=0)(layer.weight.detach(), layer.bias)
    rows = by_weight[:, 0].flatten(1)
    assert not by_weight[:, 1:].any()
    if layer.bias is not None:
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(activations, rows.T @ rows / SAMPLES, rtol=1e-12, atol=1e-13)

    gradients = output_gradients(layer, inputs).flatten(2).movedim(1, 2).flatten(0, 1)
    assert len(gradients) == len(rows)
    torch.testing.assert_close(outputs, gradients.T @ gradients / len(rows), rtol=1e-11, atol=1e-13)


NORMALISATIONS = {
    "group": (nn.GroupNorm(2, 4), (4, 3, 2)),
    "group of channels": (nn.GroupNorm(2, 4), (4,)),
    "layer": (nn.LayerNorm([3, 2]), (4, 3, 2)),
    "layer without bias": (nn.LayerNorm(2, bias=False), (4, 3, 2)),
    "root mean square": (nn.RMSNorm([3, 2], eps=1e-3), (4, 3, 2)),
    "root mean square, eps of the type": (nn.RMSNorm(6), (6,)),
    "batch 3d": (nn.BatchNorm3d(3).eval(), (3, 2, 2, 4)),
    "instance 1d": (nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "instance 2d": (nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (3, 5, 2)),
    "instance 2d, inference": (nn.InstanceNorm2d(3, affine=True, track_running_stats=True).eval(), (3, 5, 2)),
    "instance 3d": (nn.InstanceNorm3d(3, affine=True), (3, 5, 2, 2)),
}


@pytest.mark.parametrize("name", NORMALISATIONS)
def test_normalisations(name):
    torch.manual_seed(0)
    layer, shape = NORMALISATIONS[name]
    layer.double()
    for value in [*layer.parameters(), *(buffer for name, buffer in layer.named_buffers() if "running" in name)]:
        value.data.uniform_(0.5, 1.5)
    inputs = torch.randn(SAMPLES, *shape, dtype=torch.float64)
    before = [buffer.clone() for buffer in layer.buffers()] if not layer.training else []
    (diagonal,) = measured(layer, inputs)
    assert all(map(torch.equal, before, layer.buffers()))
    samples = parameter_gradients(layer, inputs)
    torch.testing.assert_close(diagonal, samples.square().mean(dim=0), rtol=1e-11, atol=1e-14)


def test_padding_of_an_embedding_has_no_part_in_it():
    torch.manual_seed(0)
    layer = nn.Embedding(6, 3, padding_idx=2).double()
    tokens = torch.tensor([[0, 2, 5], [2, 2, 2], [4, 4, 2], [0, 1, 3], [5, 2, 0]])
    counts, outputs = measured(layer, tokens)
    gradients = output_gradients(layer, tokens)
    places = [(sample, place) for sample in range(5) for place in range(3) if tokens[sample, place] != 2]
    expected = sum(torch.outer(gradients[at], gradients[at]) for at in places) / len(places)
    torch.testing.assert_close(outputs, expected, rtol=1e-12, atol=1e-14)
    assert (5 * counts).tolist() == [3.0, 1.0, 0.0, 1.0, 2.0, 2.0]
    records, gradient = recorded(layer, tokens)
    curvature = make_curvature(layer, size_of(layer))
    curvature.refresh(curvature.measure(batch_of(records, gradient, 5)), 1e-2)
    assert not curvature.direction(gradient).view(6, 3)[2].any()
    left = torch.diag(counts + 0.1 * counts.mean())
    right = outputs + 0.1 * outputs.trace() / 3 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(
        inverse_of(curvature, 18), torch.linalg.inv(torch.kron(left, right)), rtol=1e-9, atol=1e-11
    )


def test_only_padding():
    layer = nn.Embedding(6, 3, padding_idx=2).double()
    assert not any(statistic.any() for statistic in measured(layer, torch.full((4, 2), 2)))


LAYERS = {
    "rows": (lambda: nn.Linear(4, 3), (4,)),
    "tokens": (lambda: nn.Linear(4, 3), (2, 4)),  # a view of rows
    "tokens without bias": (lambda: nn.Linear(4, 3, bias=False), (2, 4)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
    "instances": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 7)),  # a view of one sample of all channels
    "groups": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "embedding": (lambda: nn.Embedding(9, 3), None),
}


def layer_and_inputs(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    inputs = torch.arange(8).view(4, 2) if shape is None else torch.randn(4, *shape, dtype=torch.float64)
    return make().double(), inputs


def bent(outputs):
    return nn.functional.leaky_relu(outputs * 2.0, 0.3)


def bent_in_place(outputs):
    return nn.functional.leaky_relu_(outputs.mul_(2.0), 0.3)


@pytest.mark.parametrize("name", LAYERS)
def test_what_happens_to_the_outputs_in_place_is_not_the_layers(name):
    layer, inputs = layer_and_inputs(name)
    ((record,), _) = recorded(layer, inputs, lambda inputs: bent_in_place(layer(inputs)))
    expected = output_gradients(layer, inputs, bent) / 4
    torch.testing.assert_close(record.gradient, expected, rtol=1e-12, atol=1e-14)
    assert record.gradient.shape == layer(inputs).shape


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_used_before_and_after_they_change(name):
    layer, inputs = layer_and_inputs(name)

    def both(outputs):
        return outputs * 0.7 + bent(outputs.clone())

    def both_in_place(outputs):
        return outputs * 0.7 + bent_in_place(outputs)

    ((record,), _) = recorded(layer, inputs, lambda inputs: both_in_place(layer(inputs)))
    torch.testing.assert_close(record.gradient, output_gradients(layer, inputs, both) / 4, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_hooks_that_change_the_outputs_are_not_the_layers(name):
    layer, inputs = layer_and_inputs(name)
    expected = output_gradients(layer, inputs, bent) / 4
    layer.register_forward_hook(lambda module, given, outputs: bent(outputs))
    ((record,), _) = recorded(layer, inputs)
    torch.testing.assert_close(record.gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["rows", "convolution", "instances", "groups", "embedding"])
def test_samples_one_by_one_or_by_keyword_are_the_same(name):
    layer, inputs = layer_and_inputs(name)
    together = measured(layer, inputs)
    calls = [lambda inputs: layer(input=inputs)]
    if name != "groups":  # needs a dimension of samples
        calls.append(lambda inputs: torch.stack([layer(sample) for sample in inputs]))
    for call in calls:
        for statistic, expected in zip(measured(layer, inputs, call), together, strict=True):
            torch.testing.assert_close(statistic, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_calls_that_the_loss_does_not_depend_on(name):
    layer, inputs = layer_and_inputs(name)
    once = measured(layer, inputs)

    def twice(inputs):
        layer(inputs)
        return layer(inputs)

    for statistic, expected in zip(measured(layer, inputs, twice), once, strict=True):
        torch.testing.assert_close(statistic, expected, rtol=0.0, atol=0.0)
    curvature = make_curvature(layer, size_of(layer))
    none = curvature.measure(batch_of([], torch.zeros(size_of(layer), dtype=torch.float64), 4))
    assert [statistic.shape for statistic in none] == [statistic.shape for statistic in once]
    assert not any(statistic.any() for statistic in none)


def test_derivatives_that_the_network_takes_are_not_recorded():
    layer, inputs = layer_and_inputs("rows")

    def with_derivative(inputs):
        outputs = layer(inputs)
        torch.autograd.grad(outputs.sum(), layer.weight, retain_graph=True)
        torch.func.vmap(torch.func.grad(lambda sample: layer(sample).sum()))(inputs)
        return outputs.detach() + layer.weight.sum(dim=1) + layer.bias

    ((record,), _) = recorded(layer, inputs, with_derivative)
    assert record.gradient is None


@pytest.mark.parametrize(
    ("layer", "given"),
    [(nn.Bilinear(4, 4, 3), [(5, 4), (5, 4)]), (nn.GRU(4, 3), [(5, 4)]), (nn.MultiheadAttention(4, 2), 3 * [(5, 4)])],
    ids=lambda value: type(value).__name__,
)
def test_calls_with_or_of_several_tensors_are_not_recorded(layer, given):
    recorder = LayerRecorder([layer])
    with recorder.recording() as records:
        layer(*(torch.randn(shape) for shape in given))
    assert not records


class Bent(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs).sin()


def normed(wrap):
    """The layer with its weight parametrised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return wrap(nn.Linear(3, 2))


def with_forward(layer):
    layer.forward = lambda inputs: inputs
    return layer


def with_one_bias(layer):
    layer.bias = nn.Parameter(torch.zeros(1))
    return layer


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv1d(2, 4, 3), KroneckerFactors),
        (nn.Conv2d(2, 4, 3, padding="same"), KroneckerFactors),
        (nn.Embedding(5, 2, padding_idx=0), EmbeddingFactors),
        (nn.RMSNorm(4), NormalisationDiagonal),
        (Bent(3, 2), SignedFactors),
        (normed(nn.utils.weight_norm), SignedFactors),
        (normed(nn.utils.spectral_norm), SignedFactors),
        (normed(parametrizations.weight_norm), SignedFactors),
        (with_forward(nn.Linear(3, 3)), SignedFactors),
        (with_one_bias(nn.Linear(3, 4)), SignedFactors),
        (nn.Embedding(5, 2, scale_grad_by_freq=True), SignedFactors),
        (nn.ConvTranspose2d(2, 3, 3), SignedFactors),
        (nn.Conv1d(2, 4, 3, groups=2), SignedFactors),
        (nn.Bilinear(2, 2, 2), SignedFactors),
        (nn.EmbeddingBag(5, 2), SignedFactors),
        (nn.SyncBatchNorm(3), SignedFactors),
        (nn.MultiheadAttention(4, 2), AttentionFactors),
        (nn.MultiheadAttention(4, 2, bias=False), AttentionFactors),
        (nn.MultiheadAttention(4, 2).out_proj, KroneckerFactors),
        (nn.MultiheadAttention(4, 2, kdim=3), SignedFactors),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), SignedFactors),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value.__name__,
)
def test_kinds(layer, kind):
    own = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    assert type(make_curvature(layer, own)) is kind


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 8)

    def forward(self, inputs):
        return self.linear(input=inputs)


class Attended(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)

    def forward(self, inputs):
        return inputs + self.attention(inputs, inputs, inputs)[0]


class Crossed(Attended):
    def forward(self, inputs):
        others = inputs.sin()
        return inputs + self.attention(inputs, others, others)[0]


class Spelled(nn.Module):
    """What `Attended` computes, with a layer for each product."""

    def __init__(self, attended):
        super().__init__()
        own, bias = attended.attention, attended.attention.in_proj_bias is not None
        self.projection, self.last = nn.Linear(8, 24, bias=bias), nn.Linear(8, 8, bias=bias)
        values = [own.in_proj_weight, own.in_proj_bias, own.out_proj.weight, own.out_proj.bias]
        for parameter, value in zip(self.parameters(), filter(lambda v: v is not None, values), strict=True):
            parameter.data = value.detach().clone()

    def forward(self, inputs):
        query, key, value = self.projection(inputs).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        attended = (query @ key.transpose(-1, -2) / 2.0).softmax(dim=-1) @ value
        return inputs + self.last(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [True, False])
def test_attention_equals_its_products_spelled_out(bias):
    torch.manual_seed(0)
    attended = Attended(bias).double()
    for parameter in attended.parameters():
        parameter.data.normal_()
    spelled = Spelled(attended).double()
    inputs = torch.randn(SAMPLES, 3, 8, dtype=torch.float64)
    linear = nn.functional.linear
    own = attended.attention
    for layer, other in [(own, spelled.projection), (own.out_proj, spelled.last)]:
        found = []
        for network, module in [(attended, layer), (spelled, other)]:
            records, _ = recorded(module, inputs, network)
            assert len(records) == 1
            curvature = make_curvature(module, sum(p.numel() for p in module.parameters(recurse=False)))
            gradient = torch.cat([p.grad.flatten() / 3.0 for p in module.parameters(recurse=False)])
            statistics = curvature.measure(batch_of(records, gradient, SAMPLES))
            curvature.refresh(statistics, 1e-2)
            found.append([gradient, *statistics, curvature.direction(gradient)])
        for value, expected in zip(*found, strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    assert nn.functional.linear is linear


def test_products_are_seen_no_more_after_an_error():
    linear = nn.functional.linear
    recorder = LayerRecorder([Attended().attention])
    with pytest.raises(ZeroDivisionError), recorder.recording():
        raise ZeroDivisionError
    assert nn.functional.linear is linear


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells = kind(8, 8, batch_first=True)

    def forward(self, inputs):
        return self.cells(inputs)[0]


class Slope(nn.Module):
    """Derivatives of what a layer makes of each token."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, inputs):
        of_token = torch.func.grad(lambda token: self.linear(token).sin().sum())
        return torch.func.vmap(torch.func.vmap(of_token))(inputs)


MIDDLES = {
    "attention": (Attended, {AttentionFactors, KroneckerFactors}),
    "attention to others": (Crossed, {SignedFactors, KroneckerFactors}),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True),
        {AttentionFactors, KroneckerFactors, NormalisationDiagonal},
    ),
    "lstm": (lambda: Recurrent(nn.LSTM), {SignedFactors}),
    "gru": (lambda: Recurrent(nn.GRU), {SignedFactors}),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), {SignedFactors}),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), {SignedFactors}),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(8, 8)), {SignedFactors}),
    "old weight norm": (lambda: nn.utils.weight_norm(nn.Linear(8, 8)), {SignedFactors}),
    "derivatives": (Slope, {SignedFactors}),
    "subclass": (lambda: Bent(8, 8), {SignedFactors}),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", MIDDLES)
def test_networks_of_layers_of_other_kinds_are_trained(name):
    torch.manual_seed(0)
    make, kinds = MIDDLES[name]
    network = nn.Sequential(nn.Unflatten(1, (5, 2)), ByKeyword(), make(), nn.Flatten(), nn.Linear(40, CLASSES)).double()
    solver = make_solver(MPI.COMM_SELF, kfac(subdomains=1), network)
    results = [solver.step(classified()) for _ in range(4)]
    assert results[-1].schwarz.loss < results[0].schwarz.loss
    first, *middle, last = (type(curvature) for curvature, _, _ in solver.holding.schwarz.solvers[0].layers)
    assert first is last is KroneckerFactors
    if kinds:
        assert set(middle) == kinds


class Block(nn.Module):
    """A layer and an activation function, in place or not."""

    def __init__(self, activation):
        super().__init__()
        self.linear, self.activation = nn.Linear(10, 10), activation

    def forward(self, inputs):
        return self.activation(self.linear(inputs))


def blocks(activation, count):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(activation) for _ in range(count)), nn.Linear(FEATURES, CLASSES))


def test_in_place_under_autocast():
    """Equal to the last bit: the same operations."""

    def values(activation):
        options = APTSOptions(autocast="bfloat16", local=LocalOptions(solver="kfac"), subdomains=3)
        solver = APTS(blocks(activation, 3).float(), cross_entropy, comm=MPI.COMM_SELF, options=options)
        inputs, targets = classified()
        for _ in range(3):
            solver.step((inputs.float(), targets))
        statistics = [
            mean for local in solver.holding.schwarz.solvers.values() for means in local.statistics for mean in means
        ]
        assert {mean.dtype for mean in statistics} == {torch.float32}
        return solver.holding.objective.vector.values, statistics

    torch.testing.assert_close(values(bent_in_place), values(bent), rtol=0.0, atol=0.0)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_in_place_in_stages_with_micro_batches(world):
    def values(activation):
        options = staged(APTSOptions(), solver="kfac", micro_batches=3)
        network = blocks(activation, world.size).double()
        solver = StagedAPTS(network, cross_entropy, comm=world, options=options)
        for _ in range(3):
            solver.step(classified())
        kinds = {type(layer[0]) for local in solver.holding.schwarz.solvers.values() for layer in local.layers}
        assert kinds == {KroneckerFactors}
        return solver.holding.objective.vector.values

    torch.testing.assert_close(values(bent_in_place), values(bent), rtol=0.0, atol=0.0)
