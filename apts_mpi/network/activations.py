"""What flows between modules: a tensor, or a tree of tensors of any dtype and of what else a module returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apts_mpi.tools.trees import Tree, map_tensors, tensors_of

# The samples that enter a network, what one of its modules gives to the next, and what it returns.
Bundle = Tree


def differentiable(bundle: Bundle) -> tuple[torch.Tensor, ...]:
    """Those of its tensors that can have a gradient."""
    return tuple(tensor for tensor in tensors_of(bundle) if _is_differentiable(tensor))


def _is_differentiable(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def with_differentiable(bundle: Bundle, parts: Sequence[torch.Tensor]) -> Bundle:
    """The bundle with ``parts`` in the places of its differentiable tensors."""
    given = iter(parts)
    return map_tensors(lambda tensor: next(given) if _is_differentiable(tensor) else tensor, bundle)


def with_tensors(bundle: Bundle, tensors: Sequence[torch.Tensor]) -> Bundle:
    """The bundle with ``tensors`` in the places of its own."""
    given = iter(tensors)
    return map_tensors(lambda _: next(given), bundle)


def at_point(bundle: Bundle) -> tuple[Bundle, tuple[torch.Tensor, ...]]:
    """The same values as variables, and those of them that one can differentiate by."""
    made = map_tensors(lambda tensor: tensor.detach().requires_grad_(_is_differentiable(tensor)), bundle)
    return made, differentiable(made)


def with_tangents(bundle: Bundle, tangents: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """A bundle and the tangents of its differentiable tensors as one tuple, see `without_tangents`."""
    return (*tensors_of(bundle), *tangents)


def without_tangents(joined: Bundle, is_tuple: bool) -> tuple[Bundle, tuple[torch.Tensor, ...]]:
    """The bundle, which is a tuple or one tensor, and the tangents of which `with_tangents` has made ``joined``."""
    tensors = tensors_of(joined)
    counts = range(1, len(tensors) + 1)
    count = next(count for count in counts if count + len(differentiable(tensors[:count])) == len(tensors))
    return tensors[:count] if is_tuple else tensors[0], tensors[count:]


def detached(bundle: Bundle) -> Bundle:
    """The same values without a graph."""
    return map_tensors(torch.Tensor.detach, bundle)


def gradient_of(bundle: Bundle) -> Bundle:
    """Gradients of the differentiable tensors, in a tuple unless the bundle is one tensor; zero where there is none."""
    gradients = tuple(torch.zeros_like(part) if part.grad is None else part.grad for part in differentiable(bundle))
    return gradients[0] if isinstance(bundle, torch.Tensor) else gradients


def inner_product(bundle: Bundle, others: Bundle, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Sum of the products of the differentiable tensors, shape (), summed in ``dtype``."""
    pairs = zip(differentiable(bundle), tensors_of(others), strict=True)
    return torch.stack([(_real(tensor) * _real(other)).sum(dtype=dtype) for tensor, other in pairs]).sum()


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


@dataclass(frozen=True)
class Stored:
    """A bundle whose floating-point tensors are kept in another dtype.

    Attributes
    ----------
    kept : tree of Tensor
        The values as they are kept.
    dtypes : tuple of torch.dtype
        What they are on `load`.
    """

    kept: Bundle
    dtypes: tuple[torch.dtype, ...]

    def load(self) -> Bundle:
        """The bundle in its own dtypes."""
        dtypes = iter(self.dtypes)
        return map_tensors(lambda tensor: tensor.to(next(dtypes)), self.kept)


def store(bundle: Bundle, dtype: torch.dtype | None) -> Stored:
    """Keep a bundle, its floating-point tensors in ``dtype``; None keeps them as they are, without a copy."""
    dtypes = tuple(tensor.dtype for tensor in tensors_of(bundle))
    if dtype is None:
        return Stored(bundle, dtypes)
    return Stored(
        map_tensors(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, bundle), dtypes
    )
