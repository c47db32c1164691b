"""The network between ranks: latency and bandwidth, what a round of messages takes on it, and SimGrid's platform."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from apts_mpi.errors import InvalidInput
from apts_mpi.scaling.collectives import Round

# Hosts of a leaf of the fat tree; of a router, and routers of a group, of the dragonfly.
LEAF, NODES, ROUTERS = 16, 4, 16

# Links between two groups of a dragonfly: a quarter of what all of a group's hosts could send at a time.
BETWEEN_GROUPS = NODES * ROUTERS // 4

UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "ns": 1e-9, "us": 1e-6, "ms": 1e-3}
GIVEN = re.compile(r"([a-z-]+):([0-9.eE+-]+)(kB|MB|GB)/s,([0-9.eE+-]+)(ns|us|ms)")
REMEDY = "give TOPOLOGY:BANDWIDTH,LATENCY, such as fat-tree:12.5GB/s,1us, or the file of apts_mpi.scaling network"


@dataclass(frozen=True)
class Tier:
    """Ranks that are no further apart than ``span``.

    Attributes
    ----------
    span
        Ranks.
    links
        That a message between them goes over.
    share
        Of the bandwidth, if all of them send at a time to ranks one tier further.
    """

    span: float
    links: int
    share: float = 1.0


TOPOLOGIES = {
    "flat": (Tier(math.inf, 1),),
    "fat-tree": (Tier(LEAF, 2), Tier(math.inf, 4)),
    "dragonfly": (
        Tier(NODES, 2),
        Tier(NODES * ROUTERS, 3),
        Tier(math.inf, 5, BETWEEN_GROUPS / (NODES * ROUTERS)),
    ),
}


@dataclass(frozen=True)
class Network:
    """A network.

    Parameters
    ----------
    topology
        A name in `TOPOLOGIES`.
    bandwidth
        Bytes a second of a link.
    latency
        Seconds of an empty message between the ranks that are farthest apart; each link has an equal part of it.

    Raises
    ------
    InvalidInput
        For other names, and numbers that are not positive.
    """

    topology: str
    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        if self.topology not in TOPOLOGIES:
            raise InvalidInput(f"network: {self.topology!r} is none of {', '.join(TOPOLOGIES)}; {REMEDY}")
        for value in (self.bandwidth, self.latency):
            if not (isinstance(value, int | float) and 0.0 < value < math.inf):
                raise InvalidInput(f"network: {value!r} is no positive number; {REMEDY}")

    def __str__(self) -> str:
        return f"{self.topology}:{self.bandwidth / 1e9:.4g}GB/s,{self.latency * 1e6:.4g}us"

    def _tier(self, distance: float) -> Tier:
        return next(tier for tier in TOPOLOGIES[self.topology] if distance < tier.span)

    @property
    def link_latency(self) -> float:
        """Seconds a link."""
        return self.latency / TOPOLOGIES[self.topology][-1].links

    def seconds(self, rounds: Iterable[Round], stride: int = 1) -> float:
        """Of rounds one after the other, in a group of every ``stride``-th rank."""
        return sum(part.times * self._seconds(part, stride) for part in rounds)

    def _seconds(self, part: Round, stride: int) -> float:
        # Of neighbours that are a stride apart there are as many fewer on the links.
        share = self._tier(part.crowd * stride).share if part.crowd > 1 else 1.0
        share = min(1.0, share * stride)
        return self.link_latency * self._tier(part.reach * stride).links + part.size / (self.bandwidth * share)

    def platform(self, ranks: int) -> str:
        """SimGrid's platform of at least so many hosts ``n0``, ``n1``, …"""
        hosts, words = _dragonfly(ranks) if self.topology == "dragonfly" else _fat_tree(ranks)
        name = "DRAGONFLY" if self.topology == "dragonfly" else "FAT_TREE"
        return (
            '<?xml version="1.0"?>\n<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">\n'
            f'<platform version="4.1">\n<cluster id="machine" prefix="n" suffix="" radical="0-{hosts - 1}" speed="1Gf" '
            f'bw="{self.bandwidth:.9g}Bps" lat="{self.link_latency:.9g}s" sharing_policy="SPLITDUPLEX" '
            f'topology="{name}" topo_parameters="{words}"/>\n</platform>\n'
        )


def _fat_tree(ranks: int) -> tuple[int, str]:
    """Two levels; from each leaf as many links go up as it has hosts."""
    leaves = max(2, math.ceil(ranks / LEAF))
    return LEAF * leaves, f"2;{LEAF},{leaves};1,{LEAF};1,1"


def _dragonfly(ranks: int) -> tuple[int, str]:
    """Of two groups or more, each with a link between any two of its routers that is as wide as a router's hosts.

    SimGrid finds the way to another group by the router with that group's number: there are no more groups than that.
    """
    groups = max(2, math.ceil(ranks / (NODES * ROUTERS)))
    if groups > ROUTERS:
        most = NODES * ROUTERS * ROUTERS
        raise InvalidInput(f"network: a dragonfly of {ranks} hosts cannot be simulated; give {most} ranks or fewer")
    return groups * NODES * ROUTERS, f"{groups},{BETWEEN_GROUPS};1,{NODES};{ROUTERS},{NODES};{NODES}"


def read_network(given: str) -> Network:
    """What ``--network`` says: words, or a machine file.

    Raises
    ------
    InvalidInput
        If it says nothing that can be used.
    """
    words = GIVEN.fullmatch(given)
    try:
        if words:
            topology, bandwidth, size, latency, unit = words.groups()
            return Network(topology, float(bandwidth) * UNITS[size], float(latency) * UNITS[unit])
        found = json.loads(Path(given).read_text(encoding="utf-8"))
        return Network(found["topology"], found["bandwidth"], found["latency"])
    except InvalidInput:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(f"network: {given!r} is no network and no machine file ({error}); {REMEDY}") from error
