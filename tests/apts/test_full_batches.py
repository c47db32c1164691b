"""Full batches: the end is fast, whatever the number of subdomains, and a run that has come to it says so."""

import pytest
import torch
from networks import classified, classifier, cross_entropy
from torch import nn
from torch.nn.functional import mse_loss

from apts_mpi import APTS, APTSOptions, CoarseOptions, GlobalStepOptions, LocalOptions


class Valley(nn.Module):
    """Rosenbrock's function as a sum of squares."""

    def __init__(self):
        super().__init__()
        self.point = nn.Parameter(torch.tensor([-1.2, 1.0], dtype=torch.float64))

    def forward(self, inputs):
        first, second = self.point
        return torch.stack([10.0 * (second - first**2), 1.0 - first]).expand(len(inputs), 2)


def steps(solver, batch, count):
    """Results up to the first at rest."""
    results = [solver.step(batch)]
    while len(results) < count and not results[-1].at_rest:
        results.append(solver.step())
    return results


def logistic():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(300, 12, generator=generator, dtype=torch.float64)
    scores = inputs @ torch.randn(12, 3, generator=generator, dtype=torch.float64)
    noise = 2.0 * torch.randn(300, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 3)).double(), (inputs, (scores + noise).argmax(dim=1))


def regression():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(100, 2, generator=generator, dtype=torch.float64) * 2.0 - 1.0
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    return network, (points, torch.sin(3.0 * points[:, :1]) * points[:, 1:])


ONCE = GlobalStepOptions(model="none")


@pytest.mark.parametrize("global_step", [GlobalStepOptions(), ONCE], ids=["auto", "none"])
def test_a_valley_ends_superlinearly(global_step):
    batch = torch.zeros(8, 1, dtype=torch.float64), torch.zeros(8, 2, dtype=torch.float64)
    results = steps(APTS(Valley(), mse_loss, options=APTSOptions(global_step=global_step)), batch, 60)
    losses = [result.schwarz.loss for result in results]
    below = next(number for number, loss in enumerate(losses) if loss <= 1e-6)
    assert min(losses[: below + 5]) <= 1e-24


@pytest.mark.mpi
def test_logistic_regression_ends_at_rounding_and_says_so(world):
    network, batch = logistic()
    results = steps(APTS(network, cross_entropy, comm=world), batch, 60)
    assert min(result.schwarz.gradient_norm for result in results) <= 1e-10
    assert results[-1].at_rest and results[-1].skipped is False


@pytest.mark.parametrize("subdomains", [1, 3])
def test_damping_of_kfac_and_of_the_coarse_level_goes_down(subdomains):
    network, batch = regression()
    options = APTSOptions(subdomains=subdomains, local=LocalOptions(solver="kfac"), global_step=ONCE)
    solver = APTS(network, mse_loss, options=options)
    assert min(result.schwarz.loss for result in steps(solver, batch, 60)) <= 1e-3
    assert solver.state.same.damped(0.1) < 1e-4
    assert all(local._relaxed < 1e-3 for local in solver.holding.schwarz.solvers.values())


def test_kfac_keeps_its_damping_where_the_loss_is_not_quadratic():
    solver = APTS(classifier(), cross_entropy)
    steps(solver, classified(60), 10)
    assert solver.state.same.damping < 1.0 and solver.options.local.relax is False
    assert all(local._relaxed == 1.0 for local in solver.holding.schwarz.solvers.values())


def test_nothing_of_it_on_mini_batches():
    solver = APTS(classifier(), cross_entropy)
    for seed in range(6):
        result = solver.step(classified(60, seed))
        while not result.accepted:
            result = solver.step()
        assert result.global_step is None and not result.converged
        assert solver.state.same.damping == 1.0 and not solver.state.same.stays


def test_the_ball_of_a_plain_sum_does_not_stand_still():
    """One block of two has its step cut: the sum is never as long as the ball."""
    network, batch = regression()
    options = APTSOptions(
        subdomains=3, coarse=CoarseOptions(model="none"), local=LocalOptions(solver="sgd"), global_step=ONCE
    )
    solver = APTS(network, mse_loss, options=options)
    for layer in (2, 4):
        for parameter in network[layer].parameters():
            parameter.data.mul_(1e-3)
    solver.state.radius = 1e-4
    results = steps(solver, batch, 12)
    assert solver.state.radius > 1e-3, [(result.schwarz.rho, result.schwarz.step_norm) for result in results]


@pytest.mark.mpi
def test_without_products_there_is_no_global_step_and_one_note(world):
    """The backward pass of an embedding bag with a maximum has none of its own."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.EmbeddingBag(9, 6, mode="max"), nn.Tanh(), nn.Linear(6, 3)).double()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(9, (40, 4), generator=generator), torch.randint(3, (40,), generator=generator)
    results = steps(APTS(network, cross_entropy, comm=world), batch, 8)
    assert all(result.global_step is None for result in results)
    notes = [note for result in results for note in result.notes if "global_step.model auto" in note]
    assert len(notes) == 1
