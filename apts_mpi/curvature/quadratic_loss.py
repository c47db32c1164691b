"""Whether a loss is quadratic in the outputs: then its curvature is the same wherever the outputs go."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch

from apts_mpi.tools.environment import preserved_random_state


def is_quadratic(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> bool:
    """Whether second differences of a loss are the same around several outputs.

    Tried on outputs and targets of one shape, (2, 3) in float64. A loss that takes others is not known to be
    quadratic.

    Parameters
    ----------
    loss
        Function of (outputs, targets).
    """
    generator = torch.Generator().manual_seed(0)
    *points, direction, targets = torch.randn(4, 2, 3, dtype=torch.float64, generator=generator)

    def bend(point: torch.Tensor) -> float:
        values = [loss(point + length * direction, targets) for length in (-1.0, 0.0, 1.0)]
        return float(values[0] - 2.0 * values[1] + values[2])

    with preserved_random_state(torch.device("cpu")), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as of a name for an index, of a loss that takes mappings
        try:
            first, *others = (bend(point) for point in (*points, 10.0 * points[0]))
        except Exception:  # whatever a loss raises that is given what it does not take
            return False
    # Rounding of the largest loss, of some hundred, is 1e-13 of it.
    return first > 0.0 and all(math.isclose(first, other, rel_tol=1e-9) for other in others)
