"""Curvature of single layers from what flows through them: Kronecker factors (K-FAC) and diagonals.

Per layer the Fisher matrix is taken for A (x) G with A = E[a a^T] of the inputs and G = E[l l^T] of the per-sample
output gradients (Martens and Grosse, arXiv 1503.05671); convolutions sum A over positions (Grosse and Martens,
arXiv 1602.01407). The damping is split over the factors as in section 6.3 of the first, but relative to them: A + a
sqrt(gamma) I and G + g sqrt(gamma) I with a and g their mean eigenvalues. Relative, as G scales with the square of the
loss's scale, of the samples' positions, and falls with the loss: against it an absolute damping soon is everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from apts_mpi.dense import gram
from apts_mpi.recorder import LayerRecord


@dataclass
class LayerBatch:
    """What is known of a layer in one batch.

    Attributes
    ----------
    records : sequence of LayerRecord
        Calls of the layer on this rank's samples.
    samples : int
        Number of this rank's samples.
    gradient : Tensor, shape (size,)
        Gradient of the whole batch with respect to the layer's parameters.
    batch_size : int
        Number of samples of the whole batch.
    """

    records: Sequence[LayerRecord]
    samples: int
    gradient: torch.Tensor
    batch_size: int


class Curvature(Protocol):
    """Approximate curvature of one layer, a running mean of what `measure` returns."""

    def measure(self, batch: LayerBatch) -> list[torch.Tensor]:
        """Statistics of one batch."""

    def refresh(self, statistics: Sequence[torch.Tensor], damping: float) -> None:
        """Factorise the running means, damped."""

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Minus the inverse curvature times a gradient, both of shape (size,)."""


class KroneckerFactors:
    """K-FAC of a layer that multiplies its (unfolded) inputs by a weight matrix.

    Parameters
    ----------
    module
        ``nn.Linear`` or ``nn.Conv2d`` without groups.
    """

    def __init__(self, module: nn.Linear | nn.Conv2d) -> None:
        self._module = module
        self._rows = module.weight.shape[0]
        self._has_bias = module.bias is not None

    def measure(self, batch: LayerBatch) -> list[torch.Tensor]:
        """See `Curvature`."""
        inputs, outputs = [], []
        for record in batch.records:
            inputs.append(self._unfold(record.inputs))
            outputs.append(_rows_of_channels(record.gradient, self._module))
        activations, gradients = torch.cat(inputs), torch.cat(outputs)
        if self._has_bias:
            activations = functional.pad(activations, (0, 1), value=1.0)
        positions = len(activations) / batch.samples
        # Gradients of the mean loss carry 1/samples; E over samples of per-sample ones needs it back once.
        return [
            gram(activations) / batch.samples,
            gram(gradients) * (batch.samples / positions),
        ]

    def _unfold(self, inputs: torch.Tensor) -> torch.Tensor:
        module = self._module
        if isinstance(module, nn.Linear):
            return inputs.reshape(-1, inputs.shape[-1])
        assert not isinstance(module.padding, str)  # see `curvature_of`
        patches = functional.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
        return patches.transpose(1, 2).reshape(-1, patches.shape[1])

    def refresh(self, statistics: Sequence[torch.Tensor], damping: float) -> None:
        """See `Curvature`."""
        self._inverse_inputs, self._inverse_outputs = (_damped_inverse(factor, damping**0.5) for factor in statistics)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `Curvature`."""
        weights = gradient[: self._module.weight.numel()].view(self._rows, -1)
        if self._has_bias:
            weights = torch.cat([weights, gradient[self._module.weight.numel() :, None]], dim=1)
        solved = -(self._inverse_outputs @ weights @ self._inverse_inputs)
        if self._has_bias:
            return torch.cat([solved[:, :-1].flatten(), solved[:, -1]])
        return solved.flatten()


class EmbeddingFactors:
    """K-FAC of an ``nn.Embedding``: its inputs are unit vectors, so that A is diagonal."""

    def __init__(self, module: nn.Embedding) -> None:
        self._module = module

    def measure(self, batch: LayerBatch) -> list[torch.Tensor]:
        """See `Curvature`."""
        tokens = torch.cat([record.inputs.flatten() for record in batch.records])
        gradients = torch.cat([record.gradient.reshape(len(record.inputs.flatten()), -1) for record in batch.records])
        counts = torch.bincount(tokens, minlength=self._module.num_embeddings).to(gradients.dtype)
        return [counts / batch.samples, gram(gradients) * (batch.samples**2 / len(tokens))]

    def refresh(self, statistics: Sequence[torch.Tensor], damping: float) -> None:
        """See `Curvature`."""
        inputs, outputs = statistics
        self._inverse_inputs = _damped_reciprocal(inputs, damping**0.5)
        self._inverse_outputs = _damped_inverse(outputs, damping**0.5)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `Curvature`."""
        weights = gradient.view(self._module.weight.shape)
        return -(self._inverse_inputs[:, None] * (weights @ self._inverse_outputs)).flatten()


