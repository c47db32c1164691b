"""Rounds of collectives and what a network makes of them, against values computed by hand."""

from typing import NamedTuple

import pytest

from apts_mpi.errors import InvalidInput
from apts_mpi.scaling.collectives import choose
from apts_mpi.scaling.network import Network, read_network


class Collective(NamedTuple):
    operation: str
    ranks: int
    size: float
    name: str
    rounds: int
    sent: float
    library: str = "mpich"


COLLECTIVES = [
    # Recursive doubling: all of it in each of three rounds.
    Collective("allreduce", 8, 1024, "doubling", rounds=3, sent=3 * 1024),
    # Rabenseifner: 4000 + 2000 + 1000 there and back.
    Collective("allreduce", 8, 8000, "rabenseifner", rounds=6, sent=14000),
    # Five ranks: all of it to a neighbour and back, 4000 + 2000 there and back among four.
    Collective("allreduce", 5, 8000, "rabenseifner", rounds=6, sent=28000),
    Collective("allreduce", 8, 8000, "doubling", rounds=3, sent=24000, library="open-mpi"),
    Collective("allreduce", 8, 80000, "ring_sum", rounds=14, sent=140000, library="open-mpi"),
    Collective("reduction", 8, 8, "tree", rounds=3, sent=24),
    Collective("reduction", 4, 4096, "halving_tree", rounds=4, sent=6144),
    # Two segments along four ranks: the last has the second after four messages.
    Collective("reduction", 4, 131072, "chain", rounds=4, sent=4 * 65536, library="open-mpi"),
    Collective("allgather", 8, 8000, "gather_doubling", rounds=3, sent=7000),  # 1000 + 2000 + 4000
    Collective("allgather", 8, 800_000, "ring", rounds=7, sent=700_000),  # seven times 100000
    Collective("allgather", 6, 6000, "bruck", rounds=3, sent=5000),  # 1000 + 2000 + 2000
    Collective("allgather", 6, 600_000, "ring", rounds=5, sent=500_000),
    Collective("allgather", 6, 600_000, "neighbours", rounds=3, sent=600_000, library="open-mpi"),
    Collective("gather", 8, 800, "gathered_tree", rounds=3, sent=700),  # 100 + 200 + 400 on the way to the root
    Collective("broadcast", 8, 100, "tree", rounds=3, sent=300),
    Collective("broadcast", 4, 1_000_000, "tree", rounds=2, sent=2_000_000),
    # 40 + 20 + 10 scattered, 10 + 20 + 40 by recursive doubling.
    Collective("broadcast", 8, 80_000, "scatter_doubling", rounds=6, sent=140_000),
    # No power of two: 8/9 in four rounds, 8/9 in a ring of eight steps.
    Collective("broadcast", 9, 90_000, "scatter_ring", rounds=12, sent=160_000),
    Collective("broadcast", 16, 12_287, "tree", rounds=4, sent=49_148),
    Collective("broadcast", 16, 12_288, "scatter_doubling", rounds=8, sent=23_040),
    Collective("broadcast", 8, 524_288, "scatter_ring", rounds=10, sent=917_504),
    *(Collective("barrier", ranks, 0, "barrier", rounds, 0) for ranks, rounds in ((2, 1), (5, 3), (8, 3))),
    *(
        Collective(operation, 1, 1e6, "tree", rounds=0, sent=0)
        for operation in ("allreduce", "allgather", "gather", "broadcast", "reduction", "barrier")
    ),
]


@pytest.mark.parametrize("case", COLLECTIVES, ids=lambda case: "-".join(map(str, case)))
def test_collectives(case):
    found = choose(case.library, case.operation, case.ranks, case.size)
    assert (found.name, sum(part.times for part in found.rounds)) == (case.name, case.rounds)
    assert sum(part.times * part.size for part in found.rounds) == pytest.approx(case.sent)


def seconds(network, operation, ranks, size):
    return read_network(network).seconds(choose("mpich", operation, ranks, size).rounds)


def test_a_network_counts_links():
    """64 ranks on leaves of 16: four rounds within a leaf, two of four links beyond."""
    assert seconds("flat:1GB/s,4us", "allreduce", 64, 8) == pytest.approx(6 * (4e-6 + 8e-9))
    assert seconds("fat-tree:1GB/s,4us", "allreduce", 64, 8) == pytest.approx((4 * 2 + 2 * 4) * 1e-6 + 6 * 8e-9)


def test_what_crosses_groups_of_a_dragonfly_shares_their_links():
    """128 ranks, two groups of 64: in the last round a quarter of the bandwidth is there."""
    latency = (2 * 2 + 4 * 3 + 5) * 1e-6
    assert seconds("dragonfly:1GB/s,5us", "allreduce", 128, 1000) == pytest.approx(latency + (6 + 4) * 1e-6)


def test_a_dragonfly_that_simgrid_cannot_route():
    assert "16,16;1,4;16,4;4" in read_network("dragonfly:1GB/s,5us").platform(1024)
    with pytest.raises(InvalidInput, match="a dragonfly of 1025 hosts cannot be simulated; give 1024 ranks or fewer"):
        read_network("dragonfly:1GB/s,5us").platform(1025)


def test_networks_are_read(tmp_path):
    assert read_network("fat-tree:12.5GB/s,1us") == Network("fat-tree", 12.5e9, 1e-6)
    file = tmp_path / "machine.json"
    file.write_text('{"topology": "flat", "bandwidth": 1e9, "latency": 2e-6}')
    assert read_network(str(file)) == Network("flat", 1e9, 2e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("torus:1GB/s,1us", "'torus' is none of flat, fat-tree, dragonfly"),
        ("fat-tree:0GB/s,1us", "0.0 is no positive number"),
        ("fat-tree:1e400GB/s,1us", "inf is no positive number"),
        ("fat-tree:--GB/s,1us", "is no network and no machine file"),
        ("fat-tree", "is no network and no machine file"),
        ("12.5GB/s", "is no network and no machine file"),
    ],
)
def test_networks_that_cannot_be_used(given, message):
    with pytest.raises(InvalidInput, match=message.replace("(", r"\(")) as error:
        read_network(given)
    assert "fat-tree:12.5GB/s,1us" in str(error.value)


@pytest.mark.parametrize("content", ["[1]", "{}", '{"topology": "flat", "bandwidth": "fast", "latency": 1}', "\x00"])
def test_machine_files_that_cannot_be_used(tmp_path, content):
    file = tmp_path / "machine.json"
    file.write_text(content)
    with pytest.raises(InvalidInput, match=r"^network: .*; give TOPOLOGY:BANDWIDTH,LATENCY"):
        read_network(str(file))
