"""How functions of torch take tangents along, by a formula each: cheaper than forward mode, which knows all of them.

Each is called in the place of a function of torch of which an argument is `Carrying`, with the function and its
arguments, and raises where it does not know what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from apts_mpi.curvature import layer_forms
from apts_mpi.curvature.carrying import FORMS, Carrying, along, columns_of, only_first, plain, united, value_of


def _fact(function: Any, given: Any, *args: Any, **named: Any) -> Any:
    """What has no derivative: shapes and the like."""
    return function(value_of(given), *args, **named)


def _elementwise(function: Any, given: Any, *args: Any, **named: Any) -> Tensor:
    """The derivative at each element, computed once for all columns."""
    inputs = only_first(given, *args, *named.values())
    with torch.enable_grad():
        point = inputs.value.detach().requires_grad_()
        value = function(point, *args, **named)
    (slope,) = torch.autograd.grad(value, point, torch.ones_like(value))
    return Carrying(value.detach(), inputs.tangents * slope, inputs.columns)


def _relu(function: Any, given: Any, inplace: bool = False) -> Tensor:
    inputs = only_first(given)
    value = torch.relu(inputs.value)
    return Carrying(value, torch.ops.aten.threshold_backward(inputs.tangents, value, 0.0), inputs.columns)


def _linear_map(function: Any, given: Any, *args: Any, **named: Any) -> Any:
    """A function linear in its first argument: that of each tangent."""
    inputs = only_first(given, *args, *named.values())

    def apply(tensor: Tensor) -> Any:
        return function(tensor, *args, **named)

    value, tangents = apply(inputs.value), torch.func.vmap(apply)(inputs.tangents)
    if isinstance(value, Tensor):
        return Carrying(value, tangents, inputs.columns)
    return tuple(Carrying(part, moved, inputs.columns) for part, moved in zip(value, tangents, strict=True))


def _of_images(function: Any, given: Any, *args: Any, **named: Any) -> Tensor:
    """A function linear in images, of samples of any number: that of all tangents as samples."""
    inputs = only_first(given, *args, *named.values())
    moved = function(inputs.tangents.flatten(0, 1), *args, **named)
    return Carrying(
        function(inputs.value, *args, **named), moved.unflatten(0, inputs.tangents.shape[:2]), inputs.columns
    )


def _getitem(function: Any, given: Any, index: Any) -> Any:
    plain(*(index if isinstance(index, tuple) else (index,)))
    return _linear_map(lambda tensor: tensor[index], given)


def _pad(function: Any, given: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    inputs = only_first(given)
    moved = torch.func.vmap(lambda tensor: functional.pad(tensor, pad, mode))(inputs.tangents)
    return Carrying(functional.pad(inputs.value, pad, mode, value), moved, inputs.columns)


def _masked_fill(function: Any, given: Any, mask: Tensor, value: float) -> Tensor:
    inputs = only_first(given, mask, value)
    return Carrying(inputs.value.masked_fill(mask, value), inputs.tangents.masked_fill(mask, 0.0), inputs.columns)


def _aligned(tangents: Tensor, dimensions: int) -> Tensor:
    """Tangents (m, ...) of what is broadcast to so many dimensions."""
    return tangents.reshape(len(tangents), *[1] * (dimensions + 1 - tangents.dim()), *tangents.shape[1:])


def _weighted_sum(factors: tuple[float, float]) -> Callable[..., Tensor]:
    def form(function: Any, first: Any, second: Any, *, alpha: float = 1.0) -> Tensor:
        value = function(value_of(first), value_of(second), **({} if alpha == 1.0 else {"alpha": alpha}))
        parts = []
        for given, factor in zip((first, second), (factors[0], factors[1] * alpha), strict=True):
            if isinstance(given, Carrying):
                moved = given.tangents if factor == 1.0 else given.tangents * factor
                parts.append((_aligned(moved, value.dim()).expand(-1, *value.shape), given.columns))
        return united(value, parts)

    return form


def _product(function: Any, first: Any, second: Any) -> Tensor:
    value = function(value_of(first), value_of(second))
    return united(
        value,
        [
            (_aligned(given.tangents, value.dim()) * value_of(other), given.columns)
            for given, other in ((first, second), (second, first))
            if isinstance(given, Carrying)
        ],
    )


def _quotient(function: Any, first: Any, second: Any) -> Tensor:
    value = function(value_of(first), value_of(second))
    parts = []
    if isinstance(first, Carrying):
        parts.append((_aligned(first.tangents, value.dim()) / value_of(second), first.columns))
    if isinstance(second, Carrying):
        parts.append((_aligned(second.tangents, value.dim()) * (-value / second.value), second.columns))
    return united(value, parts)


def _matmul(function: Any, first: Any, second: Any) -> Tensor:
    left, right = value_of(first), value_of(second)
    if min(left.dim(), right.dim()) < 2:
        raise NotImplementedError("products with vectors")
    value = left @ right
    parts = []
    if isinstance(first, Carrying):
        parts.append((_aligned(first.tangents, value.dim()) @ right, first.columns))
    if isinstance(second, Carrying):
        parts.append((left @ _aligned(second.tangents, value.dim()), second.columns))
    return united(value, parts)


def _cat(function: Any, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    columns = columns_of(tensors)
    value = function([value_of(tensor) for tensor in tensors], dim)
    moved = [along(tensor, columns) for tensor in tensors]
    return Carrying(value, function(moved, dim + 1 if dim >= 0 else dim), columns)


def _named(names: str) -> list[Any]:
    """All functions and methods of torch of these names."""
    places = torch, Tensor, functional
    found = [getattr(place, name) for name in names.split() for place in places if hasattr(place, name)]
    return [function for function in found if callable(function)]


def _table() -> dict[Any, Callable[..., Any]]:
    by_names: list[tuple[Callable[..., Any], str]] = [
        (_fact, "size dim numel nelement stride is_contiguous is_floating_point is_complex __len__"),
        (_relu, "relu"),
        (
            _elementwise,
            "relu6 leaky_relu elu celu selu gelu silu mish sigmoid tanh softplus softsign logsigmoid hardtanh "
            "hardsigmoid hardswish hardshrink softshrink tanhshrink threshold exp log log1p expm1 sin cos sqrt rsqrt "
            "square abs erf reciprocal clamp pow __pow__ __rdiv__",
        ),
        (
            _linear_map,
            "flatten unflatten reshape view transpose swapaxes permute movedim squeeze unsqueeze contiguous clone "
            "chunk split unbind sum mean neg expand",
        ),
        (
            _of_images,
            "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d interpolate",
        ),
        (_weighted_sum((1.0, 1.0)), "add __add__ __radd__"),
        (_weighted_sum((1.0, -1.0)), "sub __sub__"),
        (_weighted_sum((-1.0, 1.0)), "__rsub__"),
        (_product, "mul __mul__ __rmul__"),
        (_quotient, "div true_divide __truediv__"),
        (_matmul, "matmul bmm __matmul__"),
        (_cat, "cat concat concatenate stack"),
        (layer_forms.linear, "linear"),
        (layer_forms.convolution, "conv1d conv2d conv3d"),
        (layer_forms.embedding, "embedding"),
        (layer_forms.dropout, "dropout dropout1d dropout2d dropout3d"),
        (layer_forms.max_pool(1), "max_pool1d adaptive_max_pool1d"),
        (layer_forms.max_pool(2), "max_pool2d adaptive_max_pool2d"),
        (layer_forms.max_pool(3), "max_pool3d adaptive_max_pool3d"),
        (layer_forms.softmax, "softmax"),
        (layer_forms.layer_norm, "layer_norm"),
        (layer_forms.rms_norm, "rms_norm"),
        (layer_forms.group_norm, "group_norm"),
        (layer_forms.batch_norm, "batch_norm"),
        (layer_forms.attention, "scaled_dot_product_attention"),
        (_masked_fill, "masked_fill"),
        (_pad, "pad"),
    ]
    table = {function: form for form, names in by_names for function in _named(names)}
    facts: Any = (Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim, Tensor.is_cuda, Tensor.layout)
    table |= {fact.__get__: _fact for fact in facts}
    table |= {place.__get__: _linear_map for place in (Tensor.T, Tensor.mT)}  # type: ignore[attr-defined]
    # In the place of the method of all objects.
    return table | {Tensor.__getitem__: _getitem}


FORMS.update(_table())
