"""Losses that take samples together: groups, or the whole batch, are never divided, on any number of ranks."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mpi4py import MPI
from networks import flat, numbers, options
from staged_networks import PATIENCE
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
    TrustRegionOptions,
)
from apts_mpi.objective.passes import Pass
from apts_mpi.train.baselines import DataParallel
from apts_mpi.train.options import BaselineOptions

F = nn.functional
GROUP = 4
# Sums over ranks come in another order; a few iterations, conjugate gradients and the subtraction in rho magnify that.
TOLERANCE = 1e-8


def contrastive(outputs, targets):
    """Mean over groups of four of InfoNCE: each sample of the first pair is to be told from the other pair."""
    points = F.normalize(outputs, dim=1).view(-1, GROUP, outputs.shape[1])
    likeness = points[:, ::2] @ points[:, 1::2].transpose(1, 2) / 0.5
    right = torch.arange(GROUP // 2, device=outputs.device).expand(len(points), -1)
    return F.cross_entropy(likeness.flatten(0, 1), right.flatten())


def dice(outputs, targets):
    chances = outputs.sigmoid()
    return 1 - 2 * (chances * targets).sum() / (chances.sum() + targets.sum())


def network():
    torch.manual_seed(0)
    sizes = [6, 5, 5, 5, 5, 5, 5, 5, 5, 3]
    layers = [nn.Sequential(nn.Linear(*pair), nn.Tanh()) for pair in itertools.pairwise(sizes[:-1])]
    return nn.Sequential(*layers, nn.Linear(5, 3)).double()


def batch(samples=52, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    return inputs, (inputs[:, :3] > 0).double()


def steps(solver, batches):
    results = [solver.step(batches[0]), solver.step(), solver.step(batches[1]), solver.step(batches[0])]
    return [judged for result in results for judged in numbers(result)]


def close(found, expected):
    pair = (torch.tensor(part, dtype=torch.float64) for part in (found, expected))
    torch.testing.assert_close(*pair, rtol=TOLERANCE, atol=TOLERANCE)


def right_numbers(loss, given):
    made = network()
    value = loss(made(given[0]), given[1])
    gradient = torch.autograd.grad(value, list(made.parameters()))
    return float(value.detach()), float(flat(gradient).norm())


LOSSES = {"groups": (contrastive, {"group_size": GROUP}), "all": (dice, {"coupled": True})}
CASES = {
    "plain": ({"solver": "sgd"}, "none"),
    "exact": ({"solver": "adam", "iterations": 3}, "gauss-newton"),
    "inexact": ({"solver": "adam", "iterations": 2, "variant": "inexact"}, "gauss-newton"),
    "kfac": ({"solver": "kfac"}, "gauss-newton"),
    "second order": ({"solver": "steihaug", "iterations": 2, "global_step": "steihaug"}, "none"),
}


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("local_data", ["auto", "shard", "full"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_as_in_one_process(world, case, name, local_data):
    if name == "all" and local_data == "shard":
        pytest.skip("which is refused")
    (loss, together), (given, coarse) = LOSSES[name], CASES[case]
    chosen = replace(options(**{"subdomains": 3, "local_data": local_data} | given), **together)
    chosen = replace(chosen, coarse=CoarseOptions(model=coarse, samples=0.4 if coarse != "none" else None))
    batches = [batch(), batch(60, seed=2)]
    expected = right_numbers(loss, batches[0])[0]
    found = steps(APTS(network(), loss, comm=world, options=chosen), batches)
    assert found[0][0] == pytest.approx(expected, rel=1e-12)
    if world.rank == 0:
        close(found, steps(APTS(network(), loss, comm=MPI.COMM_SELF, options=chosen), batches))


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("solver", ["kfac", "adam"])
@pytest.mark.parametrize("name", LOSSES)
def test_stages(world, name, solver):
    loss, together = LOSSES[name]
    replicas = 2 if world.size == 4 else 1

    def chosen(layout):
        return APTSOptions(
            layout=layout,
            subdomains=max(world.size // replicas, 3),
            replicas=replicas if layout == "staged" else 1,
            stall_timeout=PATIENCE if layout == "staged" else None,
            schwarz=SchwarzOptions(variant="inexact", local_data="full"),
            local=LocalOptions(solver=solver, iterations=2 if solver == "adam" else 1, damping=0.1),
            coarse=CoarseOptions(model="gauss-newton", samples=1.0),
            global_step=GlobalStepOptions(model="steihaug" if solver == "adam" else "none"),
            trust_region=TrustRegionOptions(initial_radius=0.3),
            pipeline=PipelineOptions(micro_batches=3),
            **together,
        )

    batches = [batch(), batch(60, seed=2)]
    staged = StagedAPTS(network(), loss, comm=world, options=chosen("staged"))
    found = steps(staged, batches)
    assert found[0][0] == pytest.approx(right_numbers(loss, batches[0])[0], rel=1e-12)
    if world.rank == 0:
        close(found, steps(APTS(network(), loss, comm=MPI.COMM_SELF, options=chosen("replicated")), batches))


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("name", LOSSES)
def test_other_optimizers(world, name):
    loss, together = LOSSES[name]
    group = together.get("group_size")
    chosen = BaselineOptions(optimizer="sgd", learning_rate=0.1, group=group)
    solver = DataParallel(network(), loss, comm=world, options=chosen)
    result = solver.step(batch())
    assert (result.loss, result.gradient_norm) == pytest.approx(right_numbers(loss, batch()), rel=1e-12)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_groups_of_shards(world):
    own = batch(12 * (world.rank + 1), seed=world.rank)
    chosen = replace(options(subdomains=world.size, partition="index", batch="shard"), group_size=GROUP)
    result = APTS(network(), contrastive, comm=world, options=chosen).step(own)
    everything = [torch.cat(parts) for parts in zip(*world.allgather(own), strict=True)]
    assert result.schwarz.loss == pytest.approx(right_numbers(contrastive, everything)[0], rel=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("loss", "together", "samples", "message"),
    [
        (contrastive, {"group_size": 8}, 52, "batch_size: 52 samples are no whole number of groups of 8"),
        (dice, {"group_size": 4}, 52, "loss: it is not the mean over the samples"),
        (dice, {}, 52, "loss: it is not the mean .* the option group_size or coupled"),
        (contrastive, {"group_size": 4}, 8, "batch_size: the batch has 8 samples, but .* need (12|24)"),
    ],
)
def test_what_is_refused(world, loss, together, samples, message):
    solver = APTS(network(), loss, comm=world, options=replace(options(subdomains=3), **together))
    with pytest.raises(InvalidInput, match=message):
        solver.step(batch(samples))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schwarz": SchwarzOptions(decomposition="data")}, "schwarz.decomposition: 'data' divides the samples"),
        ({"schwarz": SchwarzOptions(local_data="shard")}, "schwarz.local_data: 'shard' .* choose full"),
        ({"schwarz": SchwarzOptions(local_data="shared")}, "schwarz.local_data: 'shared' .* choose full"),
        ({"local": LocalOptions(solver="gauss-newton")}, "the loss ties samples together .* choose kfac"),
        ({"local": LocalOptions(solver="gauss-newton"), "coupled": False, "group_size": 2}, "ties samples together"),
    ],
)
def test_options_that_divide_the_batch(changes, message):
    with pytest.raises(InvalidInput, match=message):
        APTS(network(), dice, comm=MPI.COMM_SELF, options=APTSOptions(**{"coupled": True} | changes))


def test_samples_taken_together_make_one_micro_batch():
    solver = StagedAPTS(network(), dice, comm=MPI.COMM_SELF, options=APTSOptions(layout="staged", coupled=True))
    assert solver.options.pipeline.micro_batches == 1
    assert "pipeline.micro_batches: 1, not 4, as the loss takes all samples together (coupled)" in solver.holding.notes
    solver.step(batch())
    groups = APTSOptions(layout="staged", group_size=4)
    assert StagedAPTS(network(), contrastive, comm=MPI.COMM_SELF, options=groups).options.pipeline.micro_batches == 4


def test_thinned_passes_keep_groups():
    """Whichever cuts there are, the same groups are chosen."""
    inputs = torch.arange(40)[:, None]

    def chosen(*edges):
        found = []
        for start, stop in itertools.pairwise(edges):
            own = inputs[start:stop]
            part = Pass(own, own, (stop - start) / 40, (0,), (), start, 40, GROUP).thinned(0.35)
            found.append(SimpleNamespace(rows=[], weight=0.0) if part is None else part)
        rows = [row for part in found for row in (part.inputs.flatten().tolist() if hasattr(part, "inputs") else [])]
        return rows, sum(part.weight for part in found)

    whole = chosen(0, 40)
    assert len(whole[0]) == 16 and all(row % GROUP == number % GROUP for number, row in enumerate(whole[0]))
    for cut in ((0, 20, 40), (0, 4, 12, 40), range(0, 44, 4)):
        rows, weight = chosen(*cut)
        assert rows == whole[0] and weight == pytest.approx(whole[1])
