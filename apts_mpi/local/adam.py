"""Directions of Adam (arXiv 1412.6980), from moments that others keep."""

from __future__ import annotations

import torch

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def adam_direction(first: torch.Tensor, second: torch.Tensor, count: int, gradient: torch.Tensor) -> torch.Tensor:
    """Adam's direction uphill, by moments that move in place with this gradient, the one of number ``count``."""
    # A gradient that is not finite leads to a rejected step; it must not stay in the moments.
    gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    first.lerp_(gradient, 1.0 - BETA1)
    second.mul_(BETA2).addcmul_(gradient, gradient, value=1.0 - BETA2)
    scale = (1.0 - BETA2**count) ** 0.5
    return first.div(second.sqrt().div_(scale).add_(EPSILON))
