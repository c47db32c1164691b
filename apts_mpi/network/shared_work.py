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
        ends = [*work.places[1:], work.stop - work.start]
        done, step = 0, 0
        while step < len(ends):
            room = capacity - load - work.fixed
            if work.each * (ends[-1] - done) <= room:
                break
            # How many steps fit, found as the places are evenly apart.
            fitting = min(int(room / work.each) // work.places.step, len(ends) - 1 - step) if room > 0.0 else 0
            fitting = fitting or (load == 0.0)
            step += fitting
            if step == len(ends):
                break
            done = ends[step - 1] if step else 0
            yield work.start + done
            load = 0.0
        load += work.fixed + work.each * (ends[-1] - done)
