"""Cuts of a sequence: balanced, with the largest gains within the parts; against all cuts there are."""

import itertools

import numpy as np
import pytest

from apts_mpi.network.coupled_cuts import LEAST_GAIN, SLACK, coupled_cuts
from apts_mpi.network.partition import balanced_cuts


def costliest(costs, cuts):
    return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(cuts))


def within(gains, cuts):
    pairs = (itertools.combinations(range(*part), 2) for part in itertools.pairwise(cuts))
    return sum(gains[pair] for part in pairs for pair in part)


@pytest.mark.parametrize("seed", range(60))
def test_against_all_cuts(seed):
    generator = np.random.default_rng(seed)
    items = int(generator.integers(2, 9))
    parts = int(generator.integers(1, items + 1))
    costs = generator.random(items).tolist()
    gains = generator.random((items, items)) - generator.random()
    gains += gains.T
    possible = [[0, *inner, items] for inner in itertools.combinations(range(1, items), parts - 1)]
    present = possible[int(generator.integers(len(possible)))]
    found = coupled_cuts(costs, gains, present)
    most = (1.0 + SLACK) * costliest(costs, balanced_cuts(costs, parts))
    noise = LEAST_GAIN * np.abs(np.triu(gains, 1)).sum()
    now, limit = within(gains, present), costliest(costs, present)
    if limit <= most:
        best = largest(costs, gains, possible, most)
        assert found == (best if within(gains, best) > now + noise else present)
        return
    while most < limit:
        best = largest(costs, gains, possible, most)
        if within(gains, best) >= now:
            assert found == best and costliest(costs, found) < limit
            return
        most *= 1.0 + SLACK
    assert found == present


def largest(costs, gains, possible, most):
    """The cuts with the largest gains, of those whose costliest part costs at most so much."""
    balanced = [cuts for cuts in possible if costliest(costs, cuts) <= most]
    return max(balanced, key=lambda cuts: within(gains, cuts))


def test_without_gains_cuts_are_balanced():
    nothing = np.zeros((4, 4))
    assert coupled_cuts([1.0, 1.0, 1.0, 3.0], nothing, [0, 1, 4]) == [0, 3, 4]
    assert coupled_cuts([1.0, 1.0, 1.0, 3.0], nothing, [0, 3, 4]) == [0, 3, 4]
    # The others as even as may be, where one is the costliest anyhow.
    assert coupled_cuts([4.0, 1.0, 1.0, 1.0, 1.0], np.zeros((5, 5)), [0, 2, 3, 5]) == [0, 1, 3, 5]


def test_what_is_worth_most_joins():
    coupling = np.zeros((4, 4))
    coupling[1, 2] = coupling[2, 1] = 0.9
    coupling[0, 1] = coupling[1, 0] = 0.1
    assert coupled_cuts([1.0] * 4, coupling, [0, 1, 2, 4]) == [0, 1, 3, 4]
