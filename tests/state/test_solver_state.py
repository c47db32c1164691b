"""A solver that takes over a checkpoint goes on as the one that saved it: to the bit on the same ranks."""

import itertools

import pytest
import torch
from networks import SAMPLES, classified, classifier, cross_entropy, numbers
from torch import nn

from apts_mpi import APTS, CoarseOptions, GlobalStepOptions, InvalidInput, LocalOptions, SchwarzOptions
from apts_mpi.checkpoint import CheckpointDirectory, newest_valid
from apts_mpi.options import APTSOptions, TrustRegionOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import Events
from apts_mpi.train.baselines import DataParallel
from apts_mpi.train.options import BaselineOptions

# Steps, and after which of them a checkpoint is made.
STEPS, CUTS = 5, (1, 3)

# Too long at first, and steps have to be very good: a checkpoint between the tries on one batch is tested, too.
DEMANDING = TrustRegionOptions(initial_radius=10.0, eta1=0.9, shrink_below=0.9, eta2=0.99)

PLAIN = CoarseOptions(model="none")


@pytest.fixture
def directory(world, tmp_path):
    """One directory for all ranks."""
    return world.bcast(tmp_path)


def noisy_classifier():
    return classifier(batch_norm=True, dropout=0.2)


def apts(comm, network=noisy_classifier, **parts):
    return APTS(network(), cross_entropy, comm=comm, options=APTSOptions(**{"trust_region": DEMANDING} | parts))


def baseline(comm, optimizer):
    return DataParallel(
        noisy_classifier(), cross_entropy, comm=comm, options=BaselineOptions(optimizer=optimizer, learning_rate=0.05)
    )


def reload(solver, fresh, directory):
    """What a new process would have: a fresh solver with the state from a file."""
    comm = Communicator(fresh.comm.mpi, Events())
    arrays, metadata = solver.save()
    with CheckpointDirectory(directory, comm) as checkpoints:
        checkpoints.save(arrays, metadata, 0)
    return restore(fresh, comm, directory)


def restore(fresh, comm, directory):
    checkpoint, messages = newest_valid(directory, comm)
    with checkpoint:
        assert not messages
        assert not fresh.load(checkpoint, checkpoint.metadata)
    return fresh


def go_on(solver, first, last, repeated, whole=False):
    """Steps ``first`` to ``last``; a batch is tried again while rejected. ``repeated``: whether it is, at first."""
    found = []
    for number in range(first, last):
        batch, rows = rows_of(number, whole)
        result = solver.step() if repeated else solver.step(batch, rows)
        found.append((*numbers(result), result.gradient_evaluations))
        repeated = whole or not result.accepted
    return found, repeated


def rows_of(number, whole):
    """A batch, that changes every third step only: the steps between are on the same one where they are rejected."""
    return classified(), None if whole else torch.arange(60) + number // 3 * 10


def state_of(solver):
    return [tensor.clone() for tensor in solver.network.state_dict().values()]


def assert_resumed_is_uninterrupted(make, directory, whole):
    solver = make()
    expected, _ = go_on(solver, 0, STEPS, False, whole)
    final = state_of(solver)
    kinds = set()
    for cut in CUTS:
        interrupted = make()
        _, repeated = go_on(interrupted, 0, cut, False, whole)
        kinds.add(repeated)
        resumed = reload(interrupted, make(), directory)
        if repeated:
            # The batch of the step before.
            resumed.repeat(*rows_of(last_batch(expected, cut, whole), whole))
        found, _ = go_on(resumed, cut, STEPS, repeated, whole)
        assert found == expected[cut:]
        assert all(map(torch.equal, state_of(resumed), final))
    return kinds


def last_batch(steps, cut, whole):
    """Number of the step that brought the batch which step ``cut`` repeats."""
    number = cut - 1
    while number > 0 and not whole and not steps[number - 1][0][5]:
        number -= 1
    return number


@pytest.mark.mpi
@pytest.mark.parametrize("whole", [False, True], ids=["batches", "whole"])
@pytest.mark.parametrize("solver", ["gauss-newton", "adam", "muon", "sgd", "tr", "lsr1", "steihaug"])
def test_resumed_run_is_the_uninterrupted_one_to_the_bit(world, directory, solver, whole):
    """In the middle of the tries on a batch, with dropout and running statistics."""
    network = classifier if solver == "gauss-newton" else noisy_classifier  # which takes neither
    variant = "exact" if solver in ("gauss-newton", "steihaug") else "inexact"
    parts = {
        "subdomains": 3,
        "local": LocalOptions(solver=solver, iterations=2),
        "schwarz": SchwarzOptions(variant=variant),
        "coarse": PLAIN,
    }
    assert_resumed_is_uninterrupted(lambda: apts(world, network, **parts), directory, whole)


