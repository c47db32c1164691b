"""Tangents by closed forms against forward mode of `torch.func`."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from apts_mpi.curvature import closed_forms
from apts_mpi.curvature.carrying import CarriedSegments, Carrying, along

DTYPE = torch.float64
ELEMENTWISE = (
    "ReLU ReLU6 LeakyReLU ELU CELU SELU GELU SiLU Mish Sigmoid Tanh Softplus Softsign LogSigmoid Hardtanh Hardsigmoid "
    "Hardswish Hardshrink Softshrink Tanhshrink"
)


def images(*shape):
    return lambda: torch.randn(*shape, dtype=DTYPE)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function(inputs)


class Residual(nn.Module):
    """A layer that is called twice, and weights that two layers share."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs)) * self.scale
        return (1.0 - self.first(hidden) / (2.0 + self.scale.square())) @ self.last.weight + inputs - 0.5 * hidden


class Attention(nn.Module):
    def __init__(self, attend):
        super().__init__()
        self.attend, self.positions = attend, nn.Embedding(9, 6)
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, tokens):
        tokens = tokens + self.positions.weight[: tokens.shape[1]]
        parts = (layer(tokens).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        return self.attend(*parts).transpose(1, 2).flatten(2)


def causal(query, key, value):
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(dim=-1) @ value


def fused(query, key, value):
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def trained(module):
    """A normalisation with statistics that are not those of its inputs."""
    module.running_mean.normal_()
    module.running_var.uniform_(0.5, 2.0)
    return module


SEGMENTS = {
    **{name: (getattr(nn, name), images(5, 6)) for name in ELEMENTWISE.split()},
    "tanh gelu": (lambda: nn.GELU("tanh"), images(5, 6)),
    "threshold": (lambda: nn.Threshold(0.1, 3.0), images(5, 6)),
    "linear": (lambda: nn.Linear(6, 4), images(5, 6)),
    "no bias": (lambda: nn.Linear(6, 4, bias=False), images(5, 6)),
    "tokens": (lambda: nn.Linear(6, 4), images(5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), images(5, 3, 8)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1, dilation=2), images(5, 3, 8, 8)),
    "same": (lambda: nn.Conv2d(3, 4, (3, 1), padding="same", bias=False), images(5, 3, 8, 8)),
    "circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), images(5, 3, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), images(5, 2, 4, 4, 4)),
    "identity": (nn.Identity, images(5, 6)),
    "flatten": (nn.Flatten, images(5, 3, 4)),
    "flatten samples": (lambda: nn.Flatten(0, -2), images(5, 3, 4)),
    "unflatten": (lambda: nn.Unflatten(1, (2, 3)), images(5, 6)),
    "dropout": (lambda: nn.Dropout(0.4), images(5, 6)),
    "dropout2d": (lambda: nn.Dropout2d(0.4), images(5, 6, 3, 3)),
    "no dropout": (lambda: nn.Dropout(0.4).eval(), images(5, 6)),
    "average pool": (lambda: nn.AvgPool2d(3, 2, padding=1), images(5, 3, 8, 8)),
    "average": (lambda: nn.AdaptiveAvgPool2d(2), images(5, 3, 8, 8)),
    "average pool1d": (lambda: nn.AvgPool1d(2), images(5, 3, 8)),
    "max pool1d": (lambda: nn.MaxPool1d(3, 2), images(5, 3, 8)),
    "max pool": (lambda: nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), images(5, 3, 8, 8)),
    "max pool3d": (lambda: nn.MaxPool3d(2), images(5, 3, 4, 4, 4)),
    "maximum": (lambda: nn.AdaptiveMaxPool2d(2), images(5, 3, 8, 8)),
    "zero pad": (lambda: nn.ZeroPad2d(1), images(5, 3, 4, 4)),
    "constant pad": (lambda: nn.ConstantPad1d(1, 2.0), images(5, 3, 4)),
    "reflection pad": (lambda: nn.ReflectionPad1d(2), images(5, 3, 4)),
    "upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), images(5, 3, 4, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), images(5, 3, 6)),
    "layer norm of images": (lambda: nn.LayerNorm((3, 6), eps=0.1), images(5, 3, 6)),
    "plain layer norm": (lambda: nn.LayerNorm(6, elementwise_affine=False), images(5, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), images(5, 3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), images(5, 6, 3, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(6, track_running_stats=False), images(5, 6)),
    "batch norm of images": (lambda: nn.BatchNorm2d(3, track_running_stats=False), images(5, 3, 4, 4)),
    "batch norm of one place": (lambda: nn.BatchNorm1d(3, track_running_stats=False), images(5, 3, 4)),
    "trained batch norm": (lambda: trained(nn.BatchNorm2d(3)).eval(), images(5, 3, 4, 4)),
    "plain batch norm": (lambda: trained(nn.BatchNorm1d(6, affine=False)).eval(), images(5, 6)),
    "softmax": (lambda: nn.Softmax(1), images(5, 6)),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=0), lambda: torch.randint(0, 7, (5, 3))),
    "residual": (Residual, images(5, 6)),
    "attention": (lambda: Attention(causal), images(5, 4, 6)),
    "fused attention": (lambda: Attention(fused), images(5, 4, 6)),
    "slices": (lambda: Function(lambda x: torch.cat([x[:, 1:], x[..., :1] * x.exp().mean(1, True)], 1)), images(5, 6)),
    "stacks": (lambda: Function(lambda x: torch.stack([x.T, 2.0 / (x * x + 1.0).T], -1).sum(0)), images(5, 6)),
    "chunks": (lambda: Function(lambda x: (lambda a, b: a.sigmoid() * b)(*x.chunk(2, dim=-1))), images(5, 6)),
    "constants": (lambda: Function(lambda x: x + torch.arange(6.0).double() - 2 * x**3 + (-x)), images(5, 6)),
}


