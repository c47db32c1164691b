"""Calls of collectives as amounts: how many, and their seconds on a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from apts_mpi.scaling.collectives import Round, choose
from apts_mpi.scaling.network import Network

# Bytes of a scalar, of a number that a reduction puts together, and of the first message of a record.
SCALAR, NUMBER, RECORD = 8, 24, 256

# Amounts of what costs time, by the name of the unknown in `UNITS`; those of `NETWORK` are seconds.
Amounts = dict[str, float]

NETWORK = "network"

# How a message from one rank to the next is called beside the collectives.
SEND = "send"


@dataclass(frozen=True)
class Call:
    """So many equal calls, one after the other.

    Attributes
    ----------
    operation
        A collective of `apts_mpi.scaling.collectives`, or `SEND`.
    group, ranks
        ``world``, ``stage`` (the ranks that share one) or ``replica`` (a rank of each stage), and how many they are.
    size
        Bytes, as for `apts_mpi.scaling.collectives.choose`.
    times
        How many.
    """

    operation: str
    ranks: int
    size: float
    times: int = 1
    group: str = "world"


@dataclass(frozen=True)
class Term:
    """Work and calls of one part of an iteration."""

    work: Amounts = field(default_factory=dict)
    calls: tuple[Call, ...] = ()


@dataclass(frozen=True)
class Exchanges:
    """Messages and bytes of an iteration by event, of the rank with most, of a run in layout replicated.

    Attributes
    ----------
    events : Mapping of str to (int, float)
        Of each event how many collectives, and the bytes that a rank gives to one.
    """

    events: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def sums(self, event: str, ranks: int) -> tuple[Call, ...]:
        """Those of an event as sums, whose bytes do not depend on the ranks."""
        times, size = self.events.get(event, (0, 0.0))
        return (Call("allreduce", ranks, size, times),) if times else ()

    def agreement(self, ranks: int) -> tuple[Call, ...]:
        """Of the events ``judge`` and ``data``: reductions and broadcasts in turn, and what is said of the batch."""
        times, size = self.events.get("judge", (0, 0.0))
        said, _ = self.events.get("data", (0, 0.0))
        reductions = Call("reduction", ranks, max(size, NUMBER), (times + 1) // 2)
        broadcasts = Call("broadcast", ranks, RECORD, times // 2)
        exchanges = Call("allreduce", ranks, 4 * SCALAR, said)
        return tuple(call for call in (reductions, broadcasts, exchanges) if call.times)


@dataclass(frozen=True)
class Machine:
    """The network, and the MPI library: ``mpich`` or ``open-mpi``."""

    network: Network
    library: str = "mpich"

    def amounts(self, calls: Iterable[Call], replicas: int = 1) -> Amounts:
        """Calls, and their seconds on the network.

        Parameters
        ----------
        calls
            Of a term.
        replicas
            Ranks of a stage, which are neighbours; those of a replica are so many ranks apart.
        """
        found = {"call": 0.0, NETWORK: 0.0}
        for call in calls:
            if call.ranks == 1:
                continue
            stride = replicas if call.group == "replica" else 1
            hop = (Round(call.size, 1),)
            rounds = (
                hop if call.operation == SEND else choose(self.library, call.operation, call.ranks, call.size).rounds
            )
            found["call"] += call.times
            found[NETWORK] += call.times * self.network.seconds(rounds, stride)
        return found
