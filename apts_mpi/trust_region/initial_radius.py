"""The automatic radius of the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Pass
from apts_mpi.options import TrustRegionOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.trust_region.inner_products import InnerProducts


def cauchy_length(
    objective: Objective,
    passes: Sequence[Pass],
    inner: InnerProducts,
    comm: Communicator,
    options: TrustRegionOptions,
    *,
    epsilon: float,
    scratch: torch.Tensor,
) -> float:
    """Length of the Cauchy step of the first batch: first derivative over curvature, down the gradient. Collective.

    The curvature is a finite difference of gradients, which any network can give, at the price of one evaluation.

    Parameters
    ----------
    objective, passes
        The function; the total of the objective's reduction is its gradient, and is so afterwards.
    inner, comm
        Of all ranks.
    options
        Bounds of the radius.
    epsilon
        Relative error of the gradients.
    scratch : Tensor, shape (n,)
        Is overwritten.
    """
    total, values = objective.reduction.total, objective.vector.values
    gradient = total.clone()
    direction = inner.steepest_descent(gradient, 1.0)
    size, reach = inner.euclidean_norms(values, direction)
    length = epsilon**0.5 * (1.0 + size) / reach if reach else 1.0
    if not math.isfinite(reach):
        # The network is not to be run at parameters that are no numbers.
        direction.zero_()
    scratch.copy_(values)
    values.add_(direction, alpha=length)
    objective.evaluate(passes)
    values.copy_(scratch)
    slope, moved = inner.dots((gradient, direction), (total, direction))

    def decide(table: np.ndarray) -> Sequence[float]:
        curvature = (moved - slope) / length
        cauchy = -slope / abs(curvature) if curvature else math.nan
        if not math.isfinite(cauchy):
            cauchy = 1.0
        # The difference of gradients magnifies their rounding errors, which depend on the number of ranks.
        cauchy = float(f"{cauchy:.6e}")
        return [min(max(cauchy, options.min_radius), options.max_radius)]

    (radius,) = comm.agree([0.0], decide)
    total.copy_(gradient)
    return radius
