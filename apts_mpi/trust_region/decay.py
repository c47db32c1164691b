"""What draws parameters towards the origin: a pull within the step that is judged, and weight decay after it."""

from __future__ import annotations

import math

import torch

from apts_mpi.trust_region.inner_products import InnerProducts


def pulled(correction: torch.Tensor, weights: torch.Tensor, share: float, inner: InnerProducts) -> torch.Tensor:
    """A correction that also goes towards the origin, by a share of its length. Collective over the parts.

    Parameters
    ----------
    correction : Tensor, shape (n,)
    weights : Tensor, shape (n,)
        What is pulled, zeros elsewhere.
    share
        Of the length of the correction.
    inner
        Gives the norms of all parts.

    Returns
    -------
    Tensor, shape (n,)
        Another one: a correction that is tried again in a smaller ball is pulled anew.
    """
    length, size = inner.euclidean_norms(correction, weights)
    return torch.add(correction, weights, alpha=-share * length / (size or 1.0))


def decrease(values: torch.Tensor, decay: float, length: float, size: float) -> torch.Tensor:
    """What weight decay takes from the parameters after a step, shape (n,).

    Parameters
    ----------
    values : Tensor, shape (n,)
        The parameters.
    decay
        ``trust_region.weight_decay``.
    length
        2-norm of the step, over all parts.
    size
        Number of the parameters of all parts.
    """
    return values * -min(decay * length / math.sqrt(size), 1.0)
