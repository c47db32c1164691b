"""The rounds of a collective, by the algorithms that MPICH and Open MPI choose by size.

Algorithms and costs are those of Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in
MPICH (doi 10.1177/1094342005051521); the sizes are those of MPICH's defaults and of Open MPI's
``coll_tuned_decision_fixed.c``. ``skeleton.c`` does the same rounds by these names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Bytes at which MPICH takes other algorithms, and the ranks below which a long broadcast is a tree.
LONG_REDUCTION, BRUCK_GATHER, LONG_GATHER, LONG_BROADCAST, FEW_RANKS = 2048, 81920, 524288, 12288, 8

# The same of Open MPI; a segment of a chain is a message.
LONG_RING, SHORT_GATHER, LONG_CHAIN, SEGMENT = 10000, 50000, 370728, 65536


@dataclass(frozen=True)
class Round:
    """What all ranks of a group do at a time.

    Attributes
    ----------
    size
        Bytes of a message.
    reach
        Ranks between the two that are farthest apart.
    crowd
        Ranks that send at the same time over the same links, from one group of so many neighbours to another.
    times
        How often, one after the other.
    """

    size: float
    reach: int
    crowd: int = 1
    times: int = 1


Rounds = tuple[Round, ...]


@dataclass(frozen=True)
class Algorithm:
    """One that was chosen; its name is that in ``skeleton.c``."""

    name: str
    rounds: Rounds


def doublings(ranks: int) -> int:
    """log2 of the ranks, rounded up."""
    return math.ceil(math.log2(ranks))


def _halves(ranks: int) -> range:
    """Exponents of the distances among the largest power of two of the ranks."""
    return range(int(math.log2(ranks)))


def _folded(ranks: int, size: float, rounds: Rounds) -> Rounds:
    """Ranks beyond a power of two give what they have to a neighbour, and take the result from it."""
    return rounds if ranks == 2 ** len(_halves(ranks)) else (Round(size, 1), *rounds, Round(size, 1))


def doubling(ranks: int, size: float) -> Algorithm:
    """Recursive doubling of a sum: all of it in each round."""
    rounds = tuple(Round(size, 2**power, 2**power) for power in _halves(ranks))
    return Algorithm("doubling", _folded(ranks, size, rounds))


def rabenseifner(ranks: int, size: float) -> Algorithm:
    """Reduce-scatter by recursive halving, neighbours first, and the same back as an allgather."""
    there = tuple(Round(size / 2 ** (power + 1), 2**power, 2**power) for power in _halves(ranks))
    return Algorithm("rabenseifner", _folded(ranks, size, there + there[::-1]))


def ring_sum(ranks: int, size: float) -> Algorithm:
    """Reduce-scatter and allgather in a ring."""
    return Algorithm("ring_sum", (Round(size / ranks, ranks, times=2 * (ranks - 1)),))


def tree(ranks: int, size: float) -> Algorithm:
    """A binomial tree, from or to rank 0."""
    return Algorithm("tree", tuple(Round(size, 2**power) for power in range(doublings(ranks))))


def chain(ranks: int, size: float) -> Algorithm:
    """A chain of all ranks, segment by segment."""
    segments = max(1, math.ceil(size / SEGMENT))
    return Algorithm("chain", (Round(size / segments, ranks, times=ranks - 2 + segments),))


def gathered_tree(ranks: int, size: float) -> Algorithm:
    """A binomial tree on which parts grow, on the way to rank 0, or shrink, on the way from it."""
    return Algorithm("gathered_tree", _parts(ranks, size, 1))


def _parts(ranks: int, size: float, crowd: int) -> Rounds:
    """In each round twice as much as in the one before, up to all but the own part together."""
    rounds, left = [], ranks - 1
    for power in range(doublings(ranks)):
        sent = min(2**power, left)
        rounds.append(Round(size * sent / ranks, 2**power, max(1, crowd * 2**power)))
        left -= sent
    return tuple(rounds)


def gather_doubling(ranks: int, size: float) -> Algorithm:
    """Recursive doubling of an allgather, for powers of two."""
    return Algorithm("gather_doubling", _parts(ranks, size, 1))


def bruck(ranks: int, size: float) -> Algorithm:
    """The same among any number of ranks, in rounds to the ranks 1, 2, 4, … on."""
    rounds = tuple(Round(part.size, ranks, part.crowd) for part in _parts(ranks, size, 1))
    return Algorithm("bruck", rounds)


def ring(ranks: int, size: float) -> Algorithm:
    """An allgather in a ring."""
    return Algorithm("ring", (Round(size / ranks, ranks, times=ranks - 1),))


def neighbours(ranks: int, size: float) -> Algorithm:
    """An allgather that exchanges two parts with either neighbour in turn, for even numbers of ranks."""
    return Algorithm("neighbours", (Round(2.0 * size / ranks, ranks, times=ranks // 2),))


def scatter_doubling(ranks: int, size: float) -> Algorithm:
    """A broadcast as a scatter and an allgather by recursive doubling."""
    scattered = tuple(Round(part.size, part.reach) for part in reversed(_parts(ranks, size, 1)))
    return Algorithm("scatter_doubling", scattered + gather_doubling(ranks, size).rounds)


def scatter_ring(ranks: int, size: float) -> Algorithm:
    """A broadcast as a scatter and an allgather in a ring."""
    scattered = tuple(Round(part.size, part.reach) for part in reversed(_parts(ranks, size, 1)))
    return Algorithm("scatter_ring", scattered + ring(ranks, size).rounds)


def halving_tree(ranks: int, size: float) -> Algorithm:
    """Rabenseifner's algorithm of a sum on rank 0: reduce-scatter, then a gather on a tree."""
    there = rabenseifner(2 ** len(_halves(ranks)), size).rounds[: len(_halves(ranks))]
    back = tuple(Round(part.size, part.reach) for part in reversed(there))
    alone = ranks == 2 ** len(_halves(ranks))
    return Algorithm("halving_tree", (there if alone else (Round(size, 1), *there)) + back)


