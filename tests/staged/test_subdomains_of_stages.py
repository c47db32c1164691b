"""Subdomains are a property of the run: stages are made of whole ones, and a note says where that cannot be."""

from dataclasses import replace

import pytest
import torch
from mpi4py import MPI
from networks import blocks, classified, cross_entropy, options, tied, uneven
from staged_networks import built, staged, trace

from apts_mpi import APTS, StagedAPTS, build_stage
from apts_mpi.checkpoint import CheckpointDirectory, newest_valid
from apts_mpi.errors import InvalidInput
from apts_mpi.network.parameters import trained_parameters
from apts_mpi.network.partition import make_subdomains
from apts_mpi.network.segments import layers_of
from apts_mpi.options import PipelineOptions
from apts_mpi.staged.stages import cut, multiplications, places_of
from apts_mpi.staged.subdomains import modules_begun

BATCHES = classified(37), classified(23, seed=2)


def layers(network):
    return layers_of([place.module for place in places_of(network)], trained_parameters(network))


def stages_of(network, stages, subdomains, costs=None):
    """Where the stages begin that are made of so many subdomains, and where these do, as modules."""
    begun = modules_begun(layers(network), make_subdomains(layers(network), subdomains, "layer", 0))
    found = cut(places_of(network), stages, PipelineOptions(), costs, begun)
    return [stage.start for stage in found], sorted(begun)


@pytest.mark.parametrize("subdomains", range(1, 10))
@pytest.mark.parametrize("stages", range(1, 10))
@pytest.mark.parametrize("balance", ["parameters", "cost"])
def test_stages_are_made_of_whole_subdomains(stages, subdomains, balance):
    network = uneven()
    costs = multiplications(places_of(network), BATCHES[0][0]) if balance == "cost" else None
    starts, begun = stages_of(network, stages, subdomains, costs)
    assert len(starts) == stages
    if stages <= subdomains:
        assert set(starts) <= set(begun)
    else:
        assert set(begun) <= set(starts)


@pytest.mark.parametrize("stages", [2, 3, 4, 6, 10])
def test_stages_do_not_part_what_shares_a_tensor(stages):
    """Nor where the subdomains do, or are too few."""
    network = tied()
    places = [place.name for place in places_of(network)]
    for subdomains in range(1, 11):
        starts, _ = stages_of(network, stages, subdomains)
        assert len(starts) == stages and not {places.index("3"), places.index("4")} & set(starts)
    with pytest.raises(InvalidInput, match="cannot share a parameter between stages, and 2.weight of stage"):
        stages_of(network, 11, 5)


def test_a_subdomain_within_a_module_begins_no_stage():
    starts, begun = stages_of(blocks(), 3, 5)
    assert len(begun) == 3 and starts == begun
    assert stages_of(blocks(), 4, 5)[0] == sorted({*begun, *stages_of(blocks(), 4, 5)[0]})


def replicated(chosen, network, batches=BATCHES):
    """What the replicated layout does with the same subdomains, on this rank alone."""
    chosen = replace(chosen, layout="replicated", replicas=1)
    return trace(APTS(network, cross_entropy, comm=MPI.COMM_SELF, options=chosen), batches)


def assert_alike(found, expected):
    """Up to sums in another order, and what they leave of differences of losses."""
    numbers = (torch.tensor(values, dtype=torch.float64) for values in (found, expected))
    torch.testing.assert_close(*numbers, rtol=1e-10, atol=1e-10)


@pytest.mark.mpi
@pytest.mark.all_sizes(coarse="gauss-newton", solver="kfac")
@pytest.mark.parametrize("coarse", ["none", "gauss-newton"])
@pytest.mark.parametrize("solver", ["adam", "kfac", "lsr1"])
def test_the_iterates_depend_on_the_subdomains_alone(world, coarse, solver):
    """On 1, 2, 3 and more stages, and as replicated."""
    number = max(3, world.size)
    chosen = staged(options(subdomains=number, initial_radius=0.2), coarse=coarse, solver=solver, micro_batches=3)
    solvers = StagedAPTS(uneven(), cross_entropy, comm=world, options=chosen)
    assert solvers.holding.notes == [] and solvers.subdomains == number
    found = trace(solvers, BATCHES)
    assert_alike(found, replicated(chosen, uneven()))