def carried(module, inputs, columns):
    """What a module returns, where column 0 moves its inputs, 1 its parameters, 2 both; and these directions."""
    values = {name: value.detach() for name, value in module.named_parameters()}
    of_inputs = [number for number in columns if number != 1] if inputs.is_floating_point() else []
    of_parameters = [number for number in columns if number != 0] if values else []
    given = (
        Carrying(inputs, torch.randn(len(of_inputs), *inputs.shape, dtype=inputs.dtype), tuple(of_inputs))
        if of_inputs
        else inputs
    )
    parameters = {
        name: Carrying(value, torch.randn(len(of_parameters), *value.shape, dtype=value.dtype), tuple(of_parameters))
        for name, value in values.items()
        if of_parameters
    }
    return given, parameters


def tangent_of(module, given, parameters, number):
    """By forward mode, with the random numbers of seed 1."""
    names = list(parameters)
    inputs = given.value if isinstance(given, Carrying) else given
    moving = isinstance(given, Carrying)

    def outputs(*values):
        return functional_call(
            module, dict(zip(names, values[moving:], strict=True)), (values[0] if moving else inputs,)
        )

    variables = [*([given] if moving else []), *parameters.values()]
    torch.manual_seed(1)
    points, directions = [v.value for v in variables], [along(v, (number,))[0] for v in variables]
    with sdpa_kernel(SDPBackend.MATH):
        return jvp(outputs, tuple(points), tuple(directions))


@pytest.mark.parametrize("columns", [(0,), (1,), (0, 1), (2, 1, 0), (0, 2)], ids=str)
@pytest.mark.parametrize("name", SEGMENTS)
def test_closed_forms_are_the_derivatives(name, columns):
    torch.manual_seed(0)
    make, draw = SEGMENTS[name]
    module, inputs = make().double(), draw()
    given, parameters = carried(module, inputs, columns)
    if not isinstance(given, Carrying) and not parameters:
        pytest.skip("nothing moves")
    torch.manual_seed(1)
    with torch.no_grad():
        outputs = CarriedSegments().run(0, module, given, parameters)
    assert outputs is not None  # all of it has closed forms
    for number in columns:
        value, tangent = tangent_of(module, given, parameters, number)
        torch.testing.assert_close(outputs.value, value, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(along(outputs, (number,))[0], tangent, rtol=1e-11, atol=1e-12)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs):
        return inputs * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Hidden(nn.Linear):
    """A backward pass of its own, behind a weight that is zero at first."""

    def forward(self, inputs):
        return super().forward(inputs) + 0.0 * Reversed.apply(inputs)


@pytest.mark.parametrize(
    "module",
    [
        Function(Reversed.apply),
        Hidden(6, 6),
        Function(lambda x: x.cumsum(1)),
        Function(lambda x: x + x.detach()),
        Function(lambda x: x + torch.rand_like(x)),
        Function(lambda x: torch.func.vmap(torch.sin)(x)),
        Function(lambda x: x.mul(2.0).relu_()),
        nn.Conv1d(6, 6, 1, groups=2),
        nn.BatchNorm1d(6),
    ],
    ids=["reversed", "hidden", "cumsum", "detach", "noise", "vmap", "in place", "groups", "running statistics"],
)
def test_what_has_no_closed_form_is_left_with_the_random_numbers_it_was_given(module):
    shape = (5, 6, 3) if isinstance(module, nn.Conv1d) else (5, 6)
    given, parameters = carried(module.double(), torch.randn(*shape, dtype=DTYPE), (0, 1))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    segments = CarriedSegments()
    with torch.no_grad():
        assert segments.run(0, module, given, parameters) is None
        assert torch.equal(torch.get_rng_state(), before)
        assert segments.run(0, nn.Identity(), given, {}) is None  # not tried again


def test_a_form_that_is_not_the_derivative_is_not_used(monkeypatch):
    def wrong(function, given):
        return Carrying(given.value.tanh(), given.tangents, given.columns)

    for function in (torch.tanh, torch.Tensor.tanh):
        monkeypatch.setitem(closed_forms.FORMS, function, wrong)
    given, _ = carried(nn.Tanh(), torch.randn(5, 6, dtype=DTYPE), (0,))
    with torch.no_grad():
        assert CarriedSegments().run(0, nn.Tanh(), given, {}) is None


def test_values_that_are_not_finite_do_not_decide():
    segments = CarriedSegments()
    for inputs, expected in ((torch.full((5, 6), math.nan), type(None)), (torch.randn(5, 6), Carrying)):
        given, _ = carried(nn.Tanh(), inputs.double(), (0,))
        with torch.no_grad():
            assert isinstance(segments.run(0, nn.Tanh(), given, {}), expected)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.LayerNorm(6), Residual])
def test_in_single_precision(make):
    torch.manual_seed(0)
    module = make()
    given, parameters = carried(module, torch.randn(5, 6), (0, 2))
    with torch.no_grad():
        outputs = CarriedSegments().run(0, module, given, parameters)
    assert outputs.tangents.dtype == torch.float32
    _, tangent = tangent_of(module, given, parameters, 2)
    torch.testing.assert_close(along(outputs, (2,))[0], tangent, rtol=1e-4, atol=1e-4)
