"""How the functions of layers take tangents along; see `apts_mpi.curvature.closed_forms`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from apts_mpi.curvature.carrying import Carrying, columns_of, only_first, plain, united, value_of


def linear(function: Any, given: Any, weight: Any, bias: Any = None) -> Tensor:
    """A product for all tangents of the inputs and one for each of the weights, into the tensor where they add up."""
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


def convolution(function: Any, given: Any, weight: Any, bias: Any = None, *args: Any, **named: Any) -> Tensor:
    """One convolution for all tangents of the inputs, and one for all of the weights."""
    plain(*args, *named.values())
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


def embedding(
    function: Any,
    tokens: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a matrix."""
    plain(tokens)
    if max_norm is not None:
        raise NotImplementedError("weights that change")
    return Carrying(weight.value[tokens], weight.tangents[:, tokens], weight.columns)


def dropout(function: Any, given: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """The same mask for all."""
    inputs = only_first(given)
    if not training or p == 0.0:
        return inputs
    mask = function(torch.ones_like(inputs.value), p, True)
    return Carrying(inputs.value * mask, inputs.tangents * mask, inputs.columns)


def max_pool(dimensions: int) -> Callable[..., Tensor]:
    """A form that takes tangents from the places of the largest."""

    def form(function: Any, given: Any, *args: Any, return_indices: bool = False, **named: Any) -> Tensor:
        inputs = only_first(given, *args, *named.values())
        if return_indices or inputs.dim() != dimensions + 2:
            raise NotImplementedError("indices, or one sample")
        value, places = function(inputs.value, *args, return_indices=True, **named)
        places = places.flatten(-dimensions).expand(len(inputs.columns), *places.shape[:2], -1)
        moved = inputs.tangents.flatten(-dimensions).gather(-1, places)
        return Carrying(value, moved.view(-1, *value.shape), inputs.columns)

    return form


def softmax(function: Any, given: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    """Softmax along a dimension."""
    inputs = only_first(given)
    if dim is None or dtype is not None:
        raise NotImplementedError("softmax along some dimension, or in another dtype")
    value, along = function(inputs.value, dim=dim), dim - inputs.dim() if dim >= 0 else dim
    weighted = inputs.tangents * value
    return Carrying(value, weighted - value * weighted.sum(along, keepdim=True), inputs.columns)


def _normal(given: Any, dimensions: list[int], eps: float, centred: bool = True) -> Any:
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


def layer_norm(
    function: Any, given: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """Layer normalisation."""
    return _scaled(_normal(given, [*range(-len(normalized_shape), 0)], eps), weight, bias)


def rms_norm(
    function: Any, given: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Tensor:
    """Normalisation by the mean square."""
    eps = torch.finfo(given.dtype).eps if eps is None else eps
    return _scaled(_normal(given, [*range(-len(normalized_shape), 0)], eps, centred=False), weight, None)


def group_norm(
    function: Any, given: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """Normalisation of groups of channels."""
    normal = _normal(given.reshape(len(given), num_groups, -1), [-1], eps).reshape(given.shape)
    return _scaled(normal, *(_of_channels(part, given) for part in (weight, bias)))


def batch_norm(
    function: Any,
    given: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    training: bool,
    eps: float,
    **named: Any,
) -> Tensor:
    """By the statistics of the batch, or by those that it has."""
    if not training:
        assert running_mean is not None and running_var is not None
        mean, scale = (_of_channels(part, given) for part in (running_mean, (running_var + eps).rsqrt()))
        normal = (given - mean) * scale
    elif running_mean is None:
        channels = 1 - given.dim()
        normal = _normal(given, [place for place in range(-given.dim(), 0) if place != channels], eps)
    else:
        raise NotImplementedError("running statistics, which would move")
    return _scaled(normal, *(_of_channels(named[name], given) for name in ("weight", "bias")))


def _of_channels(values: Any, given: Any) -> Any:
    """Numbers of each channel, to be broadcast over samples and places."""
    return None if values is None else values.reshape(-1, *[1] * (given.dim() - 2))


def attention(
    function: Any, query: Any, key: Any, value: Any, *, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    """Scaled products, without masks of the user's, dropout or groups."""
    scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1) @ value
