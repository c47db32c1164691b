"""Cuts that move during training: what they leave as it was, and that they are the same however a run is run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mpi4py import MPI
from networks import classified, cross_entropy, numbers, uneven

from apts_mpi import APTS, APTSOptions, CoarseOptions, GlobalStepOptions, InvalidInput, LocalOptions, SchwarzOptions
from apts_mpi.checkpoint import CheckpointDirectory, newest_valid
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.adaptive import measured_costs, relative_coupling
from apts_mpi.tools.events import Events

# Far from balanced, of nine layers; after the second iteration they move.
CUTS = (0, 44, 144, 207)
EVERY, STEPS = 2, 4

# With state of each parameter, of each layer, and layers that two subdomains have, each with its own samples.
SOLVERS = {
    "adam": {"local": LocalOptions(solver="adam")},
    "kfac": {"local": LocalOptions(solver="kfac", momentum=0.5)},
    "muon": {"local": LocalOptions(solver="muon", momentum=0.5)},
    "overlap": {"local": LocalOptions(solver="kfac"), "coarse": CoarseOptions(model="none"), "overlap": 1},
}


def make(comm, name, partition="adaptive"):
    parts = dict(SOLVERS[name])
    schwarz = SchwarzOptions(
        partition=partition,
        cuts=CUTS,
        repartition_every=EVERY,
        overlap=parts.pop("overlap", 0),
        local_data="shard" if name == "overlap" else "auto",
    )
    plain = GlobalStepOptions(model="auto" if name == "kfac" else "none")
    options = APTSOptions(schwarz=schwarz, global_step=plain, **parts)
    return APTS(uneven(), cross_entropy, comm=comm, options=options)


def cuts(solver):
    return tuple(part.owned_start for part in solver.holding.decomposition.subdomains)


def go_on(solver, steps, first=True):
    return [numbers(solver.step(classified() if first and not step else None)) for step in range(steps)]


def values(solver):
    return solver.holding.objective.vector.values.clone()


def known(solver):
    """What local solvers know, of all subdomains one after the other, by name; and the numbers that count."""
    arrays, metadata = solver.save()
    found = {}
    for of_rank in solver.comm.collect([(array.name, array.slabs) for array in arrays if "/local/" in array.name]):
        for name, slabs in of_rank:
            found.setdefault(name, []).extend((slab.first_row, slab.values) for slab in slabs)
    joined = {
        name: np.concatenate([rows for _, rows in sorted(parts, key=lambda part: part[0])])
        for name, parts in found.items()
    }
    return joined, [record["numbers"] for record in metadata["subdomains"]]


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["adam", "kfac", "muon"])
def test_moved_cuts_leave_loss_parameters_and_what_was_learnt_to_the_bit(world, name):
    moved, fixed = make(world, name), make(world, name, "layer")
    assert go_on(moved, EVERY) == go_on(fixed, EVERY)
    assert cuts(fixed) == CUTS != cuts(moved)
    assert len(cuts(moved)) == len(CUTS)
    assert torch.equal(values(moved), values(fixed))
    (own, count), (expected, expected_count) = known(moved), known(fixed)
    assert own.keys() == expected.keys()
    assert all(np.array_equal(own[array], expected[array]) for array in own)
    assert count == expected_count
    # The next loss is of the same point, evaluated anew.
    (before, *_), (after, *_) = go_on(fixed, 1, False)[0], go_on(moved, 1, False)[0]
    assert after[0] == before[0]


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["kfac", "overlap"])
def test_a_run_goes_on_across_a_move_to_the_bit(world, tmp_path, name):
    whole, begun, resumed = make(world, name), make(world, name), make(world, name)
    expected = go_on(whole, STEPS)
    comm = Communicator(world, Events())
    directory = world.bcast(tmp_path)
    go_on(begun, EVERY)
    with CheckpointDirectory(directory, comm) as checkpoints:
        checkpoints.save(*begun.save(), 0)
    checkpoint, _ = newest_valid(directory, comm)
    with checkpoint:
        assert resumed.load(checkpoint, checkpoint.metadata) == []
    assert cuts(resumed) == cuts(begun) != CUTS
    resumed.repeat(classified())
    assert go_on(resumed, STEPS - EVERY, False) == expected[EVERY:]
    assert torch.equal(values(resumed), values(whole))


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["adam", "kfac"])
def test_cuts_do_not_depend_on_the_ranks(world, name):
    together, alone = make(world, name), make(MPI.COMM_SELF, name)
    for found, expected in zip(go_on(together, STEPS), go_on(alone, STEPS), strict=True):
        assert [row[0] for row in found] == pytest.approx([row[0] for row in expected], rel=1e-8)
    assert cuts(together) == cuts(alone) != CUTS


def test_measured_seconds_share_out_the_costs_of_a_rank():
    solver = make(MPI.COMM_SELF, "kfac")
    own = solver.holding.decomposition
    assert measured_costs([1.0, 3.0, 2.0, 2.0], [0, 1, 2, 3, 4], own, np.array([16.0])) == [2.0, 6.0, 4.0, 4.0]
    two = replace(own, teams=replace(own.teams, ranks=3))
    seconds = np.array([8.0, 3.0, 4.0])
    assert measured_costs([1.0, 3.0, 2.0, 2.0], [0, 1, 2, 3, 4], two, seconds) == [8.0, 3.0, 2.0, 2.0]


@pytest.mark.mpi
def test_measured_seconds_balance(world):
    """All ranks have the same cuts, though the seconds are their own."""
    solver = make(world, "kfac", "adaptive-timed")
    go_on(solver, STEPS)
    assert len(set(solver.comm.collect(cuts(solver)))) == 1
    assert cuts(solver) != CUTS and solver.holding.schwarz.solving.seconds > 0.0


def test_relative_coupling():
    curvature = np.array([[4.0, -3.0, 1.5], [-3.0, 9.0, np.nan], [1.5, np.nan, 0.0]])
    assert relative_coupling(curvature).tolist() == [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0], [0.5, 0.0, 0.0]]
    assert relative_coupling(np.zeros((2, 2))).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_what_a_network_cannot_tell_is_balanced_and_said():
    """The curvature between layers is not known of a loss that has no derivatives of its derivative."""
    solver = make(MPI.COMM_SELF, "kfac")

    def fails(*_):
        raise InvalidInput("it has none")

    solver.step(classified())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apts_mpi.curvature.linearisation.Linearisation.reduced", fails)
        look = solver.holding._adaptive.look(solver.batch, values(solver), solver.holding.decomposition, 0.0)
    assert look.cuts != CUTS
    assert "it has none" in solver.comm.events.notes.take()[0]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"local": LocalOptions(solver="lsr1")}, "schwarz.partition: 'adaptive' .*'lsr1' has learnt .* choose layer"),
        (
            {"local": LocalOptions(solver="gauss-newton"), "coarse": CoarseOptions(model="residual")},
            "schwarz.partition: 'adaptive' .* coarse.model residual makes none; choose layer",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(parts, message):
    with pytest.raises(InvalidInput, match=message):
        APTS(
            uneven(),
            cross_entropy,
            comm=MPI.COMM_SELF,
            options=replace(APTSOptions(schwarz=SchwarzOptions(partition="adaptive")), **parts),
        )
