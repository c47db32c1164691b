"""Where to cut a sequence of items: in balance, and with what belongs together in one part. Arithmetic only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from apts_mpi.network.partition import balanced_cuts

# By how much the costliest part may cost more than that of the best balance, as a share.
SLACK = 0.1

# Of all gains, what has to be gained to move cuts that are in balance: less is noise.
LEAST_GAIN = 0.05


def coupled_cuts(costs: Sequence[float], gains: np.ndarray, present: Sequence[int]) -> list[int]:
    """Cuts into as many contiguous parts as now: balanced, with the largest sum of gains within the parts.

    The costliest part costs no more than ``1 + SLACK`` of that of the best balance, or the least power of it with
    which the gains are no less than now. Of such cuts those with the largest gains are found by dynamic programming,
    O(parts * items^2). Present ones that are balanced so stay, unless ``LEAST_GAIN`` of all gains comes to them.
    Without gains the costs of the parts are as even as may be, in the mean square.

    Parameters
    ----------
    costs
        Of the items.
    gains : ndarray, shape (items, items)
        What it is worth to have two items in one part, below 0 what it costs; symmetric, without the diagonal.
    present
        The cuts now: ``parts + 1`` of them; part p holds items ``present[p]`` to ``present[p + 1] - 1``.

    Returns
    -------
    list of int
        The same of the cuts to be.
    """
    best = balanced_cuts(costs, len(present) - 1)
    least, costliest = ((1.0 + SLACK) * _costliest(costs, best), _costliest(costs, present))
    noise, sums = LEAST_GAIN * float(np.abs(np.triu(gains, 1)).sum()), _sums(costs)
    if noise == 0.0:
        # Not `best`, whose other parts may be as costly as they like below the costliest.
        even = _most_within(np.where(sums <= least, -(sums**2), -np.inf), len(best) - 1)
        return list(present) if costliest <= least else even
    within = _within(gains)
    now = _sum(within, present)
    if costliest <= least:
        found = _most_within(np.where(sums <= least, within, -np.inf), len(best) - 1)
        return found if _sum(within, found) > now + noise else list(present)
    while least < costliest:
        found = _most_within(np.where(sums <= least, within, -np.inf), len(best) - 1)
        if _sum(within, found) >= now:
            return found
        least *= 1.0 + SLACK
    return list(present)


def _sums(costs: Sequence[float]) -> np.ndarray:
    """Costs of items i to j - 1, shape (items + 1, items + 1); without end where there is none."""
    edges = np.concatenate([[0.0], np.cumsum(costs)])
    sums = edges[None, :] - edges[:, None]
    sums[np.tril_indices(len(edges))] = np.inf
    return sums


def _costliest(costs: Sequence[float], cuts: Sequence[int]) -> float:
    return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(cuts))


def _within(gains: np.ndarray) -> np.ndarray:
    """Gains between items i to j - 1, each pair once, shape (items + 1, items + 1)."""
    pairs = np.triu(gains, 1)
    table = np.zeros((len(pairs) + 1, len(pairs) + 1))
    table[1:, 1:] = pairs.cumsum(axis=0).cumsum(axis=1)
    edges = np.arange(len(table))
    # Of pairs l < m, those with i <= l are among the m < j without those with l < i.
    return table[edges, edges][None, :] - table[edges[:, None], edges[None, :]]


def _sum(within: np.ndarray, cuts: Sequence[int]) -> float:
    return float(sum(within[start, stop] for start, stop in itertools.pairwise(cuts)))


def _most_within(within: np.ndarray, parts: int) -> list[int]:
    """The cuts with the largest sum of ``within[start, stop]`` over the parts; the first of several."""
    value, starts = within[0], []
    for _ in range(parts - 1):
        table = value[:, None] + within
        starts.append(table.argmax(axis=0))
        value = table.max(axis=0)
    cuts = [len(within) - 1]
    for start in reversed(starts):
        cuts.append(int(start[cuts[-1]]))
    return [0, *reversed(cuts)]
