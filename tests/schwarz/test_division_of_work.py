"""Directions whose work is shared by all ranks, beside those of one rank, and what each rank computes of them."""

import itertools

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from apts_mpi import APTS, APTSOptions, StagedAPTS
from apts_mpi.curvature.kinds import KroneckerFactors, make_curvature
from apts_mpi.local.kfac import KFAC
from apts_mpi.options import LocalOptions, PipelineOptions

LAYERS = [
    nn.Linear(5, 3),
    nn.Linear(5, 3, bias=False),
    nn.Conv2d(2, 3, 2),
    nn.MultiheadAttention(4, 2),
    nn.Linear(600, 2),
    nn.Linear(2, 600),
    nn.Embedding(4, 3),
    nn.LayerNorm(4),
    nn.Bilinear(2, 3, 2),
]


def known(layer):
    """Curvature of random statistics."""
    size = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
    curvature = make_curvature(layer.double(), size)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(shape, dtype=torch.float64, generator=generator) for shape in curvature.statistics]
    curvature.refresh([value @ value.T if value.dim() == 2 else value for value in drawn], 0.3)
    return curvature, torch.randn(size, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_parts_are_those_of_the_direction(layer):
    """From each place on, to the next, and to the end, where the biases are."""
    curvature, gradient = known(layer)
    whole = curvature.direction(gradient)
    places = [*curvature.places, len(gradient)]
    assert places[0] == 0 and isinstance(curvature, KroneckerFactors) == (len(places) > 2)
    for start, following in itertools.pairwise(places):
        for stop in {following, len(gradient)}:
            part = curvature.part(gradient, start, stop)
            torch.testing.assert_close(part, whole[start:stop], rtol=1e-12, atol=1e-12)


def network():
    """One layer with most of the work."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 60), nn.Tanh(), nn.Linear(60, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 3)]
    return nn.Sequential(*layers).double()


def trained(comm, solver, subdomains, layout=APTS, **options):
    """Eight iterations on batches that differ, of which the sixth to eighth update no statistics."""
    local = LocalOptions(solver=solver, refresh=4)
    chosen = APTSOptions(noise="batches", subdomains=subdomains, local=local, **options)
    made = layout(network(), nn.functional.cross_entropy, comm=comm, options=chosen)
    for count in range(8):
        generator = torch.Generator().manual_seed(count)
        inputs = torch.randn(24, 8, dtype=torch.float64, generator=generator)
        made.step((inputs, inputs[:, :3].argmax(dim=1)))
    return made


@pytest.mark.mpi
@pytest.mark.all_sizes(solver="kfac", subdomains=2)
@pytest.mark.parametrize("subdomains", [1, 2, 4])
@pytest.mark.parametrize("solver", ["kfac", "muon"])
def test_iterates_are_those_of_one_rank(world, solver, subdomains):
    """Whatever ranks and subdomains: the same numbers up to the rounding of other orders of sums."""
    found, alone = (trained(comm, solver, subdomains) for comm in (world, MPI.COMM_SELF))
    expected = alone.holding.objective.vector.values
    torch.testing.assert_close(found.holding.objective.vector.values, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.mpi
@pytest.mark.parametrize("subdomains", [1, 2])
def test_each_rank_computes_its_part_alone(world, monkeypatch, subdomains):
    """Parts have all parameters once, and a rank inverts the factors of no layer but those that its part touches."""
    inverted = set()
    refresh = KroneckerFactors.refresh

    def noted(curvature, statistics, damping):
        inverted.add(curvature)
        refresh(curvature, statistics, damping)

    monkeypatch.setattr(KroneckerFactors, "refresh", noted)
    schwarz = trained(world, "kfac", subdomains).holding.schwarz
    blocks = {index: range(len(solver.setting.block)) for index, solver in schwarz.kept.items()}
    own = {index: blocks[index][solver.own_part or slice(None)] for index, solver in schwarz.kept.items()}
    assert world.allreduce(sum(map(len, own.values()))) == schwarz.correction.numel()
    touched = {
        layer.curvature
        for index, solver in schwarz.kept.items()
        for layer in solver.layers
        if set(blocks[index][layer.part]) & set(own[index]) and isinstance(layer.curvature, KroneckerFactors)
    }
    assert inverted == touched
    assert world.size == 1 or max(map(len, own.values()), default=0) < schwarz.correction.numel()


@pytest.mark.mpi
def test_stages_share_the_work_among_their_replicas(world):
    """Each stage's ranks share its directions."""
    if world.size < 4:
        return
    options = {"replicas": 2, "pipeline": PipelineOptions(micro_batches=2)}
    made = trained(world, "kfac", None, StagedAPTS, **options), trained(MPI.COMM_SELF, "kfac", 2)
    schwarz = made[0].holding.schwarz
    own = sum(len(range(solver.own_part.start, solver.own_part.stop)) for solver in schwarz.kept.values())
    assert schwarz.decomposition.comm.mpi.allreduce(own) == schwarz.correction.numel() > own
    losses = [one.step((torch.ones(24, 8).double(), torch.zeros(24).long())).schwarz.loss for one in made]
    np.testing.assert_allclose(*losses, rtol=1e-9)


class Steepest(KFAC):
    """One of the user's, whose directions are whole."""

    def direction(self, gradient):
        return -gradient


@pytest.mark.mpi
def test_solvers_made_of_these_keep_whole_directions(world):
    """They do not know of parts, which others would take theirs for."""
    name = f"{__name__}:Steepest"
    found, alone = (trained(comm, name, 2) for comm in (world, MPI.COMM_SELF))
    expected = alone.holding.objective.vector.values
    torch.testing.assert_close(found.holding.objective.vector.values, expected, rtol=1e-9, atol=1e-11)
