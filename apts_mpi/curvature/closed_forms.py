"""How functions of torch take tangents along, by a formula each: cheaper than forward mode, which knows all of them.

Each is called in the place of a function of torch of which an argument is `Carrying`, with the function and its
arguments, and raises where it does not know what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from apts_mpi.curvature.carrying import FORMS, Carrying, along, columns_of, united, value_of


def _plain(*given: Any) -> None:
    """Raise if there are tangents among arguments that a form has none for."""
    for value in given:
        if isinstance(value, Carrying) or (isinstance(value, tuple | list) and any(map(_is_carrying, value))):
            raise NotImplementedError("tangents of another argument")


def _is_carrying(value: Any) -> bool:
    return isinstance(value, Carrying)


def _first(given: Any, *others: Any) -> Carrying:
    """The first argument, which alone may have tangents."""
    _plain(*others)
    if not isinstance(given, Carrying):
        raise NotImplementedError("tangents of another argument")
    return given


def _fact(function: Any, given: Any, *args: Any, **named: Any) -> Any:
    """What has no derivative: shapes and the like."""
    return function(value_of(given), *args, **named)


def _elementwise(function: Any, given: Any, *args: Any, **named: Any) -> Tensor:
    """The derivative at each element, computed once for all columns."""
    inputs = _first(given, *args, *named.values())
    with torch.enable_grad():
        point = inputs.value.detach().requires_grad_()
        value = function(point, *args, **named)
    (slope,) = torch.autograd.grad(value, point, torch.ones_like(value))
    return Carrying(value.detach(), inputs.tangents * slope, inputs.columns)


def _relu(function: Any, given: Any, inplace: bool = False) -> Tensor:
    inputs = _first(given)
    value = torch.relu(inputs.value)
    return Carrying(value, torch.ops.aten.threshold_backward(inputs.tangents, value, 0.0), inputs.columns)


def _linear_map(function: Any, given: Any, *args: Any, **named: Any) -> Any:
    """A function linear in its first argument: that of each tangent."""
    inputs = _first(given, *args, *named.values())

    def apply(tensor: Tensor) -> Any:
        return function(tensor, *args, **named)

    value, tangents = apply(inputs.value), torch.func.vmap(apply)(inputs.tangents)
    if isinstance(value, Tensor):
        return Carrying(value, tangents, inputs.columns)
    return tuple(Carrying(part, moved, inputs.columns) for part, moved in zip(value, tangents, strict=True))


def _of_images(function: Any, given: Any, *args: Any, **named: Any) -> Tensor:
    """A function linear in images, of samples of any number: that of all tangents as samples."""
    inputs = _first(given, *args, *named.values())
    moved = function(inputs.tangents.flatten(0, 1), *args, **named)
    return Carrying(
        function(inputs.value, *args, **named), moved.unflatten(0, inputs.tangents.shape[:2]), inputs.columns
    )


def _getitem(function: Any, given: Any, index: Any) -> Any:
    _plain(*(index if isinstance(index, tuple) else (index,)))
    return _linear_map(lambda tensor: tensor[index], given)


def _pad(function: Any, given: Any, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    inputs = _first(given)
    moved = torch.func.vmap(lambda tensor: functional.pad(tensor, pad, mode))(inputs.tangents)
    return Carrying(functional.pad(inputs.value, pad, mode, value), moved, inputs.columns)


def _masked_fill(function: Any, given: Any, mask: Tensor, value: float) -> Tensor:
    inputs = _first(given, mask, value)
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


def _linear(function: Any, given: Any, weight: Any, bias: Any = None) -> Tensor:
    """A product for all tangents of the inputs, and one for each of the weights, into the tensor that they add up in."""
    columns = columns_of((given, weight, bias))
    inputs, weights = value_of(given), value_of(weight)
    value = functional.linear(inputs, weights, value_of(bias))
    tangents = value.new_empty(len(columns), *value.shape)
    rows = tangents.view(len(columns), -1, len(weights))
    carried = len(given.columns) if isinstance(given, Carrying) else 0
    if isinstance(given, Carrying):
        moved = given.tangents.reshape(-1, inputs.shape[-1])
        torch.mm(moved, weights.T, out=rows[:carried].view(-1, len(weights)))
    rows[carried:].zero_()
    if isinstance(weight, Carrying):
        flat = inputs.reshape(-1, inputs.shape[-1])
        for number, direction in zip(weight.columns, weight.tangents, strict=True):
            rows[columns.index(number)].addmm_(flat, direction.T)
    if isinstance(bias, Carrying):
        for number, direction in zip(bias.columns, bias.tangents, strict=True):
            rows[columns.index(number)] += direction
    return Carrying(value, tangents, columns)


def _convolution(function: Any, given: Any, weight: Any, bias: Any = None, *args: Any, **named: Any) -> Tensor:
    """One convolution for all tangents of the inputs, and one for all of the weights."""
    _plain(*args, *named.values())
    inputs, weights = value_of(given), value_of(weight)
    if inputs.dim() != weights.dim() or named.get("groups", args[3] if len(args) > 3 else 1) != 1:
        raise NotImplementedError("convolutions of one sample, or in groups")
    value = function(inputs, weights, value_of(bias), *args, **named)
    parts = []
    if isinstance(given, Carrying):
        moved = function(given.tangents.flatten(0, 1), weights, None, *args, **named)
        parts.append((moved.unflatten(0, given.tangents.shape[:2]), given.columns))
    together = isinstance(weight, Carrying) and isinstance(bias, Carrying) and weight.columns == bias.columns
    if isinstance(weight, Carrying):
        shifts = bias.tangents.flatten() if together else None
        moved = function(inputs, weight.tangents.flatten(0, 1), shifts, *args, **named)
        parts.append((moved.unflatten(1, weight.tangents.shape[:2]).transpose(0, 1), weight.columns))
    if isinstance(bias, Carrying) and not together:
        shape = len(bias.columns), 1, -1, *[1] * (value.dim() - 2)
        parts.append((bias.tangents.view(shape).expand(-1, *value.shape), bias.columns))
    return united(value, parts)


def _embedding(
    function: Any,
    tokens: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    _plain(tokens)
    if max_norm is not None:
        raise NotImplementedError("weights that change")
    return Carrying(weight.value[tokens], weight.tangents[:, tokens], weight.columns)


def _dropout(function: Any, given: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    inputs = _first(given)
    if not training or p == 0.0:
        return inputs
    mask = function(torch.ones_like(inputs.value), p, True)
    return Carrying(inputs.value * mask, inputs.tangents * mask, inputs.columns)


def _max_pool(dimensions: int) -> Callable[..., Tensor]:
    def form(function: Any, given: Any, *args: Any, return_indices: bool = False, **named: Any) -> Tensor:
        inputs = _first(given, *args, *named.values())
        if return_indices or inputs.dim() != dimensions + 2:
            raise NotImplementedError("indices, or one sample")
        value, places = function(inputs.value, *args, return_indices=True, **named)
        places = places.flatten(-dimensions).expand(len(inputs.columns), *places.shape[:2], -1)
        moved = inputs.tangents.flatten(-dimensions).gather(-1, places)
        return Carrying(value, moved.view(-1, *value.shape), inputs.columns)

    return form


def _softmax(function: Any, given: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    inputs = _first(given)
    if dim is None or dtype is not None:
        raise NotImplementedError("softmax along some dimension, or in another dtype")
    value, along = function(inputs.value, dim=dim), dim - inputs.dim() if dim >= 0 else dim
    weighted = inputs.tangents * value
    return Carrying(value, weighted - value * weighted.sum(along, keepdim=True), inputs.columns)


def _normal(given: Any, dimensions: Sequence[int], eps: float, centred: bool = True) -> Any:
    """Of mean zero, if ``centred``, and mean square one along dimensions, which are counted from the last."""
    value = value_of(given)
    if centred:
        value = value - value.mean(dimensions, keepdim=True)
    scale = (value.square().mean(dimensions, keepdim=True) + eps).rsqrt()
    value = value * scale
    if not isinstance(given, Carrying):
        return value
    tangents = given.tangents
    along = (tangents * value).mean(dimensions, keepdim=True)
    if centred:
        tangents = tangents - tangents.mean(dimensions, keepdim=True)
    return Carrying(value, torch.addcmul(tangents, value, along, value=-1.0).mul_(scale), given.columns)


def _scaled(normal: Any, weight: Any, bias: Any) -> Any:
    if weight is not None:
        normal = normal * weight
    return normal if bias is None else normal + bias


def _layer_norm(
    function: Any, given: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    return _scaled(_normal(given, [*range(-len(normalized_shape), 0)], eps), weight, bias)


def _rms_norm(
    function: Any, given: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Tensor:
    eps = torch.finfo(given.dtype).eps if eps is None else eps
    return _scaled(_normal(given, [*range(-len(normalized_shape), 0)], eps, centred=False), weight, None)


def _group_norm(
    function: Any, given: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    normal = _normal(given.reshape(len(given), num_groups, -1), [-1], eps).reshape(given.shape)
    return _scaled(normal, *(_of_channels(part, given) for part in (weight, bias)))


def _batch_norm(
    function: Any,
    given: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not training:
        assert running_mean is not None and running_var is not None
        mean, scale = (_of_channels(part, given) for part in (running_mean, (running_var + eps).rsqrt()))
        normal = (given - mean) * scale
    elif running_mean is None:
        channels = 1 - given.dim()
        normal = _normal(given, [place for place in range(-given.dim(), 0) if place != channels], eps)
    else:
        raise NotImplementedError("running statistics, which would move")
    return _scaled(normal, *(_of_channels(part, given) for part in (weight, bias)))


def _of_channels(values: Any, given: Any) -> Any:
    """Numbers of each channel, to be broadcast over samples and places."""
    return None if values is None else values.reshape(-1, *[1] * (given.dim() - 2))


def _attention(
    function: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None or dropout_p or enable_gqa:
        raise NotImplementedError("attention with a mask, dropout or groups")
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1) @ value


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
            "flatten unflatten reshape view transpose swapaxes permute movedim squeeze unsqueeze contiguous clone chunk "
            "split unbind sum mean neg expand",
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
        (_linear, "linear"),
        (_convolution, "conv1d conv2d conv3d"),
        (_embedding, "embedding"),
        (_dropout, "dropout dropout1d dropout2d dropout3d"),
        (_max_pool(1), "max_pool1d adaptive_max_pool1d"),
        (_max_pool(2), "max_pool2d adaptive_max_pool2d"),
        (_max_pool(3), "max_pool3d adaptive_max_pool3d"),
        (_softmax, "softmax"),
        (_layer_norm, "layer_norm"),
        (_rms_norm, "rms_norm"),
        (_group_norm, "group_norm"),
        (_batch_norm, "batch_norm"),
        (_attention, "scaled_dot_product_attention"),
        (_masked_fill, "masked_fill"),
        (_pad, "pad"),
    ]
    table = {function: form for form, names in by_names for function in _named(names)}
    facts = (Tensor.shape, Tensor.dtype, Tensor.device, Tensor.ndim, Tensor.is_cuda, Tensor.layout)
    table |= {fact.__get__: _fact for fact in facts}  # type: ignore[attr-defined]
    table |= {place.__get__: _linear_map for place in (Tensor.T, Tensor.mT)}  # type: ignore[attr-defined]
    # In the place of the method of all objects.
    return table | {Tensor.__getitem__: _getitem}


FORMS.update(_table())
