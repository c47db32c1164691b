"""Networks of nine and more parts for layout staged, and the replicated solver that a staged one has to equal."""

from dataclasses import replace

import torch
from mpi4py import MPI
from networks import cross_entropy, numbers
from torch import nn
from tree_networks import convex, trees, two_inputs

import apts_mpi.replicated
from apts_mpi import APTS, CoarseOptions, LocalOptions, PipelineOptions, StagedAPTS
from apts_mpi.problems.losses import token_cross_entropy
from apts_mpi.problems.text import character_gpt

PATIENCE = 60.0  # seconds; ranks share two cores with others here


def mlp():
    """Nine linear layers, nested, with modules without parameters at both ends of stages."""
    layers = [nn.Sequential(nn.Linear(10, 12), nn.Tanh())]
    layers += [nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(7)]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(12, 3))


def cnn():
    """Seven convolutions and two linear layers."""
    layers = [nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 4, 3, padding=1), nn.Tanh()]
    for index in range(6):
        layers += [nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()]
        if index == 2:
            layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))


class Residual(nn.Module):
    """Two convolutions added to their input."""

    def __init__(self, norm):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, inputs):
        return inputs + self.second(torch.tanh(self.norm(self.first(inputs))))


def resnet(norm=False):
    """Seven residual blocks between a convolution and a linear layer."""
    blocks = [Residual(norm) for _ in range(7)]
    return nn.Sequential(
        nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 4, 3), *blocks, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )


def gpt():
    """Six transformer blocks."""
    return character_gpt(11, 6, width=8, heads=2, blocks=6)


class Begin(nn.Module):
    """Makes a tuple: numbers, numbers of another precision, indices and truth values."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(10, 6)
        self.dtype = dtype

    def forward(self, inputs):
        hidden = torch.tanh(self.linear(inputs))
        coarse = inputs[:, :6].to(self.dtype) * hidden.to(self.dtype)
        return hidden, coarse, hidden.argmax(dim=1), inputs[:, :1] > 0.0


class Middle(nn.Module):
    """Uses all of them, and leaves the first one's gradient to the second."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, bundle):
        hidden, coarse, indices, positive = bundle
        moved = torch.tanh(self.linear(hidden + coarse.to(hidden.dtype)))
        return moved * (indices[:, None] + 1.0), coarse, (indices + 1) % 6, positive ^ (indices[:, None] > 2)


class End(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, bundle):
        hidden, coarse, indices, positive = bundle
        return self.linear(torch.where(positive, hidden, -hidden)) + coarse[:, :3].to(hidden.dtype) * indices[:, None]


def tuples(dtype=torch.bfloat16):
    """Eight linear layers between which tuples flow."""
    return nn.Sequential(Begin(dtype), *[Middle() for _ in range(6)], End())


def double_tuples():
    """The same with float64 alone, for sums whose order differs between layouts."""
    return tuples(torch.float64)


def images(samples, seed, pixels):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, pixels, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (samples,), generator=generator)


def tokens(samples, seed):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, 11, (samples, 6), generator=generator) for _ in range(2))


# Name: builder, batches of numbers of samples that 2 and 5 do not divide, loss.
NETWORKS = {
    "mlp": (mlp, (images(37, 1, 10), images(23, 2, 10)), cross_entropy),
    "cnn": (cnn, (images(21, 1, 36), images(17, 2, 36)), cross_entropy),
    "resnet": (resnet, (images(21, 1, 36), images(17, 2, 36)), cross_entropy),
    "tuples": (tuples, (images(21, 1, 10), images(17, 2, 10)), cross_entropy),
    "double tuples": (double_tuples, (images(21, 1, 10), images(17, 2, 10)), cross_entropy),
    "trees": (trees, (two_inputs(37, 1), two_inputs(23, 2)), convex),
    "gpt": (gpt, (tokens(21, 1), tokens(17, 2)), token_cross_entropy),
}


def built(builder, seed=0):
    """The network in float64, the same on every rank."""
    torch.manual_seed(seed)
    return builder().double()


def staged(options, *, coarse="none", solver="sgd", iterations=1, **pipeline):
    """The same options for layout staged."""
    return replace(
        options,
        layout="staged",
        stall_timeout=PATIENCE,
        schwarz=replace(options.schwarz, variant="inexact", local_data="full"),
        coarse=CoarseOptions(model=coarse),
        local=LocalOptions(solver=solver, iterations=iterations, product="hessian"),
        pipeline=PipelineOptions(**pipeline),
    )


def trace(solver, batches):
    """Numbers of five iterations: a batch, twice more the same one, another one, and the first again."""
    results = [solver.step(batches[0]), solver.step(), solver.step(), solver.step(batches[1]), solver.step(batches[0])]
    return [judged for result in results for judged in numbers(result)]


def whole_subdomains(world, solver):
    """The subdomains of all stages as those of the whole network; of one replica. Collective."""
    holding = solver.holding
    size, stage = len(holding.objective.vector.values), holding.stages[holding.replica.rank]
    own = [size, stage.start, *holding.decomposition.subdomains]
    found, start = [], 0
    for size, segment, *subdomains in solver.holding.replica.collect(own):
        for part in subdomains:
            found.append(
                replace(
                    part,
                    index=len(found),
                    start=part.start + start,
                    stop=part.stop + start,
                    owned_start=part.owned_start + start,
                    owned_stop=part.owned_stop + start,
                    first_segment=part.first_segment + segment,
                    last_segment=part.last_segment + segment,
                )
            )
        start += size
    return tuple(found)


def whole_state(solver):
    """The network's state from all stages of this replica. Collective."""
    state = {}
    for part in solver.holding.replica.collect(dict(solver.network.state_dict())):
        state |= part
    return state


def replicated(options, network, loss, subdomains, monkeypatch):
    """On this rank alone, with the subdomains of the stages, inexact and on the whole batch."""
    options = replace(options, layout="replicated", replicas=1)
    with monkeypatch.context() as patch:
        patch.setattr(apts_mpi.replicated, "split_parameters", lambda *_: subdomains)
        return APTS(network, loss, comm=MPI.COMM_SELF, options=options)


def compare(world, options, name, monkeypatch, tolerance=1e-10):
    """Run staged on all ranks and replicated on the first; return both solvers' traces there.

    Beside rtol 1e-10 an absolute tolerance of 1e-10 holds for differences of losses, in which only rounding is left, as
    in test_equivalence.
    """
    builder, batches, loss = NETWORKS[name]
    solver = StagedAPTS(built(builder), loss, comm=world, options=options)
    found = trace(solver, batches)
    state, subdomains = whole_state(solver), whole_subdomains(world, solver)
    assert world.bcast(found) == found
    if world.rank == 0:
        network = built(builder)
        expected = trace(replicated(options, network, loss, subdomains, monkeypatch), batches)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(state, dict(network.state_dict()), rtol=tolerance, atol=tolerance)
        assert not torch.equal(next(iter(state.values())), next(iter(built(builder).state_dict().values())))
    return solver, found
