"""Losses of torch that divide by something else than the number of samples, as sums with their denominators."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn import functional

from apts_mpi.losses.values import Counted, CrossEntropy, NegativeLogLikelihood

# What torch's functions take besides outputs and targets, and what they do without.
COUNTED: Mapping[Callable[..., Any], Callable[[Mapping[str, Any]], Callable[..., Any]]] = {
    functional.cross_entropy: lambda given: CrossEntropy(
        given["weight"], given["ignore_index"], given["label_smoothing"]
    ),
    functional.nll_loss: lambda given: NegativeLogLikelihood(given["weight"], given["ignore_index"]),
}


def exact(loss: Callable[..., Any]) -> Callable[..., Any]:
    """The loss itself, or, for a mean of torch over the targets that count, the same as a sum with its denominator.

    Known are ``cross_entropy`` and ``nll_loss``, these in ``functools.partial`` with keywords, and the modules
    ``nn.CrossEntropyLoss`` and ``nn.NLLLoss``.

    Parameters
    ----------
    loss
        Function of (outputs, targets).
    """
    if type(loss) is nn.CrossEntropyLoss and loss.reduction == "mean":
        return CrossEntropy(loss.weight, loss.ignore_index, loss.label_smoothing)
    if type(loss) is nn.NLLLoss and loss.reduction == "mean":
        return NegativeLogLikelihood(loss.weight, loss.ignore_index)
    function, given = loss, {}
    if isinstance(loss, functools.partial) and not loss.args:
        function, given = loss.func, loss.keywords
    make = COUNTED.get(function) if inspect.isfunction(function) else None
    if make is None:
        return loss
    defaults = {name: part.default for name, part in inspect.signature(function).parameters.items()}
    settings = defaults | given
    deprecated = settings["size_average"] is not None or settings["reduce"] is not None
    if deprecated or settings["reduction"] != "mean" or not set(given) <= set(defaults) - {"input", "target"}:
        return loss
    return make(settings)


# Means over all numbers, whatever these are.
MEANS = (functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss)
MEAN_MODULES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def is_exact(loss: Callable[..., Any]) -> bool:
    """Whether a loss is known to be a mean, or a sum with its denominator, for all samples if it is for some."""
    if isinstance(loss, Counted) or any(loss is mean for mean in MEANS):
        return True
    return type(loss) in MEAN_MODULES and getattr(loss, "reduction", "") == "mean"
