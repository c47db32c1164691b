"""Derivatives transposed: reverse mode alone, which every operation has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import BackwardCFunction

from apts_mpi.network.activations import Bundle, detached, differentiable


def transposed(
    values: Sequence[torch.Tensor],
    variables: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    create_graph: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The transposed derivative of ``values`` times ``weights``; zero where there is nothing to differentiate."""
    reached = [pair for pair in zip(values, weights, strict=True) if pair[0].requires_grad]
    if not reached:
        return tuple(torch.zeros_like(variable) for variable in variables)
    values, weights = zip(*reached, strict=True)
    return torch.autograd.grad(
        values, variables, weights, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )


def by_transposes(
    run: Callable[[Sequence[torch.Tensor]], Bundle],
    point: Sequence[torch.Tensor],
    tangents: Sequence[torch.Tensor],
) -> tuple[Bundle, tuple[torch.Tensor, ...]]:
    """What ``run`` returns at a point, and its tangents along those of the point.

    They are the derivative of ``v -> J^T v``, transposed: reverse mode alone, which every operation has.

    Parameters
    ----------
    run
        Function of tensors.
    point
        Its arguments.
    tangents
        For each argument, shape (columns, ...).

    Returns
    -------
    outputs : Tensor or tuple of Tensor
    tangents : tuple of Tensor
        Of each differentiable output, shape (columns, ...).

    Raises
    ------
    RuntimeError
        Where a backward pass of the user's has no derivative.
    """
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in point]
        outputs = run(leaves)
        moving = [tensor for tensor in differentiable(outputs) if tensor.requires_grad]
        of_users = has_functions_of_users(moving)
        weights = [waves_like(tensor) if of_users else torch.zeros_like(tensor) for tensor in moving]
        weights = [weight.requires_grad_() for weight in weights]
        pulled = torch.autograd.grad(moving, leaves, weights, create_graph=True, allow_unused=True) if moving else ()
        pairs = [(part, tangent) for part, tangent in zip(pulled, tangents, strict=False) if part is not None]
        found = _times_tangents([pair for pair in pairs if pair[0].requires_grad], weights, len(tangents[0]))
    if of_users:
        sizes = [math.hypot(*(float(tensor.norm()) for tensor in tensors)) for tensors in (moving, leaves)]
        scale = sizes[0] / max(sizes[1], torch.finfo(torch.float64).tiny)
        _compare_with_transposes(pairs, list(zip(weights, found, strict=True)), tangents, scale)
    moved = iter(found)
    return detached(outputs), tuple(
        next(moved) if tensor.requires_grad else tensor.new_zeros(len(tangents[0]), *tensor.shape)
        for tensor in differentiable(outputs)
    )


def waves_like(tensor: torch.Tensor) -> torch.Tensor:
    """Numbers between -1 and 1 that nothing sums up to zero by design."""
    places = torch.arange(1, tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return places.square().sin().view(tensor.shape)


def has_functions_of_users(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether ``torch.autograd.Function`` has a part in the graph of tensors: all of torch's own have derivatives."""
    waiting = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:  # None: of a tensor that the outputs are
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction) or type(node).__name__ == "CppFunction":
            return True
        waiting += [before for before, _ in node.next_functions]
    return False


def _compare_with_transposes(
    pulled: Sequence[tuple[torch.Tensor, torch.Tensor]],
    moved: Sequence[tuple[torch.Tensor, torch.Tensor]],
    tangents: Sequence[torch.Tensor],
    scale: float,
) -> None:
    """Raise unless ``<J^T v, t> = <v, J t>`` up to rounding, for pairs of J^T v and t, and of v and J t.

    A backward pass that is not made of torch's operations (``once_differentiable``) has no derivative, of which
    autograd says nothing: tangents would be zero. ``scale`` is a size of J that does not vanish with it.
    """
    products, bounds = [], []
    for pairs in (pulled, moved):
        each = [(part.detach().double(), tangent.double()) for part, tangent in pairs]
        products.append(sum(float((part * tangent).sum()) for part, tangent in each))
        bounds.append(sum(float(part.norm() * tangent.norm()) for part, tangent in each))
    weights, along = ([float(part.norm()) for part in parts] for parts in ([part for part, _ in moved], tangents))
    bounds.append(math.hypot(*weights) * math.hypot(*along) * scale)
    tolerance = max((torch.finfo(part.dtype).eps ** 0.5 for part, _ in moved), default=0.0)
    if abs(products[0] - products[1]) > tolerance * max(bounds):
        raise RuntimeError("a backward pass of the network's cannot be differentiated")


def _times_tangents(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], weights: Sequence[torch.Tensor], columns: int
) -> list[torch.Tensor]:
    """Derivatives by ``weights`` of what was pulled back with them, times the tangents; zero where there is none."""
    found: Sequence[torch.Tensor | None] = [None] * len(weights)
    if pairs:
        parts, tangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(parts, weights, tangents, is_grads_batched=True, allow_unused=True)
    return [
        weight.new_zeros(columns, *weight.shape) if part is None else part
        for part, weight in zip(found, weights, strict=True)
    ]
