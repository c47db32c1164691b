"""Complex parameters are trained as their real and imaginary parts: as a network that is written with these."""

import pytest
import torch
from torch import nn

from apts_mpi import APTS, APTSOptions, CoarseOptions, LocalOptions, StagedAPTS
from apts_mpi.checkpoint import CheckpointDirectory, newest_valid
from apts_mpi.problems import Problem

MODES, WIDTH, POINTS = 4, 6, 16


class Spectral(nn.Module):
    """A layer of a Fourier neural operator, of which the weights are complex, or pairs of real numbers."""

    def __init__(self, is_complex):
        super().__init__()
        pairs = torch.randn(WIDTH, WIDTH, MODES, 2, dtype=torch.float64) / WIDTH
        self.weight = nn.Parameter(torch.view_as_complex(pairs) if is_complex else pairs)

    def forward(self, inputs):
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        found = torch.fft.rfft(inputs)[..., :MODES]
        return torch.fft.irfft(torch.einsum("bim,iom->bom", found, weight), n=POINTS)


def network(is_complex):
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, WIDTH, 1), Spectral(is_complex), nn.GELU(), Spectral(is_complex), nn.Conv1d(WIDTH, 2, 1)]
    return nn.Sequential(*layers).double()


def samples(count=24):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 1, POINTS, generator=generator, dtype=torch.float64)
    return inputs, torch.cat([inputs.roll(1, 2), inputs.square()], 1)


def losses(solver, count=4):
    return [solver.step(samples()).schwarz.trial_loss for _ in range(count)]


SOLVERS = {
    "kfac": {"local": LocalOptions(solver="kfac")},
    "adam": {"local": LocalOptions(solver="adam"), "coarse": CoarseOptions(model="none")},
    "tr": {"local": LocalOptions(solver="tr", iterations=2)},
    "steihaug": {"local": LocalOptions(solver="steihaug", product="hessian")},
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", SOLVERS)
def test_steps_are_those_of_the_parts(world, name):
    found = []
    for is_complex in (True, False):
        options = APTSOptions(**SOLVERS[name])
        found.append(losses(APTS(network(is_complex), nn.functional.mse_loss, comm=world, options=options)))
    if name != "kfac":  # which has other factors for a tensor of pairs
        assert found[0] == pytest.approx(found[1], rel=1e-8)
    assert found[0][-1] < found[0][0]


@pytest.mark.mpi(min_size=2)
def test_stages_with_complex_weights(world):
    options = APTSOptions(layout="staged", stall_timeout=60.0)
    found = losses(StagedAPTS(network(True), nn.functional.mse_loss, comm=world, options=options))
    assert found[-1] < found[0]


@pytest.mark.mpi
def test_complex_weights_are_saved_and_loaded(world, tmp_path):
    path = world.bcast(tmp_path if world.rank == 0 else None)
    solver = APTS(network(True), nn.functional.mse_loss, comm=world)
    losses(solver, 2)
    with CheckpointDirectory(path, solver.comm) as directory:
        directory.save(*solver.save(), 2)
    other = APTS(network(True), nn.functional.mse_loss, comm=world)
    checkpoint, _ = newest_valid(path, other.comm)
    with checkpoint:
        other.load(checkpoint, checkpoint.metadata)
    for one, two in zip(solver.network.parameters(), other.network.parameters(), strict=True):
        assert torch.equal(one, two)
    assert losses(other, 2) == losses(solver, 2)


def test_a_problem_may_have_complex_weights():
    Problem(name="operator", network=network(True), loss=nn.functional.mse_loss, train=samples())
