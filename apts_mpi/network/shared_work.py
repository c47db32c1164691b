"""Which ranks do which part of the work that layers make. Index arithmetic only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """The work of a layer.

    Attributes
    ----------
    start, stop
        Range of the flat vector.
    places
        Elements of it, counted from ``start``, at which another rank may go on; the first is 0.
    fixed
        Cost to each rank that does a part of it.
    each
        Cost of an element, above 0.
    """

    start: int
    stop: int
    places: range
    fixed: float
    each: float

    @property
    def cost(self) -> float:
        """Of all of it, on one rank."""
        return self.fixed + self.each * (self.stop - self.start)


def shared_work(works: Sequence[Work], ranks: int) -> list[tuple[int, int]]:
    """Ranges of the flat vector, one a rank and one after the other, so that the largest cost of a rank is least.

    Ranks for which nothing is left have empty ranges.
    """
    # All on one rank; and an even share of what does not depend on who does it.
    capacity, low = sum(work.cost for work in works), sum(work.cost - work.fixed for work in works) / ranks
    for _ in range(60):  # bisection to rounding
        middle = 0.5 * (low + capacity)
        if sum(1 for _ in _starts(works, middle)) <= ranks:
            capacity = middle
        else:
            low = middle
    begins = list(_starts(works, capacity))
    begins += [works[-1].stop] * (ranks + 1 - len(begins))
    return list(itertools.pairwise(begins))


def _starts(works: Sequence[Work], capacity: float) -> Iterator[int]:
    """Where ranks begin that are filled in turn up to ``capacity``, with one step between places at least."""
    load = 0.0
    yield works[0].start
    for work in works:
        size, places, place = work.stop - work.start, work.places, 0
        while (room := capacity - load - work.fixed) < work.each * (size - places[place]):
            # How many steps fit, found as the places are evenly apart; on a rank that has nothing yet, one at least.
            fitting = int(room / work.each) // places.step if room > 0.0 else 0
            left = len(places) - 1 - place
            steps = min(fitting, left) or (load == 0.0)
            if steps > left:
                break
            place += steps
            yield work.start + places[place]
            load = 0.0
        load += work.fixed + work.each * (size - places[place])