@pytest.mark.mpi(min_size=2)
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize("solver", ["adam", "gauss-newton"])
def test_subdomains_that_cut_layers(world, solver):
    """Of a run with equal ranges of the vector that goes on in stages."""
    chosen = staged(options(subdomains=6, partition="auto", initial_radius=0.2), coarse="gauss-newton", solver=solver)
    chosen = replace(chosen, schwarz=replace(chosen.schwarz, cuts=(0, 100, 207, 300, 450, 590)))
    solver = StagedAPTS(uneven(), cross_entropy, comm=world, options=chosen)
    assert solver.holding.notes == []
    assert_alike(trace(solver, BATCHES), replicated(chosen, uneven()))


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_with_replicas(world):
    if world.size % 2:
        pytest.skip("two replicas need an even number of ranks")
    chosen = staged(options(subdomains=5, replicas=2, initial_radius=0.2), coarse="gauss-newton", solver="kfac")
    found = trace(StagedAPTS(uneven(), cross_entropy, comm=world, options=chosen), BATCHES)
    assert_alike(found, replicated(chosen, uneven()))


@pytest.mark.mpi
@pytest.mark.all_sizes(network=tied)
@pytest.mark.parametrize("network", [tied, blocks])
def test_networks_that_can_be_cut_at_few_places(world, network):
    """What the stages cannot have whole is said, and both layouts can have what becomes of it."""
    size = min(world.size, 4)
    group = world.Split(int(world.rank < size), world.rank)
    if world.rank < size:
        chosen = staged(options(subdomains=5, initial_radius=0.2), coarse="gauss-newton", solver="adam")
        solver = StagedAPTS(built(network), cross_entropy, comm=group, options=chosen)
        saved = solver.save()[1]["subdomains"]
        cuts = tuple(record["owned_start"] for record in saved)
        assert set(cuts) >= {part.owned_start for part in make_subdomains(layers(built(network)), 5, "layer", 0)}
        assert len(solver.holding.notes) == (len(cuts) > 5)
        same = replace(chosen, subdomains=len(cuts), schwarz=replace(chosen.schwarz, cuts=cuts))
        found = trace(solver, BATCHES)
        assert_alike(found, replicated(same, built(network)))
    group.Free()
    world.Barrier()


@pytest.mark.mpi(min_size=3)
@pytest.mark.all_sizes
def test_cuts_through_subdomains_are_said(world):
    """Named ones, those of other options before, and those of more stages than subdomains."""
    group = world.Split(int(world.rank < 3), world.rank)
    if world.rank < 3:
        ways = [
            ({"subdomains": 3}, {"cuts": "0.1.0,4.0.0"}, lambda chosen: uneven()),
            ({"subdomains": 3}, {}, lambda chosen: build_stage(uneven, comm=group, options=named)),
            ({"subdomains": None}, {}, lambda chosen: uneven()),
        ]
        named = staged(options(subdomains=None), cuts="0.1.0,4.0.0")
        notes = []
        for plain, pipeline, make in ways:
            chosen = staged(options(**plain), **pipeline)
            if plain["subdomains"] is None:
                chosen = replace(chosen, schwarz=replace(chosen.schwarz, cuts=(0, 363)))
            solver = StagedAPTS(make(chosen), cross_entropy, comm=group, options=chosen)
            notes += solver.holding.notes
            assert solver.step(BATCHES[0]).schwarz.loss > 0.0
        begins = "stage 1 (modules {}) begins within subdomain 0"
        assert notes == [
            f"subdomains: 3 become 4, as {begins.format('0.1.0 to 3.1')}; iterates are those of 4",
            f"subdomains: 3 become 4, as {begins.format('0.1.0 to 3.1')}; iterates are those of 4",
            f"subdomains: 2 become 3, as {begins.format('1.0 to 2.1')}; iterates are those of 3",
        ]
    group.Free()
    world.Barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_fewer_subdomains_than_stages_are_refused_where_they_are_asked_for(world):
    chosen = staged(options(subdomains=world.size - 1))
    for make in (uneven, lambda: build_stage(uneven, comm=world, options=replace(chosen, subdomains=None))):
        with pytest.raises(InvalidInput, match=f"subdomains: {world.size - 1} is too few for {world.size} stages"):
            StagedAPTS(make(), cross_entropy, comm=world, options=chosen)


