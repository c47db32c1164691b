"""Where to cut a sequence of coupled items: balanced, and between those that are coupled least. Arithmetic only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from apts_mpi.network.partition import balanced_cuts

# By how much the costliest part may cost more than that of the best balance, as a share.
SLACK = 0.1

# Coupling within the parts that is to be gained, as a share of all coupling: less of it is noise of a batch.
LEAST_GAIN = 0.05


def coupled_cuts(costs: Sequence[float], coupling: np.ndarray, present: Sequence[int]) -> list[int]:
    """Cuts into as many contiguous parts as now, within which the items are coupled most.

    Of all cuts whose costliest part costs no more than ``1 + SLACK`` of that of the best balance, those that leave the
    largest sum of couplings within the parts; found by dynamic programming, O(parts * items^2). The present ones stay
    where they are balanced so, and others have less than ``LEAST_GAIN`` of all coupling more.

    Parameters
    ----------
    costs
        Of the items.
    coupling : ndarray, shape (items, items)
        Between any two of them, 0 or more, symmetric; the diagonal does not count.
    present
        The cuts now: ``parts + 1`` of them; part p holds items ``present[p]`` to ``present[p + 1] - 1``.

    Returns
    -------
    list of int
        The same of the cuts to be.
    """
    parts = len(present) - 1
    best = balanced_cuts(costs, parts)
    capacity = (1.0 + SLACK) * _costliest(costs, best)
    within = _within(coupling)
    now = _sum(within, present)
    is_balanced = _costliest(costs, present) <= capacity
    everything = within[0, -1]
    if everything <= 0.0:
        return list(present) if is_balanced else best
    found = _most_within(np.where(_sums(costs) <= capacity, within, -np.inf), parts)
    gains = _sum(within, found) - now > LEAST_GAIN * everything
    return found if gains or not is_balanced else list(present)


def _sums(costs: Sequence[float]) -> np.ndarray:
    """Costs of items i to j - 1, shape (items + 1, items + 1); without end where there is none."""
    edges = np.concatenate([[0.0], np.cumsum(costs)])
    sums = edges[None, :] - edges[:, None]
    sums[np.tril_indices(len(edges))] = np.inf
    return sums


def _costliest(costs: Sequence[float], cuts: Sequence[int]) -> float:
    return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(cuts))


def _within(coupling: np.ndarray) -> np.ndarray:
    """Coupling between items i to j - 1, each pair once, shape (items + 1, items + 1)."""
    pairs = np.triu(coupling, 1)
    table = np.zeros((len(pairs) + 1, len(pairs) + 1))
    table[1:, 1:] = pairs.cumsum(axis=0).cumsum(axis=1)
    edges = np.arange(len(table))
    # Of pairs l < m, those with i <= l are among the m < j without those with l < i.
    return table[edges, edges][None, :] - table[edges[:, None], edges[None, :]]


def _sum(within: np.ndarray, cuts: Sequence[int]) -> float:
    return float(sum(within[start, stop] for start, stop in itertools.pairwise(cuts)))


def _most_within(gains: np.ndarray, parts: int) -> list[int]:
    """The cuts with the largest sum of ``gains[start, stop]`` over the parts; the first of several."""
    value, starts = gains[0], []
    for _ in range(parts - 1):
        table = value[:, None] + gains
        starts.append(table.argmax(axis=0))
        value = table.max(axis=0)
    cuts = [len(gains) - 1]
    for start in reversed(starts):
        cuts.append(int(start[cuts[-1]]))
    return [0, *reversed(cuts)]
