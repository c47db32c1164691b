"""How the work of layers is cut into parts for ranks."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apts_mpi.network.shared_work import Work, shared_work


def cost_of(works, start, stop):
    """Of a range on one rank, by adding up its elements."""
    touched = [(max(start, work.start), min(stop, work.stop), work) for work in works]
    return sum(work.fixed + work.each * (last - first) for first, last, work in touched if first < last)


def places_of(works):
    return [work.start + place for work in works for place in work.places]


@st.composite
def layers(draw):
    start, found = draw(st.integers(0, 5)), []
    for _ in range(draw(st.integers(1, 3))):
        rows, width, biases = (draw(st.integers(1, 4)) for _ in range(3))
        places = range(0, rows * width, width) if draw(st.booleans()) else range(1)
        fixed, each = draw(st.integers(0, 20)), draw(st.integers(1, 9))
        found.append(Work(start, start + rows * width + biases, places, float(fixed), float(each)))
        start = found[-1].stop
    return found


@given(works=layers(), ranks=st.integers(1, 4))
def test_parts_are_the_best_of_all_ways_of_cutting(works, ranks):
    ranges = shared_work(works, ranks)
    begin, end = works[0].start, works[-1].stop
    assert [ranges[0][0], ranges[-1][1], len(ranges)] == [begin, end, ranks]
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    places = places_of(works)
    assert {start for start, stop in ranges if start < stop} <= set(places)
    ways = itertools.combinations_with_replacement([*places, end], ranks - 1)
    best = min(max(cost_of(works, *pair) for pair in itertools.pairwise([begin, *way, end])) for way in ways)
    assert max(cost_of(works, *part) for part in ranges) == pytest.approx(best)


def test_a_layer_that_costs_more_than_all_others_is_shared():
    """784 inputs of 128 outputs, and four layers of 128 of 128, on two ranks, both of which invert for the first."""
    works, start = [], 0
    for inputs in (784, 128, 128, 128, 128):
        size = 128 * (inputs + 1)
        works.append(Work(start, start + size, range(0, 128 * inputs, inputs), inputs**3 / 20, 128.0 + inputs))
        start += size
    (_, cut), _ = ranges = shared_work(works, 2)
    assert cut < works[0].stop
    halves = [cost_of(works, *part) for part in ranges]
    assert max(halves) < 0.6 * sum(work.cost for work in works)
