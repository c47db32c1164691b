"""Networks for which conditions hold by construction: hard conditions, of which nothing is left to learn.

    u(x) = lift(x) + distance(x) N(features(x))

``lift`` satisfies the conditions and ``distance`` vanishes where they are given (Lagaris, Likas, Fotiadis, doi
10.1109/72.712178); periodic functions of the coordinates as ``features`` make u periodic.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def same(coordinates: Tensor) -> Tensor:
    """The coordinates themselves."""
    return coordinates


class HardConditions(nn.Module):
    """``lift(x) + distance(x) network(features(x))``: (b, d) coordinates to (b, k) values.

    Parameters
    ----------
    network : nn.Module
        Maps what ``features`` returns to (b, k).
    lift, distance : callable
        Of the coordinates, (b, k) or (b, 1), smooth and independent of other rows.
    features : callable
        Of the coordinates, (b, anything).
    """

    def __init__(
        self,
        network: nn.Module,
        lift: Callable[[Tensor], Tensor],
        distance: Callable[[Tensor], Tensor],
        features: Callable[[Tensor], Tensor] = same,
    ) -> None:
        super().__init__()
        self.network = network
        self.lift, self.distance, self.features = lift, distance, features

    def forward(self, coordinates: Tensor) -> Tensor:
        values: Tensor = self.network(self.features(coordinates))
        return self.lift(coordinates) + self.distance(coordinates) * values


class WithCoefficients(nn.Module):
    """A network with unknown coefficients of its equation beside its values: (b, d) to (b, k + c).

    The coefficients are parameters like the weights, and values like the others, the same at all points: so an operator
    has both from the network, whatever calls it.

    Parameters
    ----------
    network : nn.Module
        Maps (b, d) to (b, k).
    guesses : list of float
        Where the c coefficients begin.
    """

    def __init__(self, network: nn.Module, guesses: list[float]) -> None:
        super().__init__()
        self.network = network
        self.coefficients = nn.Parameter(torch.tensor(guesses))

    def forward(self, coordinates: Tensor) -> Tensor:
        values: Tensor = self.network(coordinates)
        return torch.cat([values, self.coefficients.expand(len(coordinates), -1)], dim=1)
