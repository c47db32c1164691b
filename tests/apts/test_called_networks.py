"""Networks that a function of the user's calls: their layers are known as those of others are."""

import pytest
import torch
from mpi4py import MPI
from networks import CLASSES, FEATURES, classified, cross_entropy
from torch import nn

from apts_mpi import APTS, APTSOptions, CoarseOptions, LocalOptions, SchwarzOptions

WIDTH = 200  # beyond dense matrices


class Layers(nn.Module):
    """No sequence, so that it is one segment whichever way it is called."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(FEATURES, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)
        self.middle = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs):
        return self.last(self.middle(self.norm(self.first(inputs))).tanh())


def network():
    torch.manual_seed(0)
    return Layers().double()


def steps(solver, count=4):
    return [solver.step(classified()) for _ in range(count)]


@pytest.mark.mpi
def test_kfac_takes_the_same_steps_with_and_without_a_function(world):
    schwarz = SchwarzOptions(variant="exact")
    options = APTSOptions(local=LocalOptions(solver="kfac"), schwarz=schwarz)
    results = [
        steps(APTS(network(), cross_entropy, comm=world, options=options, forward=forward))
        for forward in (None, lambda module, inputs: module(inputs))
    ]
    for plain, called in zip(*results, strict=True):
        assert called.schwarz.loss == pytest.approx(plain.schwarz.loss, rel=1e-9)
    assert results[1][-1].schwarz.trial_loss < 0.9 * results[1][0].schwarz.loss


@pytest.mark.mpi
def test_a_function_keeps_kfac_where_the_dense_matrix_is_too_large(world):
    solver = APTS(network(), cross_entropy, comm=world, forward=lambda module, inputs: module(2.0 * inputs))
    assert solver.options.local.solver == "kfac"
    kinds = {layer.curvature.kind for local in solver.holding.schwarz.solvers.values() for layer in local.layers}
    assert kinds <= {"KroneckerFactors", "NormalisationDiagonal"}
    results = steps(solver)
    assert results[-1].schwarz.trial_loss < 0.9 * results[0].schwarz.loss


def slopes(module, inputs):
    inputs = inputs.requires_grad_()
    return torch.autograd.grad(module(inputs).sum(), inputs, create_graph=True)[0]


def by_transforms(module, inputs):
    return torch.func.grad(lambda points: module(points).sum())(inputs)


@pytest.mark.parametrize("function", [slopes, by_transforms])
def test_kfac_goes_down_where_a_function_takes_derivatives(function):
    options = APTSOptions(local=LocalOptions(solver="kfac"), coarse=CoarseOptions(model="auto"), subdomains=2)
    inputs = classified()[0]
    solver = APTS(network(), nn.functional.mse_loss, comm=MPI.COMM_SELF, options=options, forward=function)
    results = [solver.step((inputs, inputs.cos())) for _ in range(6)]
    assert results[-1].schwarz.trial_loss < 0.95 * results[0].schwarz.loss