class NormalisationDiagonal:
    """Diagonal Fisher matrix of the scale and shift of a normalisation layer, from per-sample gradients."""

    def __init__(self, module: nn.LayerNorm | nn.modules.batchnorm._BatchNorm) -> None:
        self._module = module

    def measure(self, batch: LayerBatch) -> list[torch.Tensor]:
        """See `Curvature`."""
        total = torch.zeros_like(batch.gradient)
        for record in batch.records:
            normalised = self._normalise(record.inputs)
            parts = [_per_sample(record.gradient * normalised, self._module)]
            if self._module.bias is not None:
                parts.append(_per_sample(record.gradient, self._module))
            total += torch.cat([part.square().sum(dim=0) for part in parts])
        return [total * batch.samples]

    def _normalise(self, inputs: torch.Tensor) -> torch.Tensor:
        module = self._module
        if isinstance(module, nn.LayerNorm):
            return functional.layer_norm(inputs, module.normalized_shape, eps=module.eps)
        of_batch = module.training or module.running_mean is None
        mean, variance = (None, None) if of_batch else (module.running_mean, module.running_var)
        return functional.batch_norm(inputs, mean, variance, training=of_batch, eps=module.eps)

    def refresh(self, statistics: Sequence[torch.Tensor], damping: float) -> None:
        """See `Curvature`."""
        self._inverse = _damped_reciprocal(statistics[0], damping)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `Curvature`."""
        return -gradient * self._inverse


class GradientDiagonal:
    """For layers of unknown kind: samples times the squared mean gradient, the Fisher diagonal where noise prevails."""

    def measure(self, batch: LayerBatch) -> list[torch.Tensor]:
        """See `Curvature`."""
        return [batch.gradient.square() * batch.batch_size]

    def refresh(self, statistics: Sequence[torch.Tensor], damping: float) -> None:
        """See `Curvature`."""
        self._inverse = _damped_reciprocal(statistics[0], damping)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `Curvature`."""
        return -gradient * self._inverse


# Least damping, for layers whose gradients vanish.
TINY = 1e-30


def make_curvature(module: nn.Module, size: int) -> Curvature:
    """The curvature that suits a layer of which ``size`` parameters are trained."""
    if size != sum(parameter.numel() for parameter in module.parameters(recurse=False)):
        return GradientDiagonal()
    if isinstance(module, nn.Linear) or (
        isinstance(module, nn.Conv2d)
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    ):
        return KroneckerFactors(module)
    if isinstance(module, nn.Embedding) and module.padding_idx is None:
        return EmbeddingFactors(module)
    if isinstance(module, (nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)):
        return NormalisationDiagonal(module)
    return GradientDiagonal()


def _damped_inverse(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    """Inverse of a positive semi-definite matrix plus ``damping`` times its mean eigenvalue, by Cholesky."""
    damped = matrix.clone()
    damped.diagonal().add_((damping * matrix.diagonal().mean()).clamp_min(TINY))
    factor, _ = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_inverse(factor)


def _damped_reciprocal(diagonal: torch.Tensor, damping: float) -> torch.Tensor:
    """The same of a diagonal matrix."""
    return 1.0 / (diagonal + (damping * diagonal.mean()).clamp_min(TINY))


def _rows_of_channels(gradient: torch.Tensor, module: nn.Linear | nn.Conv2d) -> torch.Tensor:
    """Output gradients as rows, one a sample and position."""
    if isinstance(module, nn.Linear):
        return gradient.reshape(-1, gradient.shape[-1])
    return gradient.flatten(2).transpose(1, 2).reshape(-1, gradient.shape[1])


def _per_sample(products: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Sum over the positions of each sample, shape (samples, parameters)."""
    samples = len(products)
    if isinstance(module, nn.LayerNorm):
        return products.reshape(samples, -1, module.weight.numel()).sum(dim=1)
    return products.reshape(samples, products.shape[1], -1).sum(dim=2)