@pytest.mark.mpi
@pytest.mark.all_sizes(whole=False)
@pytest.mark.parametrize("whole", [False, True], ids=["batches", "whole"])
def test_default_solver_goes_on_to_the_bit(world, directory, whole):
    """K-FAC and the coarse level."""
    coarse = CoarseOptions(columns=("correction", "last_step", "last_correction"))
    local = LocalOptions(refresh=2)
    assert_resumed_is_uninterrupted(lambda: apts(world, subdomains=3, local=local, coarse=coarse), directory, whole)


@pytest.mark.mpi
@pytest.mark.all_sizes(whole=True)
@pytest.mark.parametrize("whole", [False, True], ids=["batches", "whole"])
def test_residual_level_goes_on_to_the_bit(world, directory, whole):
    """Its damping, how fast that rises, and the step to which momentum draws the next one."""
    coarse = CoarseOptions(model="residual", momentum=0.5)
    parts = {"subdomains": 3, "local": LocalOptions(solver="gauss-newton"), "coarse": coarse}
    assert_resumed_is_uninterrupted(lambda: apts(world, classifier, **parts), directory, whole)


@pytest.mark.mpi
def test_checkpoint_between_the_tries_on_one_batch(world, directory):
    """What the tests above rely on: without random masks the first step is too long on any number of ranks."""
    parts = {"subdomains": 3, "local": LocalOptions(solver="sgd"), "coarse": PLAIN}
    assert True in assert_resumed_is_uninterrupted(lambda: apts(world, classifier, **parts), directory, False)


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["first-order", "lsr1", "steihaug"])
def test_global_step_goes_on_to_the_bit(world, directory, model):
    parts = {"local": LocalOptions(solver="adam"), "coarse": PLAIN, "global_step": GlobalStepOptions(model=model)}
    assert_resumed_is_uninterrupted(lambda: apts(world, subdomains=2, **parts), directory, True)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "solver, schwarz, coarse",
    [
        ("kfac", SchwarzOptions(overlap=1), PLAIN),
        ("adam", SchwarzOptions(overlap=1, type="basic"), PLAIN),
        ("lsr1", SchwarzOptions(overlap=1), PLAIN),
        ("adam", SchwarzOptions(partition="index"), PLAIN),
        ("kfac", SchwarzOptions(decomposition="data"), CoarseOptions()),
        ("lsr1", SchwarzOptions(decomposition="data"), PLAIN),
    ],
    ids=["kfac-overlap", "adam-basic", "lsr1-overlap", "adam-index", "kfac-data", "lsr1-data"],
)
def test_other_subdomains_go_on_to_the_bit(world, directory, solver, schwarz, coarse):
    """Where subdomains share parameters each keeps its own state of them."""
    parts = {"subdomains": 3, "schwarz": schwarz, "local": LocalOptions(solver=solver), "coarse": coarse}
    assert_resumed_is_uninterrupted(lambda: apts(world, **parts), directory, False)


@pytest.mark.mpi
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "lbfgs"])
def test_baseline_goes_on_to_the_bit(world, directory, optimizer):
    def losses(solver, first, last):
        return [solver.step(classified(), torch.arange(40) + 8 * number).loss for number in range(first, last)]

    uninterrupted = baseline(world, optimizer)
    expected = losses(uninterrupted, 0, 6)
    interrupted = baseline(world, optimizer)
    losses(interrupted, 0, 3)
    resumed = reload(interrupted, baseline(world, optimizer), directory)
    assert losses(resumed, 3, 6) == expected[3:]
    assert all(map(torch.equal, state_of(resumed), state_of(uninterrupted)))


@pytest.mark.mpi
@pytest.mark.all_sizes(solver="kfac")
@pytest.mark.parametrize(
    ("solver", "noise"),
    [("kfac", "none"), ("adam", "none"), ("lsr1", "none"), ("kfac", "batches"), ("muon", "batches")],
)
def test_any_number_of_ranks_goes_on(world, directory, solver, noise):
    """From N to M ranks with six subdomains; the sums over ranks have other rounding errors, hence no equal bits."""
    sizes = [size for size in (1, 2, 3, 4, 8) if size <= world.size]
    groups = {size: world.Split(int(world.rank < size), world.rank) for size in sizes}

    def make(comm):
        local = LocalOptions(solver=solver)
        return apts(comm, classifier, subdomains=6, noise=noise, local=local, trust_region=TrustRegionOptions())

    final = {}
    for size, group in groups.items():
        if world.rank < size:
            saved = make(group)
            go_on(saved, 0, 3, False)
            arrays, metadata = saved.save()
            with CheckpointDirectory(directory / f"{size}", saved.comm) as checkpoints:
                checkpoints.save(arrays, metadata, 0)
            go_on(saved, 3, 6, False)
            final[size] = saved.holding.objective.vector.values
    world.Barrier()
    for before, after in itertools.product(sizes, sizes):
        if world.rank < after:
            resumed = make(groups[after])
            restore(resumed, resumed.comm, directory / f"{before}")
            go_on(resumed, 3, 6, False)
            if world.rank < before:
                torch.testing.assert_close(
                    resumed.holding.objective.vector.values, final[before], rtol=1e-10, atol=1e-12
                )
    for group in groups.values():
        group.Free()


