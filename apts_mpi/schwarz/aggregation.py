"""Neighbouring subdomains grouped, so that the coarse level has no more columns than it is allowed.

Each group gives the coarse space one correction, the sum of its subdomains', and one part, theirs together: the span of
aggregation, as in algebraic multigrid (Vanek, Mandel, Brezina 1996, doi 10.1007/BF02238511), with groups that are even
ranges of subdomains.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from apts_mpi.curvature.linearisation import Column


@dataclass(frozen=True)
class Groups:
    """How many groups of subdomains this rank has, of which no column crosses to another stage.

    Attributes
    ----------
    own
        Their number here.
    columns
        Those that they give, of all stages.
    """

    own: int
    columns: int

    def of(
        self, corrections: Sequence[Column], parts: Sequence[tuple[int, int]]
    ) -> tuple[list[Column], list[tuple[int, int]]]:
        """A correction and a part for each group; those given where there are as many groups."""
        sums = [_sum(group) for group in _even(corrections, self.own)]
        return sums, [(group[0][0], group[-1][1]) for group in _even(parts, self.own)]


def most_groups(most: int, subdomains: int, total: Callable[[int], int], columns: Callable[[int], int]) -> Groups:
    """The most groups whose columns are no more than ``most``, or the fewest there can be. Collective.

    As many as subdomains where grouping makes no fewer columns, as those of a space of the user's may be its own.

    Parameters
    ----------
    most
        Columns of all stages.
    subdomains
        Those of this rank.
    total
        The sum over all stages, collective.
    columns
        How many so many groups of this rank give; collective.
    """
    stages, everywhere = total(1), total(subdomains)

    def own(groups: int) -> int:
        return share_of_groups(groups, subdomains, everywhere, stages)

    def of_all(groups: int) -> int:
        return total(columns(own(groups)))

    found = everywhere
    if of_all(everywhere) > most:
        found = stages + max(bisect_right(range(stages, everywhere), most, key=of_all) - 1, 0)
        found = everywhere if of_all(found) == of_all(everywhere) else found
    return Groups(own(found), of_all(found))


def share_of_groups(groups: int, subdomains: int, everywhere: int, stages: int) -> int:
    """How many of the groups a stage of some of all subdomains has: one, and of those beyond one a stage its share.

    The shares of all stages are no more than ``groups`` together.
    """
    return 1 + (groups - stages) * (subdomains - 1) // max(everywhere - stages, 1)


def _even(items: Sequence, groups: int) -> list[Sequence]:
    """Neighbours together, in as many groups as given, or as there are items."""
    groups = min(groups, len(items))
    cuts = [index * len(items) // groups for index in range(groups + 1)]
    return [items[start:stop] for start, stop in pairwise(cuts)]


def _sum(columns: Sequence[Column]) -> Column:
    """The sum of columns, in the least range that holds them."""
    if len(columns) == 1:
        return columns[0]
    start, stop = min(column.start for column in columns), max(column.stop for column in columns)
    values = columns[0].values.new_zeros(stop - start)
    for column in columns:
        values[column.start - start : column.stop - start] += column.values
    return Column(start, stop, values)
