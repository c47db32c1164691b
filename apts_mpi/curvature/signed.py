"""Curvature of layers of unknown kind, from gradients in which every sample has a random sign."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from apts_mpi.curvature.dense import gram
from apts_mpi.curvature.layer import TINY, LayerBatch, Undivided, damped_factor, damped_reciprocal

# Signs that are drawn an update. With one instead of four, recurrent layers ended at twice the loss.
DRAWS = 4

# Sides of a matrix whose factor is full: up to this size, and to so many times the other side, of which an update sees
# that many vectors a draw. Others have a diagonal.
LARGEST_FACTOR, LONGEST_SIDE = 2048, 16


class SignedFactors(Undivided):
    """Factors of the Fisher matrix of each parameter of a layer.

    With independent random signs s_i the square of ``Z = sum_i s_i Z_i``, over the gradients Z_i of the samples, has
    the mean ``sum_i Z_i Z_i^T``: what mixes samples cancels. As a matrix Z gives two factors, ``L = E[Z Z^T]`` and
    ``R = E[Z^T Z]`` of ``L (x) R / tr L``, which for one sample of a linear layer are those of K-FAC; as a vector it
    gives the diagonal.

    Parameters
    ----------
    shapes
        Of the parameters, in their order.

    Attributes
    ----------
    shapes : list of tuple of int
        Of the matrices and vectors that they are taken for.
    """

    kind = "SignedFactors"
    signed = True

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = [(shape[0], shape[1:].numel()) if len(shape) > 1 else tuple(shape) for shape in shapes]

    @property
    def statistics(self) -> list[tuple[int, ...]]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        found: list[tuple[int, ...]] = []
        for shape in self.shapes:
            if len(shape) == 2:
                found += [(side,) if _is_long(side, other) else (side, side) for side, other in (shape, shape[::-1])]
            else:
                found.append(shape)
        return found

    def measure(self, batch: LayerBatch) -> list[torch.Tensor]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        draws = torch.stack(list(batch.signed))
        scale = batch.team_samples / len(draws)
        statistics = []
        for part, shape in zip(self._split(draws), self.shapes, strict=True):
            if len(shape) == 2:
                matrices = part.unflatten(1, shape)
                statistics += [_second_moment(matrices.transpose(1, 2)), _second_moment(matrices)]
            else:
                statistics.append(part.square().sum(dim=0))
        return [statistic * scale for statistic in statistics]

    def sums(self, batch: LayerBatch) -> list[Any]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        return self.measure(batch)

    def means(self, sums: Sequence[Any], samples: int) -> list[torch.Tensor]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        return list(sums)

    def _split(self, vectors: torch.Tensor) -> Sequence[torch.Tensor]:
        return vectors.split([math.prod(shape) for shape in self.shapes], dim=-1)

    def refresh(self, statistics: Sequence[torch.Tensor], damping: float) -> None:
        """See `apts_mpi.curvature.layer.Curvature`."""
        given = iter(statistics)
        self._inverses: list[tuple[torch.Tensor, ...]] = []
        for shape in self.shapes:
            if len(shape) == 2:
                left, right = next(given), next(given)
                # Each of the factors gets half of the scale, and of the damping.
                root = _trace(left).clamp_min(TINY).sqrt()
                self._inverses.append(tuple(damped_factor(part / root, damping**0.5) for part in (left, right)))
            else:
                self._inverses.append((damped_reciprocal(next(given), damping),))

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `apts_mpi.curvature.layer.Curvature`."""
        solved = []
        for part, shape, inverses in zip(self._split(gradient), self.shapes, self._inverses, strict=True):
            if len(shape) == 2:
                left, right = inverses
                solved.append(_times(right, _times(left, part.view(shape)).T).T.flatten())
            else:
                solved.append(inverses[0] * part)
        return -torch.cat(solved)


def signed_factors(module: nn.Module, size: int) -> SignedFactors:
    """`SignedFactors` of a layer of which ``size`` parameters are trained."""
    shapes = [value.shape for value in module.parameters(recurse=False) if value.requires_grad and value.numel()]
    # A tensor that it shares with a layer before belongs to that one.
    if sum(shape.numel() for shape in shapes) != size:
        shapes = [torch.Size([size])]
    return SignedFactors(shapes)


def _second_moment(matrices: torch.Tensor) -> torch.Tensor:
    """Sum of ``M^T M`` over matrices, shape (draws, rows, columns); its diagonal where no more can be known."""
    _, rows, columns = matrices.shape
    if _is_long(columns, rows):
        return matrices.square().sum(dim=(0, 1))
    return gram(matrices.reshape(-1, columns))


def _is_long(side: int, other: int) -> bool:
    """Whether a side of a matrix is too long for a full factor."""
    return side > min(LARGEST_FACTOR, LONGEST_SIDE * other)


def _trace(factor: torch.Tensor) -> torch.Tensor:
    return factor.trace() if factor.dim() == 2 else factor.sum()


def _times(factor: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return factor @ matrix if factor.dim() == 2 else factor[:, None] * matrix
