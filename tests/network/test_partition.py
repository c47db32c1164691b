"""Index arithmetic: who owns which parameters and which samples."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apts_mpi import InvalidInput
from apts_mpi.network.partition import (
    Layer,
    balanced_cuts,
    make_subdomains,
    most_subdomains,
    multiplicity,
    part_of,
    split,
)
from apts_mpi.network.teams import Teams

sizes = st.integers(1, 300)
parts = st.integers(1, 40)


@given(size=st.integers(0, 300), count=parts)
def test_split_covers_in_order_and_is_even(size, count):
    ranges = [split(size, count, part) for part in range(count)]
    assert ranges[0][0] == 0 and ranges[-1][1] == size
    assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1


@given(size=sizes, count=parts)
def test_part_of_finds_the_part_of_split(size, count):
    for part in range(count):
        for item in range(*split(size, count, part)):
            assert part_of(size, count, item) == part


costs = st.lists(st.one_of(st.integers(1, 50), st.sampled_from([1, 1000])), min_size=1, max_size=8)


@given(costs=costs, data=st.data())
def test_cuts_are_the_best_there_are(costs, data):
    """Against all ways of cutting."""
    count = data.draw(st.integers(1, len(costs)))
    cuts = balanced_cuts(costs, count)
    assert cuts[0] == 0 and cuts[-1] == len(costs) and len(cuts) == count + 1
    assert all(start < stop for start, stop in itertools.pairwise(cuts))

    def largest(cuts):
        return max(sum(costs[start:stop]) for start, stop in itertools.pairwise(cuts))

    every = itertools.combinations(range(1, len(costs)), count - 1)
    assert largest(cuts) == min(largest([0, *inner, len(costs)]) for inner in every)


def test_cuts_of_a_real_network():
    """784-128-128-128-10: the large first layer has a part to itself."""
    assert balanced_cuts([100480, 16512, 16512, 1290], 2) == [0, 1, 4]


@st.composite
def layer_lists(draw):
    """Layers of one to twenty parameters, one segment each, with segments between them now and then."""
    layers, start, segment = [], 0, 0
    for _ in range(draw(st.integers(1, 9))):
        size, width = draw(st.integers(1, 20)), draw(st.integers(1, 3))
        layers.append(Layer(start, start + size, segment, segment + width - 1))
        start, segment = start + size, segment + width
    return layers


kinds = st.sampled_from(["layer", "index"])


@st.composite
def partitions(draw):
    layers, kind = draw(layer_lists()), draw(kinds)
    count = draw(st.integers(1, most_subdomains(layers, kind)))
    overlap = draw(st.integers(0, 3))
    return layers, kind, overlap, make_subdomains(layers, count, kind, overlap)


@given(partitions())
def test_owned_ranges_cover_the_vector_and_are_disjoint(case):
    layers, _, _, subdomains = case
    owned = [index for part in subdomains for index in range(part.owned_start, part.owned_stop)]
    assert owned == list(range(layers[-1].stop))
    assert all(part.owned_start < part.owned_stop for part in subdomains)
    assert [part.index for part in subdomains] == list(range(len(subdomains)))


@given(partitions())
def test_overlap_takes_whole_units_from_the_neighbours(case):
    layers, kind, overlap, subdomains = case
    starts = [layer.start for layer in layers] if kind == "layer" else list(range(layers[-1].stop))
    edges = [*starts, layers[-1].stop]
    for part in subdomains:
        first, last = edges.index(part.owned_start), edges.index(part.owned_stop)
        assert part.start == edges[max(first - overlap, 0)]
        assert part.stop == edges[min(last + overlap, len(edges) - 1)]


@given(partitions())
def test_segments_are_those_of_the_layers_that_are_touched(case):
    layers, _, _, subdomains = case
    for part in subdomains:
        inside = set(range(part.start, part.stop))
        touched = [layer for layer in layers if inside & set(range(layer.start, layer.stop))]
        assert part.first_segment == touched[0].first_segment
        assert part.last_segment == touched[-1].last_segment


@given(partitions())
def test_weights_sum_to_one_at_every_index(case):
    layers, _, _, subdomains = case
    total = Counter()
    for part in subdomains:
        ranges = multiplicity(subdomains, part)
        assert ranges[0][0] == part.start and ranges[-1][1] == part.stop
        assert all(before[1] == after[0] for before, after in itertools.pairwise(ranges))
        for start, stop, count in ranges:
            for index in range(start, stop):
                assert count == sum(other.start <= index < other.stop for other in subdomains)
                total[index] += 1.0 / count
    assert all(abs(total[index] - 1.0) < 1e-12 for index in range(layers[-1].stop))


def test_index_partition_is_even():
    subdomains = make_subdomains([Layer(0, 5, 0, 0), Layer(5, 23, 1, 1)], 6, "index", 0)
    lengths = [part.stop - part.start for part in subdomains]
    assert sum(lengths) == 23 and set(lengths) == {3, 4}


@pytest.mark.parametrize(("kind", "remedy"), [("layer", "; --schwarz.partition index makes more"), ("index", "")])
def test_too_many_subdomains(kind, remedy):
    layers = [Layer(0, 2, 0, 0), Layer(2, 5, 1, 1)]
    most = 2 if kind == "layer" else 5
    with pytest.raises(InvalidInput) as caught:
        make_subdomains(layers, 6, kind, 0)
    assert str(caught.value) == f"subdomains: 6 is too many; the {kind} partition makes at most {most}{remedy}"


@st.composite
def arrangements(draw):
    replicas = draw(st.integers(1, 4))
    return Teams(replicas * draw(st.integers(1, 6)), draw(st.integers(1, 9)), replicas)


datas = st.sampled_from(["shard", "full"])


@given(arrangements())
def test_teams_share_out_the_ranks_and_the_subdomains(teams):
    members = [rank for team in range(teams.count) for rank in teams.ranks_of(team)]
    assert members == list(range(teams.ranks))
    carried = [index for team in range(teams.count) for index in teams.subdomains_of(team)]
    assert carried == list(range(teams.subdomains))
    for team in range(teams.count):
        assert len(teams.ranks_of(team)) >= teams.replicas
        assert len(teams.subdomains_of(team)) >= 1
        assert all(teams.team_of(rank) == team for rank in teams.ranks_of(team))


@given(teams=arrangements(), batch_size=sizes)
def test_with_shards_every_sample_is_evaluated_once(teams, batch_size):
    seen = Counter()
    for rank in range(teams.ranks):
        for start, stop in teams.shards(rank, batch_size, "shard"):
            seen.update(range(start, stop))
    assert seen == Counter(range(batch_size))


@given(teams=arrangements(), batch_size=sizes)
def test_a_subdomain_has_the_same_shard_on_whatever_ranks(teams, batch_size):
    """What its team has of it together does not depend on the number of ranks."""
    alone = Teams(1, teams.subdomains, 1).shards(0, batch_size, "shard")
    for team in range(teams.count):
        passes = zip(*(teams.shards(rank, batch_size, "shard") for rank in teams.ranks_of(team)), strict=True)
        for index, pieces in zip(teams.subdomains_of(team), passes, strict=True):
            samples = [sample for start, stop in pieces for sample in range(start, stop)]
            assert samples == list(range(*alone[index]))


@given(teams=arrangements(), batch_size=sizes)
def test_with_full_data_every_team_evaluates_every_sample_once(teams, batch_size):
    for team in range(teams.count):
        ranges = [teams.shards(rank, batch_size, "full") for rank in teams.ranks_of(team)]
        assert all(len(of_rank) == 1 for of_rank in ranges)
        assert [sample for ((start, stop),) in ranges for sample in range(start, stop)] == list(range(batch_size))


@given(teams=arrangements(), local_data=datas)
def test_smallest_batch_leaves_no_pass_empty(teams, local_data):
    def empty(batch_size):
        ranges = [part for rank in range(teams.ranks) for part in teams.shards(rank, batch_size, local_data)]
        return any(start == stop for start, stop in ranges)

    least = teams.smallest_batch(local_data)
    assert not any(empty(batch_size) for batch_size in range(least, least + 50))
    if teams.ranks % teams.count == 0:  # with uneven teams it is on the safe side
        assert empty(least - 1)


def test_replicas_must_divide_the_ranks():
    with pytest.raises(InvalidInput, match="replicas: 3 does not divide the 4 ranks; give a divisor, or other ranks"):
        Teams(4, 2, 3)
