"""Derivatives along directions from differences of values, where torch has no others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from apts_mpi.network.activations import Bundle, differentiable
from apts_mpi.tools.environment import random_state, set_random_state


def by_differences(
    run: Callable[[Sequence[torch.Tensor]], Bundle],
    point: Sequence[torch.Tensor],
    tangents: Sequence[torch.Tensor],
) -> tuple[Bundle, tuple[torch.Tensor, ...]]:
    """What ``run`` returns at a point, and its tangents along those of the point: of central differences.

    Their error is about the epsilon of the dtype to the power 2/3, relative to the values: of coarse curvature, which
    is damped by a tenth, nothing to be seen.

    Parameters
    ----------
    run
        Function of tensors, which may draw random numbers: the same at each call.
    point
        Its arguments.
    tangents
        For each argument, shape (columns, ...).

    Returns
    -------
    outputs : Tensor or tuple of Tensor
    tangents : tuple of Tensor
        Of each differentiable output, shape (columns, ...).
    """
    device = point[0].device
    before = random_state(device)
    outputs = run(point)
    after = random_state(device)
    found = []
    for directions in zip(*tangents, strict=True):
        length = _length(point, directions)
        ends = []
        for sign in (1.0, -1.0):
            set_random_state(before, device)
            moved = [value + sign * length * direction for value, direction in zip(point, directions, strict=True)]
            ends.append(differentiable(run(moved)))
        found.append([(forth - back) / (2.0 * length) for forth, back in zip(*ends, strict=True)])
    set_random_state(after, device)
    return outputs, tuple(torch.stack(parts) for parts in zip(*found, strict=True))


def check_close(derivatives: torch.Tensor, differences: torch.Tensor) -> None:
    """Raise `RuntimeError` unless derivatives are what differences are: a backward pass of a user's may hide some."""
    tolerance = torch.finfo(derivatives.dtype).eps ** (1.0 / 3.0)
    scale = max(float(derivatives.norm()), float(differences.norm()))
    if float((derivatives - differences).norm()) > tolerance * scale:
        raise RuntimeError("a backward pass of the user's cannot be differentiated")


def _length(point: Sequence[torch.Tensor], directions: Sequence[torch.Tensor]) -> float:
    """How far to go along directions: the cube root of epsilon, relative to the tensor that moves most."""
    shares = [
        float(value.norm()) / float(direction.norm())
        for value, direction in zip(point, directions, strict=True)
        if bool(direction.any()) and bool(value.any())
    ]
    unit = max((float(direction.norm()) for direction in directions), default=0.0)
    step = min(shares, default=1.0 / unit if unit > 0.0 else 1.0)
    return torch.finfo(point[0].dtype).eps ** (1.0 / 3.0) * step
