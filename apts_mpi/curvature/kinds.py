"""Curvature of single layers from what flows through them: Kronecker factors (K-FAC) and diagonals.

Per layer the Fisher matrix is taken for A (x) G with A = E[a a^T] of the inputs and G = E[l l^T] of the per-sample
output gradients (Martens and Grosse, arXiv 1503.05671); convolutions sum A over positions (Grosse and Martens,
arXiv 1602.01407). The damping is split over the factors as in section 6.3 of the first, but relative to them: A + a
sqrt(gamma) I and G + g sqrt(gamma) I with a and g their mean eigenvalues. Relative, as G scales with the square of the
loss's scale, of the samples' positions, and falls with the loss: against it an absolute damping soon is everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional

from apts_mpi.curvature.dense import gram
from apts_mpi.curvature.layer import Curvature, LayerBatch, Undivided, damped_factor, damped_reciprocal
from apts_mpi.curvature.normalisation import Normalisation, NormalisationDiagonal, batched
from apts_mpi.curvature.patches import Convolution, patches
from apts_mpi.curvature.signed import signed_factors
from apts_mpi.network.partition import Layer
from apts_mpi.network.recorder import UNCALLED

# A longer side of a layer has the diagonal of its factor. This one takes 100 MB and about two seconds to invert, and
# is one that a convolution of 512 channels stays below.
LARGEST_SIDE = 5120

# And so has one longer than this whose factor would have more than so many times the numbers of the layer, which is
# wide on one side only: factors and inverses are bounded by 65 times the parameters. A head of 100 classes of 2048
# features has 20.
SMALL_SIDE, LARGEST_RATIO = 512, 32

# Rows of patches of a convolution, in all and for each column: with more, its factor changes by a few hundredths alone.
PATCHES, PATCHES_A_COLUMN = 16384, 32

# Numbers to a multiple of which long rows of intermediate products are lengthened.
ALIGNED = 16


class KroneckerFactors:
    """K-FAC of a layer that multiplies its (unfolded) inputs by a weight matrix.

    Parameters
    ----------
    module
        ``nn.Linear``, or a convolution without groups.
    """

    kind = "KroneckerFactors"
    signed = False

    # What its parameters are called.
    names = ("weight", "bias")

    def __init__(self, module: nn.Linear | Convolution | nn.MultiheadAttention) -> None:
        self._module = module
        self._rows = self._weight.shape[0]
        self._has_bias = getattr(module, self.names[1]) is not None

    @property
    def _weight(self) -> torch.Tensor:
        return getattr(self._module, self.names[0])

    @property
    def statistics(self) -> list[tuple[int, ...]]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        return [_shape(side, self._rows * self._columns) for side in (self._columns, self._rows)]

    @property
    def _columns(self) -> int:
        """Inputs of an output, that of the bias among them."""
        return self._weight[0].numel() + self._has_bias

    def measure(self, batch: LayerBatch) -> list[torch.Tensor]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        return self.means(self.sums(batch), batch.samples)

    def sums(self, batch: LayerBatch) -> list[Any]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        records = batch.reached
        # None of the calls may have been reached: then there are no rows.
        none = self._weight.detach().new_empty(0, self._rows)
        gradients = _joined([self._rows_of(record.gradient) for record in records], none)
        count = len(gradients)
        share = min(1.0, max(PATCHES, PATCHES_A_COLUMN * self._columns) / max(batch.of_all(count)[0], 1))
        found = [self._activations(record.inputs, share, batch) for record in records]
        activations = _joined(found, none.new_empty(0, self._columns))
        of_inputs, of_outputs = self.statistics
        return [_second_moment(activations, of_inputs), _second_moment(gradients, of_outputs), count]

    def means(self, sums: Sequence[Any], samples: int) -> list[torch.Tensor]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        activations, gradients, count = sums
        # Gradients of the mean loss carry 1/samples; E over samples of per-sample ones needs it back once, and the
        # mean over positions again.
        return [activations / samples, gradients * (samples**2 / max(count, 1))]

    def _activations(self, inputs: torch.Tensor, share: float, batch: LayerBatch) -> torch.Tensor:
        """What the weights and the bias of one output are multiplied by, as rows, one a sample and position.

        Of a convolution on a share of all samples, evenly spread, whose rows are longer for it.
        """
        module = self._module
        if not isinstance(module, Convolution):
            rows, scale = inputs.reshape(-1, inputs.shape[-1]), 1.0
        else:
            samples = batched(inputs, self._weight.dim())
            total, before = batch.of_all(len(samples))
            kept = max(1, int(share * total))
            # Those of all that are among these: number * total // kept lies from ``before`` on.
            first, last = (-(-edge * kept // max(total, 1)) for edge in (before, before + len(samples)))
            chosen = torch.arange(first, last, device=inputs.device) * total // kept - before
            rows = patches(samples if kept >= total else samples[chosen], module)
            scale = (total / kept) ** 0.5
        if self._has_bias:
            rows = functional.pad(rows, (0, 1), value=1.0)
        return rows if scale <= 1.0 else rows * scale

    def _rows_of(self, gradient: torch.Tensor) -> torch.Tensor:
        """Output gradients as rows of the same order."""
        if isinstance(self._module, Convolution):
            gradient = batched(gradient, self._weight.dim()).movedim(1, -1)
        return gradient.reshape(-1, self._rows)

    def refresh(self, statistics: Sequence[torch.Tensor], damping: float) -> None:
        """See `apts_mpi.curvature.layer.Curvature`."""
        self._inverse_inputs, outputs = (damped_factor(factor, damping**0.5) for factor in statistics)
        self._minus_inverse_outputs = outputs.neg_()

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `apts_mpi.curvature.layer.Curvature`."""
        size, found = self._weight.numel(), torch.empty_like(gradient)
        # Weights and biases side by side, from and into which the products go without copies. Long rows begin at
        # multiples of so many numbers: with 2,049 a product takes a third longer.
        width = -(-self._columns // ALIGNED) * ALIGNED if self._columns > SMALL_SIDE else self._columns
        halfway = gradient.new_empty(self._rows, width)[:, : self._columns]
        weights = slice(0, size), slice(0, size // self._rows)
        biases = slice(size, None), slice(size // self._rows, None)
        parts = [weights, biases] if self._has_bias else [weights]
        for of_flat, columns in parts:
            given = gradient[of_flat].view(self._rows, -1)
            _times(self._minus_inverse_outputs, given, halfway[:, columns])
        for of_flat, columns in parts:
            out = found[of_flat].view(self._rows, -1)
            if self._inverse_inputs.dim() == 2:
                torch.mm(halfway, self._inverse_inputs[:, columns], out=out)
            else:
                torch.mul(halfway[:, columns], self._inverse_inputs[columns], out=out)
        return found

    @property
    def places(self) -> range:
        """See `apts_mpi.curvature.layer.Curvature`: the rows of the weights; the biases belong to the last."""
        return range(0, self._weight.numel(), self._weight[0].numel())

    def part(self, gradient: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """See `apts_mpi.curvature.layer.Curvature`."""
        size = self._weight.numel()
        inputs, has_end = size // self._rows, stop == len(gradient)
        rows = slice(start // inputs, self._rows if has_end else stop // inputs)
        given, biases = gradient[:size].view(self._rows, inputs), gradient[size:].unsqueeze(1)
        outputs, of_inputs = self._minus_inverse_outputs, self._inverse_inputs
        halfway = _rows_times(outputs, rows, torch.cat([given, biases], dim=1) if self._has_bias else given)
        found = halfway @ of_inputs[:, :inputs] if of_inputs.dim() == 2 else halfway[:, :inputs] * of_inputs[:inputs]
        if not (has_end and self._has_bias):
            return found.flatten()
        # Those of all rows, from a product with a vector.
        if of_inputs.dim() == 2:
            last = given @ of_inputs[:-1, -1:] + biases * of_inputs[-1, -1]
        else:
            last = biases * of_inputs[-1]
        return torch.cat([found.flatten(), _rows_times(outputs, slice(None), last).flatten()])


class AttentionFactors(KroneckerFactors):
    """K-FAC of an ``nn.MultiheadAttention`` of one input: its projections to queries, keys and values as one matrix.

    The projection of what is attended to is a layer of its own.
    """

    kind = "AttentionFactors"
    names = ("in_proj_weight", "in_proj_bias")


class EmbeddingFactors(Undivided):
    """K-FAC of an ``nn.Embedding``: its inputs are unit vectors, so that A is diagonal; or zero, those of padding."""

    kind = "EmbeddingFactors"
    signed = False

    def __init__(self, module: nn.Embedding) -> None:
        self._module = module

    @property
    def statistics(self) -> list[tuple[int, ...]]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        tokens, features = self._module.weight.shape
        return [(tokens,), _shape(features, tokens * features)]

    def measure(self, batch: LayerBatch) -> list[torch.Tensor]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        return self.means(self.sums(batch), batch.samples)

    def sums(self, batch: LayerBatch) -> list[Any]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        weights, records = self._module.weight.detach(), batch.reached
        none = torch.empty(0, dtype=torch.long, device=weights.device)
        tokens = torch.cat([none, *(record.inputs.flatten() for record in records)])
        gradients = torch.cat([weights[:0], *(record.gradient.reshape(-1, weights.shape[1]) for record in records)])
        counts = torch.bincount(tokens, minlength=len(weights)).to(gradients.dtype)
        if self._module.padding_idx is not None:
            counts[self._module.padding_idx] = 0.0
            gradients = gradients * (tokens != self._module.padding_idx)[:, None]
        return [counts, _second_moment(gradients, self.statistics[1]), counts.sum()]

    def means(self, sums: Sequence[Any], samples: int) -> list[torch.Tensor]:
        """See `apts_mpi.curvature.layer.Curvature`."""
        counts, gradients, counted = sums
        return [counts / samples, gradients * (samples**2 / counted.clamp_min(1.0))]

    def refresh(self, statistics: Sequence[torch.Tensor], damping: float) -> None:
        """See `apts_mpi.curvature.layer.Curvature`."""
        inputs, outputs = statistics
        self._inverse_inputs = damped_reciprocal(inputs, damping**0.5)
        self._inverse_outputs = damped_factor(outputs, damping**0.5)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `apts_mpi.curvature.layer.Curvature`."""
        weights = gradient.view(self._module.weight.shape)
        factor = self._inverse_outputs
        solved = weights @ factor if factor.dim() == 2 else weights * factor
        return solved.mul_(-self._inverse_inputs[:, None]).flatten()


# For exactly these types: a subclass may compute something else.
KINDS: dict[type[nn.Module], Callable[[Any], Curvature]] = {
    **dict.fromkeys([nn.Linear, *UNCALLED, *get_args(Convolution)], KroneckerFactors),
    nn.MultiheadAttention: AttentionFactors,
    nn.Embedding: EmbeddingFactors,
    **dict.fromkeys(get_args(Normalisation), NormalisationDiagonal),
}


def make_curvature(module: nn.Module, size: int) -> Curvature:
    """The curvature that suits a layer of which ``size`` parameters are trained.

    `apts_mpi.curvature.signed.SignedFactors` for what is not in ``KINDS``: transposed convolutions, ``nn.Bilinear``,
    ``nn.EmbeddingBag``, ``nn.SyncBatchNorm``, recurrent layers, activations with parameters, subclasses and
    parametrised layers; and for convolutions with groups, attention with weights apart or further biases, embeddings
    with ``scale_grad_by_freq``, and layers that are partly frozen.
    """
    kind = KINDS.get(type(module))
    names = getattr(kind, "names", ("weight", "bias"))
    if kind is None or not _is_usual(module, size, names):
        return signed_factors(module, size)
    return kind(module)


def is_seldom_seen(module: nn.Module, size: int) -> bool:
    """Whether few samples of a batch tell of the curvature of a layer of which ``size`` parameters are trained.

    Those of an embedding's rows are the words there, and factors from gradients with random signs alone have a sample a
    sign.
    """
    curvature = make_curvature(module, size)
    return curvature.signed or isinstance(curvature, EmbeddingFactors)


def any_seldom_seen(network: nn.Module, layers: Sequence[Layer]) -> bool:
    """Whether one of the layers of a network is seldom seen."""
    return any(is_seldom_seen(network.get_submodule(one.name), one.stop - one.start) for one in layers)


def _is_usual(module: nn.Module, size: int, names: Sequence[str]) -> bool:
    """Whether a layer has nothing but a weight and perhaps a bias, all trained, and uses them as its type does."""
    parameters = dict(module.named_parameters(recurse=False))
    if list(parameters) not in ([*names[:1]], [*names]):  # others, such as of the old weight_norm, make these
        return False
    weight, bias = parameters[names[0]], parameters.get(names[1])
    of_bias = weight.shape if isinstance(module, Normalisation) else weight.shape[:1]
    return (
        size == sum(parameter.numel() for parameter in parameters.values())
        and (bias is None or bias.shape == of_bias)
        and getattr(module, "groups", 1) == 1
        and not getattr(module, "scale_grad_by_freq", False)
        and "forward" not in vars(module)
    )


def _shape(side: int, parameters: int) -> tuple[int, ...]:
    """Of the factor of a side of so many, of a layer of so many parameters."""
    is_large = side > SMALL_SIDE and side**2 > LARGEST_RATIO * parameters
    return (side,) if side > LARGEST_SIDE or is_large else (side, side)


def _joined(rows: Sequence[torch.Tensor], none: torch.Tensor) -> torch.Tensor:
    """All rows, without a copy of those of a layer that was called once; ``none`` without any."""
    return rows[0].to(none.dtype) if len(rows) == 1 else torch.cat([none, *rows])


def _second_moment(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """``R^T R`` of rows, or its diagonal where that is a factor's."""
    return gram(rows) if len(shape) == 2 else torch.linalg.vector_norm(rows, dim=0).square_()


def _rows_times(factor: torch.Tensor, rows: slice, matrix: torch.Tensor) -> torch.Tensor:
    """Rows of the product of a factor, or of its diagonal, with a matrix."""
    return factor[rows] @ matrix if factor.dim() == 2 else factor[rows, None] * matrix[rows]


def _times(factor: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
    """Put the product of a factor, or of its diagonal, with a matrix into ``out``."""
    if factor.dim() == 2:
        torch.mm(factor, matrix, out=out)
    else:
        torch.mul(factor[:, None], matrix, out=out)