@pytest.mark.mpi
@pytest.mark.all_sizes(solver="kfac", before=6)
@pytest.mark.parametrize("solver", ["kfac", "adam"])
@pytest.mark.parametrize("before, after", [(6, 3), (2, 6), (1, 4)])
def test_other_number_of_subdomains_takes_over_vectors_and_layers(world, directory, solver, before, after):
    """Each parameter's and each layer's state is that of the subdomain which owned it."""
    local = LocalOptions(solver=solver)
    saved = apts(world, classifier, subdomains=before, local=local)
    go_on(saved, 0, 3, False)
    other = reload(saved, apts(world, classifier, subdomains=after, local=local), directory)
    alike = reload(saved, apts(world, classifier, subdomains=before, local=local), directory)
    assert whole_state(other) == pytest.approx(whole_state(alike), rel=0.0, abs=0.0)
    loss = alike.step(classified()).schwarz.loss
    assert other.step(classified()).schwarz.loss == pytest.approx(loss, rel=1e-12)


def whole_state(solver):
    """Sums over what the local solvers keep, each owned parameter or layer once."""
    total = 0.0
    for solver_of_part in solver.holding.schwarz.solvers.values():
        state = solver_of_part.state()
        total += sum(float(vector.abs().sum()) for vector in state.vectors.values())
        total += sum(float(tensor.abs().sum()) for layer in state.layers for tensor in layer.tensors)
    share = total if solver.holding.decomposition.leads else 0.0
    return round(solver.comm.mpi.allreduce(share), 9)


@pytest.mark.mpi
def test_what_cannot_be_taken_over_is_said(world, directory):
    saved = apts(world, classifier, subdomains=3, local=LocalOptions(solver="lsr1"))
    go_on(saved, 0, 2, False)
    arrays, metadata = saved.save()
    with CheckpointDirectory(directory, saved.comm) as checkpoints:
        checkpoints.save(arrays, metadata, 0)
    for subdomains, solver, words in (
        (2, "lsr1", "local solver lsr1 is dropped"),
        (3, "adam", "state of local solver lsr1"),
    ):
        fresh = apts(world, classifier, subdomains=subdomains, local=LocalOptions(solver=solver))
        checkpoint, _ = newest_valid(directory, fresh.comm)
        with checkpoint:
            (notice,) = fresh.load(checkpoint, checkpoint.metadata)
        assert words in notice
        assert fresh.step(classified()).schwarz.loss < 2.0


@pytest.mark.mpi
@pytest.mark.parametrize(
    "other, words",
    [
        (lambda: classifier(width=8), r"parameters/0.weight has shape \(16, 10\), in the network it has \(8, 10\)"),
        (lambda: classifier().float(), "parameters/0.weight has type float64, in the network it has float32"),
        (noisy_classifier, "parameters/1.weight of the network is missing"),
        (lambda: classifier()[:-2], "parameters/10.weight is not in the network"),
    ],
    ids=["shape", "type", "missing", "surplus"],
)
def test_first_difference_to_another_network_is_named(world, directory, other, words):
    saved = apts(world, classifier, subdomains=2)
    saved.step(classified())
    arrays, metadata = saved.save()
    with CheckpointDirectory(directory, saved.comm) as checkpoints:
        checkpoints.save(arrays, metadata, 0)
    fresh = apts(world, other, subdomains=2)
    before = state_of(fresh)
    checkpoint, _ = newest_valid(directory, fresh.comm)
    with checkpoint, pytest.raises(InvalidInput, match=words):
        fresh.load(checkpoint, checkpoint.metadata)
    assert all(map(torch.equal, state_of(fresh), before))


@pytest.mark.mpi
def test_saved_network_is_a_state_dict(world, directory):
    """With tied tensors under both names, and without buffers that are not persistent."""

    def network():
        tied = classifier(batch_norm=True)
        tied[6].weight = tied[3].weight
        tied.register_buffer("scratch", torch.zeros(3), persistent=False)
        return tied

    saved = apts(world, network, subdomains=2, local=LocalOptions(solver="sgd"))
    saved.step(classified(SAMPLES))
    resumed = reload(saved, apts(world, network, subdomains=2, local=LocalOptions(solver="sgd")), directory)
    checkpoint, _ = newest_valid(directory, saved.comm)
    with checkpoint:
        names = {name.split("/", 1)[1] for name in checkpoint.names if not name.startswith("solver/")}
    assert names == set(saved.network.state_dict())
    assert all(map(torch.equal, state_of(resumed), state_of(saved)))
    assert isinstance(resumed.network, nn.Sequential)
