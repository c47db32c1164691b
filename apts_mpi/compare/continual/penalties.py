"""Elastic weight consolidation: what is added to the loss of a task for the sake of those before it.

Of each earlier task i the parameters at its end and its Fisher matrix are kept; the penalty is
``weight / 2 sum_i (theta - theta_i)^T F_i (theta - theta_i)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from apts_mpi.curvature.fisher import fisher_factors
from apts_mpi.curvature.kinds import KroneckerFactors

# Samples of a task that its Fisher matrix is measured on, and how many of them at once.
SAMPLES, AT_ONCE = 1024, 32

Loss = Callable[[Any, Any], Tensor]


class Penalty(Protocol):
    """What is added to the loss."""

    def remember(self, network: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
        """Take in a task that ends at the network's parameters."""

    def value(self, network: nn.Module) -> Tensor:
        """Of the network as it is, shape ()."""


class NoPenalty:
    """Earlier tasks are left to the stored samples, or forgotten."""

    def remember(self, network: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
        """See `Penalty`."""

    def value(self, network: nn.Module) -> Tensor:
        """See `Penalty`."""
        return torch.zeros(())


class Diagonal:
    """The diagonals of the Fisher matrices (Kirkpatrick et al., arXiv 1612.00796).

    Parameters
    ----------
    weight
        Of the penalty.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._tasks: list[dict[str, tuple[Tensor, Tensor]]] = []

    def remember(self, network: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
        """See `Penalty`; exact over the classes, of scores that cross entropy takes."""
        values = {name: value.detach() for name, value in network.named_parameters()}

        def logarithms(values: dict[str, Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.log_softmax(functional_call(network, values, (sample[None],))[0], dim=0)
            return found, found

        slopes = vmap(jacrev(logarithms, has_aux=True), in_dims=(None, 0))
        chosen = spread(inputs)
        sums = {name: torch.zeros_like(value) for name, value in values.items()}
        for some in chosen.split(AT_ONCE):
            derivatives, known = slopes(values, some)
            for name, part in derivatives.items():
                sums[name] += torch.einsum("ic,ic...->...", known.exp(), part.square())
        self._tasks.append({name: (values[name].clone(), sums[name] / len(chosen)) for name in values})

    def value(self, network: nn.Module) -> Tensor:
        """See `Penalty`."""
        total = torch.zeros(())
        for task in self._tasks:
            for name, value in network.named_parameters():
                centre, diagonal = task[name]
                total = total + (diagonal * (value - centre).square()).sum()
        return 0.5 * self._weight * total


class Kronecker:
    """Kronecker factors of the layers' Fisher matrices (Ritter et al., arXiv 1805.07810).

    Parameters
    ----------
    weight
        Of the penalty.
    """

    def __init__(self, weight: float) -> None:
        self._weight = weight
        self._tasks: list[list[tuple[Tensor, list[Tensor]]]] = []

    def remember(self, network: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor) -> None:
        """See `Penalty`; of linear layers."""
        layers = [(module, KroneckerFactors(module)) for module in linear_layers(network)]
        factors = fisher_factors(network, layers, loss, spread(inputs), spread(targets))
        centres = [weights(module).detach() for module, _ in layers]
        self._tasks.append(list(zip(centres, factors, strict=True)))

    def value(self, network: nn.Module) -> Tensor:
        """See `Penalty`."""
        total = torch.zeros(())
        for task in self._tasks:
            for module, (centre, (inputs, outputs)) in zip(linear_layers(network), task, strict=True):
                way = weights(module) - centre
                total = total + ((outputs @ way @ inputs) * way).sum()
        return 0.5 * self._weight * total


def linear_layers(network: nn.Module) -> list[nn.Linear]:
    """In their order."""
    return [module for module in network.modules() if isinstance(module, nn.Linear)]


def weights(module: nn.Linear) -> Tensor:
    """Weights and biases side by side."""
    return torch.cat([module.weight, module.bias[:, None]], dim=1)


def spread(samples: Tensor) -> Tensor:
    """At most `SAMPLES` of the samples, evenly spread."""
    count = min(len(samples), SAMPLES)
    return samples[torch.arange(count) * len(samples) // count]
