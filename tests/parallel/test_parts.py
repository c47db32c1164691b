"""Numbers of all ranks put together by one reduction, against exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.parts import Parts, put_together
from apts_mpi.tools.events import Events

# Pairs that cancel, so that a plain sum has lost all digits of the third.
CANCELLING = [1e16, 3.0, -1e16, 1e-3, 7e15, -7e15]


def together(values, kind):
    parts = [Parts(**{kind: [value]}) for value in values]
    message = parts[0].message()
    for part in parts[1:]:
        put_together(part.message(), message)
    return getattr(parts[0].of(message), kind)[0]


@pytest.mark.parametrize("seed", range(5))
def test_a_sum_is_the_exact_one_rounded_in_any_order(seed):
    values = np.random.default_rng(seed).permutation(CANCELLING).tolist()
    assert together(values, "sums") == float(sum(map(Fraction, values)))


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        ([1.0, math.inf, 2.0], "sums", math.inf),
        ([1e308, 1e308], "sums", math.inf),
        ([-2.0, -3.0], "largest", -2.0),
        ([3e200, 4e200], "norms", pytest.approx(5e200)),
        ([3e-200, 4e-200], "norms", pytest.approx(5e-200)),
    ],
)
def test_numbers_together(values, kind, expected):
    assert together(values, kind) == expected


@pytest.mark.parametrize("kind", ["sums", "largest", "norms"])
def test_what_is_not_a_number_stays_so(kind):
    assert math.isnan(together([1.0, math.nan, 2.0], kind)) and math.isnan(together([math.nan, 1.0], kind))


def test_infinities_of_both_signs_have_no_sum():
    assert math.isnan(together([math.inf, -math.inf, 1.0], "sums"))


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_all_ranks_get_what_rank_0_decides_of_all(world):
    """Of records that fit into one message, and of longer ones."""
    comm, called = Communicator(world, Events()), []
    own = Parts(sums=[1e16 * (-1) ** world.rank, 0.1], largest=[world.rank], norms=[1.0])

    def decide(parts, count):
        called.append(count)
        return [*parts.sums, *parts.largest, *parts.norms, *range(count)]

    ranks = range(world.size)
    exact = sum(Fraction(1e16) * (-1) ** rank for rank in ranks), world.size * Fraction(0.1)
    for count in (0, 27, 28, 1000):
        found = comm.combine(own, lambda parts, count=count: decide(parts, count))
        assert found[:3] == (float(exact[0]), float(exact[1]), world.size - 1.0)
        assert found[3] == pytest.approx(world.size**0.5) and list(found[4:]) == list(range(count))
    assert len(called) == 4 * (world.rank == 0)
    assert comm.largest(world.rank, -world.rank) == [world.size - 1, 0]
    assert comm.numbers(world.rank**2) == [rank**2 for rank in ranks]
