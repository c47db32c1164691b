"""Curvature of normalisation layers: the diagonal of the Fisher matrix, from per-sample gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional

from apts_mpi.curvature.layer import LayerBatch, Undivided, damped_reciprocal

InstanceNorm = nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d
Normalisation = (
    nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | InstanceNorm
)


class NormalisationDiagonal(Undivided):
    """Diagonal Fisher matrix of the scale and shift of a normalisation layer, from per-sample gradients.

    Parameters
    ----------
    module
        ``nn.LayerNorm``, ``nn.RMSNorm``, ``nn.GroupNorm``, or batch or instance normalisation.
    """

    kind = "NormalisationDiagonal"
    signed = False

    def __init__(self, module: Normalisation) -> None:
        self._module = module
        self._has_bias = getattr(module, "bias", None) is not None
        self._dimensions = _dimensions(module)

    @property
    def statistics(self) -> list[tuple[int, ...]]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        return [(sum(value.numel() for value in self._module.parameters()),)]

    def measure(self, batch: LayerBatch) -> list[torch.Tensor]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        return self.means(self.sums(batch), batch.samples)

    def sums(self, batch: LayerBatch) -> list[Any]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        total = torch.cat([torch.zeros_like(value).flatten() for value in self._module.parameters()])
        for record in batch.reached:
            inputs, gradient = (batched(part, self._dimensions) for part in (record.inputs, record.gradient))
            of_weight, of_bias = gradient * self._normalise(inputs), gradient
            parts = [of_weight, of_bias] if self._has_bias else [of_weight]
            total += torch.cat([self._per_sample(part).square().sum(dim=0) for part in parts])
        return [total]

    def means(self, sums: Sequence[Any], samples: int) -> list[torch.Tensor]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        return [sums[0] * samples]

    def _normalise(self, inputs: torch.Tensor) -> torch.Tensor:
        """What the scale is multiplied by."""
        module = self._module
        if isinstance(module, nn.LayerNorm):
            return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.RMSNorm):
            return functional.rms_norm(inputs, module.normalized_shape, eps=module.eps)
        if isinstance(module, nn.GroupNorm):
            return functional.group_norm(inputs, module.num_groups, eps=module.eps)
        of_inputs = module.training or module.running_mean is None
        mean, variance = (None, None) if of_inputs else (module.running_mean, module.running_var)
        if isinstance(module, InstanceNorm):
            return functional.instance_norm(inputs, mean, variance, use_input_stats=of_inputs, eps=module.eps)
        return functional.batch_norm(inputs, mean, variance, training=of_inputs, eps=module.eps)

    def _per_sample(self, products: torch.Tensor) -> torch.Tensor:
        """Sum over the positions of each sample, shape (samples, parameters)."""
        samples = len(products)
        if isinstance(self._module, nn.LayerNorm | nn.RMSNorm):
            return products.reshape(samples, -1, self._module.weight.numel()).sum(dim=1)
        return products.reshape(samples, products.shape[1], -1).sum(dim=2)

    def refresh(self, statistics: Sequence[torch.Tensor], damping: float) -> None:
        """See `apts_mpi.curvature.layer.Curvature`."""
        self._inverse = damped_reciprocal(statistics[0], damping)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `apts_mpi.curvature.layer.Curvature`."""
        return -gradient * self._inverse


def batched(tensor: torch.Tensor, dimensions: int) -> torch.Tensor:
    """With a first dimension, if it is that of a sample that came alone."""
    return tensor[None] if tensor.dim() < dimensions else tensor


def _dimensions(module: Normalisation) -> int:
    """Least number of dimensions of several samples."""
    if isinstance(module, InstanceNorm):
        return 3 + get_args(InstanceNorm).index(type(module))
    return 1 + module.weight.dim()
