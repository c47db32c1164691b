"""Whether a loss is quadratic in the outputs: then its curvature is the same wherever the outputs go."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch

from apts_mpi.tools.environment import preserved_random_state


def is_quadratic(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> bool | None:
    """Whether second differences of a loss are the same around several outputs; None: not known.

    Tried in float64 on outputs and targets of one shape, (2, 3). A loss that takes no such targets may still be seen to
    be another one with class indices of three classes, one a sample or two.

    Parameters
    ----------
    loss
        Function of (outputs, targets).
    """
    generator = torch.Generator().manual_seed(0)
    *points, direction, targets = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator)
    classes = torch.tensor([[0, 2], [1, 0]])
    # Of a sequence the classes are in the last dimension, as losses that flatten have them, or in the second.
    of_places = [point[:, None].expand(2, 2, 3) for point in (*points, direction)]
    trials = [
        ([*points, direction], targets),
        ([*points, direction], classes[:, 0]),
        (of_places, classes),
        ([point.transpose(1, 2) for point in of_places], classes),
    ]
    with preserved_random_state(torch.device("cpu")), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of a name for an index, of a loss that takes mappings
        for tensors, of_them in trials:
            try:
                first, *others = _bends(loss, tensors, of_them)
            except Exception:  # whatever a loss raises that is given what it does not take
                continue
            # Rounding of the largest loss, of some hundred, is 1e-13 of it.
            same = first > 0.0 and all(math.isclose(first, other, rel_tol=1e-9) for other in others)
            if not same or of_them is targets:
                return same
    return None


def _bends(
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tensors: list[torch.Tensor], targets: torch.Tensor
) -> list[float]:
    """Second differences of a loss along the last of some tensors, around the others and one far away."""
    *points, direction = tensors

    def bend(point: torch.Tensor) -> float:
        values = [loss(point + length * direction, targets) for length in (-1.0, 0.0, 1.0)]
        return float(values[0] - 2.0 * values[1] + values[2])

    return [bend(point) for point in (*points, 10.0 * points[0])]
