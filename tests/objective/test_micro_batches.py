"""Micro-batches where a rank has the whole network: the iterates of passes in one part, with one graph at a time."""

import resource

import numpy as np
import pytest
import torch
from mpi4py import MPI
from networks import flat
from torch import nn

from apts_mpi import (
    APTS,
    APTSOptions,
    CoarseOptions,
    GlobalStepOptions,
    InvalidInput,
    LocalOptions,
    PipelineOptions,
    SchwarzOptions,
    StagedAPTS,
    losses,
)
from apts_mpi.checkpoint import CheckpointDirectory, newest_valid
from apts_mpi.curvature.kinds import PATCHES, make_curvature
from apts_mpi.curvature.layer import LayerBatch
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.objective.memory import size_for
from apts_mpi.options import TrustRegionOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import Events
from apts_mpi.tools.memory import free_memory
from apts_mpi.train.baselines import DataParallel
from apts_mpi.train.options import BaselineOptions

F = nn.functional
SIZE = 3
# What is asked for in one part: more than any batch has.
WHOLE = 10**6
# Sums come in another order.
TOLERANCE = 1e-10


def network(*more):
    """Convolutions, a normalisation, and a layer of unknown kind."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), *more, nn.Conv2d(3, 2, 3, stride=2), nn.Tanh(), nn.Flatten(),
        nn.Linear(18, 8), nn.LayerNorm(8), nn.PReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5),
    ).double()  # fmt: skip


def batch(samples=66, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, 8, 8, generator=generator).double(), torch.randint(
        5, (samples,), generator=generator
    )


def trained(comm, size, *, made=network, loss=F.cross_entropy, **parts):
    """Parameters and results after three steps, one of which goes on with the batch before."""
    solver = APTS(made(), loss, comm=comm, options=APTSOptions(micro_batch_size=size, **parts))
    results = [solver.step(batch()), solver.step(), solver.step(batch(seed=2))]
    return solver, flat(solver.network.parameters()), results


def check_alike(comm, **parts):
    _, whole, before = trained(comm, WHOLE, **parts)
    _, cut, after = trained(comm, SIZE, **parts)
    assert (whole - cut).abs().max() < TOLERANCE
    assert [one.schwarz.accepted for one in before] == [one.schwarz.accepted for one in after]
    assert abs(before[-1].schwarz.rho - after[-1].schwarz.rho) < 1e-6


SOLVERS = [
    *[("kfac", 1, variant) for variant in ("exact", "inexact")],
    *[(name, 2, variant) for name in ("kfac", "sgd", "adam", "tr", "lsr1") for variant in ("exact", "inexact")],
    ("steihaug", 2, "exact"),
    ("steihaug", 1, "inexact"),
    ("gauss-newton", 1, "exact"),
]


@pytest.mark.mpi
@pytest.mark.all_sizes(solver="kfac", coarse="gauss-newton", iterations=1)
@pytest.mark.parametrize("coarse", ["none", "gauss-newton"])
@pytest.mark.parametrize(("solver", "iterations", "variant"), SOLVERS)
def test_iterates_are_those_of_whole_passes(world, solver, iterations, variant, coarse):
    product = "hessian" if variant == "inexact" else "gauss-newton"
    check_alike(
        world,
        local=LocalOptions(solver=solver, iterations=iterations, product=product),
        schwarz=SchwarzOptions(variant=variant),
        coarse=CoarseOptions(model=coarse),
        subdomains=2,
    )


@pytest.mark.mpi
@pytest.mark.parametrize(
    "parts",
    [
        {"noise": "batches"},
        {"global_step": GlobalStepOptions(model="steihaug")},
        {"global_step": GlobalStepOptions(model="lsr1"), "replicas": 1},
        {"schwarz": SchwarzOptions(decomposition="data"), "subdomains": 3},
        {"schwarz": SchwarzOptions(overlap=1), "subdomains": 3},
        {"schwarz": SchwarzOptions(local_data="shard"), "subdomains": 3},
        {"schwarz": SchwarzOptions(local_data="full"), "subdomains": 2},
        {"trust_region": TrustRegionOptions(initial_radius=100.0, eta1=0.9, shrink_below=0.9, eta2=0.99)},
        {"local": LocalOptions(refresh=1), "group_size": 2, "subdomains": 2},
    ],
    ids=lambda parts: ", ".join(parts),
)
def test_with_other_parts(world, parts):
    check_alike(world, **parts)


def pair(outputs, targets):
    return F.cross_entropy(outputs, targets, ignore_index=3, reduction="sum"), (targets != 3).sum()


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("loss", [pair, losses.cross_entropy(ignore_index=3)], ids=["its own", "ready-made"])
def test_denominators_are_those_of_the_whole_batch(world, loss):
    """Known before from the targets, or after all micro-batches were forward."""
    check_alike(world, loss=loss, subdomains=2)


def largest_pass(solver):
    """Samples that the network was given at a time from now on, at most."""
    seen = []
    solver.network[0].register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    return seen


@pytest.mark.parametrize("solver", ["kfac", "adam", "steihaug", "gauss-newton"])
def test_no_more_samples_at_a_time(solver):
    options = APTSOptions(micro_batch_size=7, local=LocalOptions(solver=solver), subdomains=2)
    made = APTS(network(), F.cross_entropy, comm=MPI.COMM_SELF, options=options)
    seen = largest_pass(made)
    for samples in (50, None, 66):
        made.step(None if samples is None else batch(samples))
    assert max(seen) <= 7


def test_each_is_forward_once_where_the_denominator_is_known():
    """A step costs what it costs in one part: no graph is made twice."""
    parts = {"local": LocalOptions(solver="sgd"), "coarse": CoarseOptions(model="none")}
    work = []
    for size in (WHOLE, SIZE):
        solver = APTS(
            network(), F.cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions(micro_batch_size=size, **parts)
        )
        solver.step(batch())
        work.append(solver.step(batch(seed=2)).gradient_evaluations)
    assert work[0] == pytest.approx(work[1])


def test_curvature_of_a_convolution_is_of_the_same_samples():
    """Of more patches than are taken: those of a micro-batch are its part of those of the whole pass."""
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 2, 3, padding=1).double()
    samples = 3 * PATCHES // 64 + 5
    inputs, gradients = torch.randn(samples, 1, 8, 8).double(), torch.randn(samples, 2, 8, 8).double()
    curvature = make_curvature(layer, 20)
    whole = curvature.measure(LayerBatch([LayerRecord(layer, inputs, gradients)], samples))
    total = None
    for part in ((0, 100), (100, 101), (101, 700), (700, samples)):
        record = LayerRecord(layer, inputs[slice(*part)], gradients[slice(*part)])
        sums = curvature.sums(LayerBatch([record], samples, part=part))
        total = sums if total is None else [old + new for old, new in zip(total, sums, strict=True)]
    for one, other in zip(whole, curvature.means(total, samples), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0.0)


def normed():
    return network(nn.BatchNorm2d(3), nn.Dropout(0.2))


def test_batch_normalisation_and_masks_are_those_of_micro_batches():
    """Statistics of each, running ones move by their mean once; masks are the same before and after a step."""
    parts = {"local": LocalOptions(solver="sgd"), "coarse": CoarseOptions(model="none")}
    made = normed()
    first = made[0]
    inputs, targets = batch(12)
    with torch.no_grad():
        moments = [(part.mean(dim=(0, 2, 3)), part.var(dim=(0, 2, 3))) for part in first(inputs).tanh().split(4)]
    trust = TrustRegionOptions(initial_radius=1e-5)
    solver = APTS(
        made, F.cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions(micro_batch_size=4, trust_region=trust, **parts)
    )
    result = solver.step((inputs, targets))
    assert result.schwarz.accepted
    assert result.schwarz.rho == pytest.approx(1.0, abs=1e-3)
    # Evaluated at the end of the step, which is short.
    for name, index in (("running_mean", 0), ("running_var", 1)):
        mean = torch.stack([moment[index] for moment in moments]).mean(dim=0)
        expected = 0.1 * mean + (0.9 if index else 0.0)
        torch.testing.assert_close(getattr(made[2], name), expected, rtol=1e-3, atol=1e-4)
    assert int(made[2].num_batches_tracked) == 1
    options = APTSOptions(micro_batch_size=2)
    with pytest.raises(InvalidInput, match="micro_batch_size: 2 may leave single samples.* give 3 or more"):
        APTS(normed(), F.cross_entropy, comm=MPI.COMM_SELF, options=options).step((inputs, targets))


@pytest.mark.mpi
@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_other_optimizers_accumulate(world, optimizer):
    found = []
    for most in (WHOLE, SIZE):
        options = BaselineOptions(optimizer=optimizer, learning_rate=0.01, most=most)
        solver = DataParallel(network(), F.cross_entropy, comm=world, options=options)
        for seed in (1, 2):
            solver.step(batch(seed=seed))
        found.append(flat(solver.network.parameters()))
    assert (found[0] - found[1]).abs().max() < TOLERANCE


@pytest.mark.mpi
@pytest.mark.parametrize("size", [2, 100])
def test_stages_have_more_micro_batches(world, size):
    """As many as the options say, or more where they would be larger."""
    pipeline = PipelineOptions(micro_batches=2)
    options = APTSOptions(layout="staged", micro_batch_size=size, pipeline=pipeline, stall_timeout=60.0)
    solver = StagedAPTS(network(), F.cross_entropy, comm=world, options=options)
    solver.step(batch(13))
    assert len(solver.batch.passes) == (7 if size == 2 else 2)
    assert max(part.samples for part in solver.batch.passes) <= max(size, 7)


class Room:
    """Memory of this process that is left from the start of the block on."""

    def __init__(self, more):
        self.more = more

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_DATA)
        with open("/proc/self/status") as status:
            used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (used + self.more, self.before[1]))

    def __exit__(self, *error):
        resource.setrlimit(resource.RLIMIT_DATA, self.before)


# Of a sample some 200 kB are kept; and where there is enough for none of what else a process does.
ROOM = 2**28


def images(samples, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 1, 32, 32, generator=generator), torch.randint(5, (samples,), generator=generator)


def wide():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.AvgPool2d(16), nn.Flatten(), nn.Linear(32, 5))


def test_the_limit_of_the_process_counts():
    with Room(ROOM):
        assert 0 < free_memory(torch.device("cpu")) <= ROOM
    assert free_memory(torch.device("cpu")) > 0


@pytest.mark.mpi
@pytest.mark.parametrize("method", ["apts", "adam"])
def test_the_memory_decides_once_and_the_checkpoint_keeps_it(world, tmp_path, method):
    """All ranks alike; a run that goes on cuts alike, to the bit, where there is memory for all."""

    def make():
        if method == "adam":
            options = BaselineOptions(optimizer="adam", learning_rate=0.01)
            return DataParallel(wide(), F.cross_entropy, comm=world, options=options)
        return APTS(wide(), F.cross_entropy, comm=world)

    directory, samples = world.bcast(tmp_path), 2000 * world.size
    solver = make()
    held = solver if method == "adam" else solver.holding
    solver.step(images(20))
    assert held.micro_batches.most is None
    with Room(ROOM):
        solver.step(images(samples))
    size = held.micro_batches.most
    assert size is not None and 4 <= size < 2000 and size & (size - 1) == 0
    assert len(set(world.allgather(size))) == 1
    comm = Communicator(world, Events())
    arrays, metadata = solver.save()
    with CheckpointDirectory(directory, comm) as checkpoints:
        checkpoints.save(arrays, metadata, 0)
    other = make()
    checkpoint, _ = newest_valid(directory, comm)
    with checkpoint:
        other.load(checkpoint, checkpoint.metadata)
    assert (other if method == "adam" else other.holding).micro_batches.most == size
    for each in (solver, other):
        each.step(images(samples, seed=2))
    assert torch.equal(flat(solver.network.parameters()), flat(other.network.parameters()))
    again = other.save()[1]["micro_batches"]
    assert again == {"most": size}


def slope(made, inputs):
    """What a network returns and its derivative, by torch.func."""
    return torch.func.vmap(torch.func.grad(lambda point: made(point).sum()))(inputs).sum(dim=1, keepdim=True)


def test_what_torch_cannot_measure_is_taken_whole():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    solver = APTS(made, F.mse_loss, comm=MPI.COMM_SELF, forward=slope)
    batch = torch.randn(20, 3), torch.randn(20, 1)
    assert any(solver.step(batch).accepted for _ in range(5))
    assert solver.holding.micro_batches.most is None


def test_a_note_says_so_once():
    solver = APTS(wide(), F.cross_entropy, comm=MPI.COMM_SELF)
    with Room(ROOM):
        notes = [solver.step(images(2000, seed=seed)).notes for seed in (1, 2)]
    assert len(notes[0]) == 1 and notes[0][0].startswith("micro_batch_size auto: ")
    assert notes[1] == ()


@pytest.mark.parametrize(
    ("table", "size"),
    [
        ([[100, 1000, 1e6]], 0),
        ([[1001, 1000, 1e6]], 512),
        ([[100, 1000, 1e6], [100, 1000, 64e3]], 64),
        ([[100, 0, 0]], 0),
        ([[100, 1e9, 1e6]], 4),
    ],
)
def test_size_for_the_rank_with_least(table, size):
    assert size_for(np.array(table, dtype=float)) == size


@pytest.mark.parametrize("method", ["apts", "adam"])
def test_a_lack_of_memory_names_the_option(method):
    if method == "apts":
        options = APTSOptions(micro_batch_size=WHOLE)
        solver = APTS(wide(), F.cross_entropy, comm=MPI.COMM_SELF, options=options)
    else:
        options = BaselineOptions(optimizer="adam", learning_rate=0.01, most=WHOLE)
        solver = DataParallel(wide(), F.cross_entropy, comm=MPI.COMM_SELF, options=options)
    samples = images(6000)
    with Room(ROOM // 2), pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        solver.step(samples)
    assert any("micro_batch_size: there is no memory" in note for note in caught.value.__notes__)
