"""The two norms of the ball, and the balls of subdomains. No communication."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch

NormKind = Literal["2", "inf"]

Dots = Callable[..., tuple[float, ...]]


def norm(vector: torch.Tensor, kind: NormKind) -> torch.Tensor:
    """Norm of a flat vector, shape (), without waiting for the device."""
    return torch.linalg.vector_norm(vector, ord=2.0 if kind == "2" else torch.inf)


def clip_to_ball(vector: torch.Tensor, radius: float | torch.Tensor, kind: NormKind) -> None:
    """Scale ``vector`` in place so that its norm is at most ``radius``."""
    vector.mul_((radius / norm(vector, kind)).clamp(max=1.0).nan_to_num(nan=1.0))


def dots(*pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, ...]:
    """Inner products of pairs of flat vectors; waits for the device once."""
    return tuple(torch.stack([torch.dot(left, right) for left, right in pairs]).tolist())


def steepest_descent(gradient: torch.Tensor, radius: float | torch.Tensor, kind: NormKind) -> torch.Tensor:
    """Minimiser of ``gradient . step`` in the ball of ``radius``, shape (n,); zero for a zero gradient."""
    if kind == "inf":
        return gradient.sign().mul_(-radius)
    length = norm(gradient, "2")
    return gradient * (-radius / torch.where(length > 0.0, length, torch.ones_like(length)))


def subdomain_radius(radius: float, subdomains: int, kind: NormKind) -> float:
    """Radius of each subdomain's ball such that their steps sum to one within ``radius``.

    In the maximum norm blocks within ``radius`` sum to one within it; in the 2-norm N orthogonal blocks of length
    r sum to one of length sqrt(N) r.
    """
    return radius if kind == "inf" else radius / math.sqrt(subdomains)


def euclidean_radius(radius: float, size: int, kind: NormKind) -> float:
    """Radius of the smallest 2-norm ball in R^size that holds the ball of ``radius``."""
    return radius if kind == "2" else radius * math.sqrt(size)
