"""Losses of torch as sums with their denominators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from apts_mpi.errors import InvalidInput, require

# The sum over some samples, and what it is divided by: a mean over all samples is the sum of all sums over that of all
# denominators.
Pair = tuple[Tensor, Any]


class Counted(ABC):
    """A loss whose denominator follows from the targets alone."""

    @abstractmethod
    def count(self, targets: Tensor) -> Any:
        """Denominator of the sum over these targets."""

    @abstractmethod
    def __call__(self, outputs: Tensor, targets: Tensor) -> Pair:
        """Sum over some samples, and its denominator."""


@dataclass(frozen=True, eq=False)
class CrossEntropy(Counted):
    """See `cross_entropy`."""

    weight: Tensor | None
    ignore_index: int
    label_smoothing: float

    def __call__(self, outputs: Tensor, targets: Tensor) -> Pair:
        """Sum over the targets that count, and their number, or the sum of the weights of their classes."""
        weight = None if self.weight is None else self.weight.to(outputs)
        total = functional.cross_entropy(
            outputs,
            targets,
            weight,
            ignore_index=self.ignore_index,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        return total, self.count(targets)

    def count(self, targets: Tensor) -> Any:
        """See `Counted`."""
        if targets.is_floating_point():  # probabilities of the classes, none of which is left out
            return targets.numel() // targets.shape[1]
        return _denominator(targets, self.weight, self.ignore_index)


@dataclass(frozen=True, eq=False)
class NegativeLogLikelihood(Counted):
    """`cross_entropy` of outputs that are logarithms of probabilities already, torch's ``nll_loss``."""

    weight: Tensor | None
    ignore_index: int

    def __call__(self, outputs: Tensor, targets: Tensor) -> Pair:
        """See `CrossEntropy`."""
        weight = None if self.weight is None else self.weight.to(outputs)
        total = functional.nll_loss(outputs, targets, weight, ignore_index=self.ignore_index, reduction="sum")
        return total, self.count(targets)

    def count(self, targets: Tensor) -> Any:
        """See `Counted`."""
        return _denominator(targets, self.weight, self.ignore_index)


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy(Counted):
    """See `binary_cross_entropy_with_logits`."""

    weight: Tensor | None
    pos_weight: Tensor | None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Pair:
        """Sum over all outputs, and their number."""
        _check_shapes("binary_cross_entropy_with_logits", outputs, targets)
        weight, positive = (None if part is None else part.to(outputs) for part in (self.weight, self.pos_weight))
        total = functional.binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), weight, pos_weight=positive, reduction="sum"
        )
        return total, self.count(targets)

    def count(self, targets: Tensor) -> int:
        """See `Counted`."""
        return targets.numel()


@dataclass(frozen=True, eq=False)
class Elementwise(Counted):
    """Sum over all numbers of what a function of torch makes of each output and its target, and their number."""

    name: str
    settings: tuple[tuple[str, float], ...] = ()

    def __call__(self, outputs: Tensor, targets: Tensor) -> Pair:
        """Sum over all outputs, and their number."""
        _check_shapes(self.name, outputs, targets)
        function: Callable[..., Tensor] = getattr(functional, self.name)
        return function(outputs, targets, reduction="sum", **dict(self.settings)), self.count(targets)

    def count(self, targets: Tensor) -> int:
        """See `Counted`."""
        return targets.numel()


def cross_entropy(
    *, weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0
) -> CrossEntropy:
    """Softmax cross entropy, as torch's ``cross_entropy`` averages it over all samples at once.

    Parameters
    ----------
    weight : Tensor, shape (classes,), optional
        Of the classes. The mean is over the weights of the targets.
    ignore_index
        The class of targets that do not count, such as padding.
    label_smoothing
        Share of each target that is spread over all classes, from 0 to 1.

    Returns
    -------
    callable
        Takes outputs of shape (samples, classes, ...), and targets that are class indices, (samples, ...), or
        probabilities of the shape of the outputs; returns the sum and its denominator.
    """
    require(0.0 <= label_smoothing <= 1.0, "label_smoothing", label_smoothing, "give a number from 0 to 1")
    return CrossEntropy(weight, ignore_index, label_smoothing)


def binary_cross_entropy_with_logits(
    *, weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> BinaryCrossEntropy:
    """Cross entropy of yes and no, one or more a sample, averaged over all.

    Parameters
    ----------
    weight, pos_weight : Tensor, optional
        Of the answers of a sample, and of those whose target is 1; of a shape that is broadcast to that of one sample.

    Returns
    -------
    callable
        Takes outputs and targets of one shape; returns the sum and its denominator.
    """
    return BinaryCrossEntropy(weight, pos_weight)


def mse() -> Elementwise:
    """Squared errors, averaged over all numbers; takes outputs and targets of one shape."""
    return Elementwise("mse_loss")


def l1() -> Elementwise:
    """Absolute errors, averaged over all numbers; takes outputs and targets of one shape."""
    return Elementwise("l1_loss")


def huber(*, delta: float = 1.0) -> Elementwise:
    """Half the squared error up to ``delta``, and linear beyond, averaged; takes outputs and targets of one shape."""
    require(delta > 0.0, "delta", delta, "give a number above 0")
    return Elementwise("huber_loss", (("delta", delta),))


def _denominator(targets: Tensor, weight: Tensor | None, ignored: int) -> Tensor:
    counted = targets != ignored
    if weight is None:
        return counted.sum()
    of_targets = weight.to(targets.device, torch.float64)[torch.where(counted, targets, 0)]
    return torch.where(counted, of_targets, 0.0).sum()


def _check_shapes(name: str, outputs: Tensor, targets: Tensor) -> None:
    if outputs.shape != targets.shape:
        raise InvalidInput(
            f"loss: {name} of outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}; "
            "give both the same shape"
        )
