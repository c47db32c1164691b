"""Muon's steps beside a transcription by singular values, and what it leaves to Adam's."""

import networks
import pytest
import torch
from mpi4py import MPI
from torch import nn

from apts_mpi import APTS, APTSOptions, StagedAPTS
from apts_mpi.local.muon import DECAY, EPSILON, ITERATIONS, QUINTIC, orthogonal_factor
from apts_mpi.options import LocalOptions


def by_singular_values(matrix):
    """The same polynomial of the singular values, one by one."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(ITERATIONS):
        values = QUINTIC[0] * values + QUINTIC[1] * values**3 + QUINTIC[2] * values**5
    return left @ torch.diag(values) @ right, values


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 6)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_orthogonal_factor(shape, scale):
    matrix = scale * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected, values = by_singular_values(matrix)
    torch.testing.assert_close(orthogonal_factor(matrix), expected, rtol=0.0, atol=1e-12)
    assert all(0.65 < value < 1.2 for value in values)


@pytest.mark.parametrize("scale", [1e-25, 1e-40, 1e30])
def test_numbers_whose_squares_are_none(scale):
    """Such as a mean of gradients that fades, where no sample reaches a layer any more; in float32."""
    matrix = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(orthogonal_factor(scale * matrix), orthogonal_factor(matrix), rtol=0.0, atol=1e-3)


def test_nothing_has_no_direction():
    assert not orthogonal_factor(torch.zeros(3, 4)).any()


class Words(nn.Module):
    """An embedding, a convolution, a layer of recurrence, and a norm."""

    def __init__(self):
        super().__init__()
        self.words, self.cross = nn.Embedding(9, 6), nn.Conv1d(6, 5, 2)
        self.memory, self.norm, self.out = nn.GRU(5, 4, batch_first=True), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, tokens):
        seen, _ = self.memory(self.cross(self.words(tokens).transpose(1, 2)).transpose(1, 2))
        return self.out(self.norm(seen[:, -1]))


def test_steps_are_those_of_the_definition():
    """Three iterations of noisy batches: each correction from the gradients so far."""
    torch.manual_seed(0)
    network = Words().double()
    options = APTSOptions(noise="batches", subdomains=2, local=LocalOptions(solver="muon"))
    solver = APTS(network, nn.functional.cross_entropy, comm=MPI.COMM_SELF, options=options)
    names = [name for name, _ in network.named_parameters()]
    means = {name: 0.0 for name in names}
    squares = dict(means)
    for count in range(1, 4):
        tokens = torch.randint(9, (20, 6), generator=torch.Generator().manual_seed(count))
        targets = tokens.sum(dim=1) % 3
        network.zero_grad()
        nn.functional.cross_entropy(network(tokens), targets).backward()
        gradients = {name: weight.grad.clone() for name, weight in network.named_parameters()}
        solver.step((tokens, targets))
        for name, gradient in gradients.items():
            means[name] = 0.9 * means[name] + 0.1 * gradient
            squares[name] = DECAY * squares[name] + (1.0 - DECAY) * gradient**2
        expected = []
        for name in names:
            mean = 0.9 * means[name] / (1.0 - 0.9**count) + 0.1 * gradients[name]
            if mean.dim() == 1 or name == "words.weight":
                expected.append(-mean / ((squares[name] / (1.0 - DECAY**count)) ** 0.5 + EPSILON))
            else:
                matrix = mean.flatten(1)
                expected.append(-(max(matrix.shape) ** 0.5) * by_singular_values(matrix)[0])
        # The ball has its length.
        found, expected = solver.holding.schwarz.correction, networks.flat(expected)
        torch.testing.assert_close(found / found.norm(), expected / expected.norm(), rtol=1e-9, atol=1e-12)


def with_embedding():
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))


@pytest.mark.parametrize("network", [Words, with_embedding])
@pytest.mark.parametrize(("noise", "solver"), [("batches", "muon"), ("none", "kfac")])
def test_chosen_on_noisy_batches_where_few_samples_tell_of_a_layer(noise, solver, network):
    made = APTS(network(), nn.functional.cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions(noise=noise))
    assert made.options.local.solver == solver
    known = APTS(nn.Linear(3, 2), nn.functional.cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions(noise=noise))
    assert known.options.local.solver == "kfac"


class Own(nn.Linear):
    """Of a kind that K-FAC does not know."""


@pytest.mark.mpi(min_size=2)
def test_all_stages_have_one_local_solver(world):
    """Whichever stage has the layer that K-FAC does not know."""
    layers = [nn.Linear(networks.FEATURES, 8), *(nn.Linear(8, 8) for _ in range(world.size - 2)), Own(8, 3)]
    network = nn.Sequential(*layers).double()
    solver = StagedAPTS(
        network, networks.cross_entropy, comm=world, options=APTSOptions(layout="staged", noise="batches")
    )
    losses = [solver.step(networks.classified()).schwarz.loss for _ in range(3)]
    assert world.allgather(solver.options.local.solver) == ["muon"] * world.size
    assert losses[-1] < losses[0]


def run(comm, subdomains, **changes):
    network = networks.classifier()
    options = APTSOptions(subdomains=subdomains, local=LocalOptions(solver="muon"), **changes)
    solver = APTS(network, networks.cross_entropy, comm=comm, options=options)
    batch = networks.classified()
    return [solver.step(batch).schwarz.loss for _ in range(6)], networks.flat(network.parameters())


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("noise", ["batches", "none"])
def test_the_same_on_any_number_of_ranks(world, noise):
    losses, parameters = run(world, 3, noise=noise)
    alone, expected = run(MPI.COMM_SELF, 3, noise=noise)
    torch.testing.assert_close(parameters, expected, rtol=0.0, atol=1e-9)
    assert losses == pytest.approx(alone, abs=1e-9)
    assert losses[-1] < losses[0]