def barrier(ranks: int, _: float) -> Algorithm:
    """Dissemination (Hensgen, Finkel and Manber, doi 10.1007/BF01379320)."""
    return Algorithm("barrier", tuple(Round(0.0, ranks) for _ in range(doublings(ranks))))


def _is_power(ranks: int) -> bool:
    return ranks & (ranks - 1) == 0


def _mpich_allgather(ranks: int, size: float) -> Algorithm:
    if _is_power(ranks) and size < LONG_GATHER:
        return gather_doubling(ranks, size)
    return bruck(ranks, size) if size < BRUCK_GATHER else ring(ranks, size)


def _mpich_broadcast(ranks: int, size: float) -> Algorithm:
    if size < LONG_BROADCAST or ranks < FEW_RANKS:
        return tree(ranks, size)
    return scatter_doubling(ranks, size) if size < LONG_GATHER and _is_power(ranks) else scatter_ring(ranks, size)


def _open_mpi_allgather(ranks: int, size: float) -> Algorithm:
    if size < SHORT_GATHER:
        return gather_doubling(ranks, size) if _is_power(ranks) else bruck(ranks, size)
    return ring(ranks, size) if ranks % 2 else neighbours(ranks, size)


Choice = Callable[[int, float], Algorithm]

# By the name of the library and of the collective. A broadcast of Open MPI below `LONG_CHAIN` that is a split binary
# tree there is a binomial one here.
LIBRARIES: Mapping[str, Mapping[str, Choice]] = {
    "mpich": {
        "allreduce": lambda ranks, size: (doubling if size <= LONG_REDUCTION else rabenseifner)(ranks, size),
        "reduction": lambda ranks, size: (tree if size < LONG_REDUCTION else halving_tree)(ranks, size),
        "allgather": _mpich_allgather,
        "broadcast": _mpich_broadcast,
        "gather": gathered_tree,
        "barrier": barrier,
    },
    "open-mpi": {
        "allreduce": lambda ranks, size: (doubling if size < LONG_RING else ring_sum)(ranks, size),
        "reduction": lambda ranks, size: (tree if size < LONG_REDUCTION else chain)(ranks, size),
        "allgather": _open_mpi_allgather,
        "broadcast": lambda ranks, size: (tree if size < LONG_CHAIN else chain)(ranks, size),
        "gather": gathered_tree,
        "barrier": barrier,
    },
}


def choose(library: str, operation: str, ranks: int, size: float) -> Algorithm:
    """The algorithm that a library takes for a collective of ``size`` bytes; alone there are no rounds.

    Parameters
    ----------
    library, operation
        Names in `LIBRARIES`.
    ranks
        Of the group.
    size
        Of each rank, for a gather and an allgather of all ranks together.
    """
    return LIBRARIES[library][operation](ranks, size) if ranks > 1 else Algorithm("tree", ())