CUTS = [
    ((0, 500, 700), "schwarz.cuts: 700 is not within the 600 parameters"),
    (
        (0, 20),
        "schwarz.cuts: 20 is within layer '0.0.0', from 0 to 44; give where layers begin, or --schwarz.partition",
    ),
]


@pytest.mark.parametrize(("cuts", "message"), CUTS)
def test_cuts_that_the_network_does_not_have(cuts, message):
    chosen = options()
    chosen = replace(chosen, subdomains=None, schwarz=replace(chosen.schwarz, cuts=cuts))
    with pytest.raises(InvalidInput, match=message):
        APTS(uneven(), cross_entropy, comm=MPI.COMM_SELF, options=chosen)


@pytest.mark.parametrize("cuts", [(), (1, 5), (0, 5, 5), (0, 7, 5)])
def test_cuts_rise_from_the_beginning(cuts):
    with pytest.raises(InvalidInput, match="schwarz.cuts: .* give rising numbers from 0 on"):
        replace(options().schwarz, cuts=cuts)
    with pytest.raises(InvalidInput, match=r"subdomains: 3 is not allowed; schwarz.cuts \(0, 5\) has another number"):
        replace(options(subdomains=3), schwarz=replace(options().schwarz, cuts=(0, 5)))
    with pytest.raises(InvalidInput, match=r"schwarz.cuts: \(0, 44\) are for subdomains of parameters; with .* null"):
        data = replace(options(decomposition="data").schwarz, cuts=(0, 44))
        APTS(uneven(), cross_entropy, comm=MPI.COMM_SELF, options=replace(options(), subdomains=2, schwarz=data))


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_the_library_says_that_subdomains_are_others(world, mpi_tmp_path):
    """Where they were left to the ranks, or have only their number in common; not where others were asked for."""
    chosen = staged(options(subdomains=None), solver="adam")
    saved = StagedAPTS(uneven(), cross_entropy, comm=world, options=chosen)
    saved.step(BATCHES[0])
    metadata = saved.save()[1]
    with CheckpointDirectory(mpi_tmp_path, saved.comm) as checkpoints:
        checkpoints.save(*saved.save(), 0)
    loss = saved.step().schwarz.loss
    cuts = tuple(record["owned_start"] for record in metadata["subdomains"])
    others = (0, *(part + 1 for part in cuts[1:]))
    plain = replace(chosen, layout="replicated")

    def notes(chosen, cuts=None):
        solver = APTS(
            uneven(),
            cross_entropy,
            comm=MPI.COMM_SELF,
            options=replace(chosen, schwarz=replace(chosen.schwarz, cuts=cuts, partition="auto")),
        )
        checkpoint, _ = newest_valid(mpi_tmp_path, solver.comm)
        with checkpoint:
            found = solver.load(checkpoint, checkpoint.metadata)
        if not found:
            solver.repeat(BATCHES[0])
            assert solver.step().schwarz.loss == pytest.approx(loss, rel=1e-10)
        return found

    said = "the subdomains are others than the saved ones, {} for {}, from number 0 on: what follows is another run"
    assert notes(plain, cuts) == []
    assert notes(plain) == [said.format(1, world.size)]
    assert notes(plain, others) == [said.format(world.size, world.size)]
    assert notes(replace(plain, subdomains=world.size + 1)) == []
