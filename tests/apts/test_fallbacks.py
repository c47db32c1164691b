"""What takes the place of what cannot be done: the step goes on, and says what it did, once."""

import logging

import pytest
import torch
import torch.utils.checkpoint
from mpi4py import MPI
from networks import CLASSES, FEATURES, classified, cross_entropy
from torch import nn

from apts_mpi import APTS, APTSOptions, CoarseOptions, InvalidInput, LocalOptions, StagedAPTS
from apts_mpi.curvature.linearisation import Column, Linearisation
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Pass
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import Events


class Opaque(torch.autograd.Function):
    """A tangent of which autograd knows the first derivative alone."""

    @staticmethod
    def forward(ctx, inputs):
        ctx.save_for_backward(inputs)
        return inputs.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors
        return gradient * (1.0 - inputs.tanh() ** 2)


class OpaqueLinear(nn.Linear):
    def forward(self, inputs):
        return Opaque.apply(super().forward(inputs))


class Bags(nn.Module):
    """Bags of embeddings, for which torch has neither second derivatives nor forward mode."""

    def __init__(self):
        super().__init__()
        self.bags = nn.EmbeddingBag(6, 8, mode="sum")

    def forward(self, inputs):
        return self.bags((2.0 * inputs).long().clamp(-2, 3) + 2)


class Again(nn.Module):
    """Run anew in the backward pass, by the variant of torch's that has no second derivatives."""

    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Linear(FEATURES, 8), nn.Linear(8, 8)

    def forward(self, inputs):
        hidden = self.first(inputs)
        if not hidden.requires_grad:
            return self.inner(hidden)
        return torch.utils.checkpoint.checkpoint(self.inner, hidden, use_reentrant=True)


FIRST = {"once differentiable": lambda: OpaqueLinear(FEATURES, 8), "bags": Bags, "reentrant checkpoint": Again}


def network_of(name):
    torch.manual_seed(0)
    return nn.Sequential(FIRST[name](), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()


class OpaqueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs, targets):
        ctx.save_for_backward(outputs, targets)
        return nn.functional.cross_entropy(outputs, targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        outputs, targets = ctx.saved_tensors
        slope = outputs.softmax(1) - nn.functional.one_hot(targets, outputs.shape[1])
        return gradient * slope / len(targets), None


def opaque_loss(outputs, targets):
    return OpaqueLoss.apply(outputs, targets)


def of_speech(outputs, targets):
    """Connectionist temporal classification of two symbols a sample, over as many times as there are features."""
    scores = outputs.view(len(outputs), -1, 3).transpose(0, 1).log_softmax(2)
    lengths = torch.full((len(outputs),), len(scores)), torch.full((len(outputs),), 1)
    return nn.functional.ctc_loss(scores, 1 + targets[:, None] % 2, *lengths)


def speech():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, 12)).double()


def steps(solver, count, batch=None):
    return [solver.step(batch or classified()) for _ in range(count)]


def notes_of(results):
    return [note for result in results for note in result.notes]


def reduced(network, loss, approximates):
    inputs, targets = classified(12)
    vector, segmented = FlatParameters(network), SegmentedNetwork(network, None)
    size = vector.values.numel()
    torch.manual_seed(3)
    columns = [Column(a, b, torch.randn(b - a).to(vector.values)) for a, b in [(0, size), (5, 40), (30, size)]]
    segmented.measure(inputs.to(vector.values))
    objective = Objective(
        segmented=segmented,
        vector=vector,
        loss=loss,
        inexact=False,
        keep_gradients=False,
        comm=Communicator(MPI.COMM_SELF, Events()),
    )
    part = Pass(inputs.to(vector.values), targets, 1.0, (7,), (), 0, 12)
    return Linearisation(objective, approximates).reduced(part, columns)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-3)])
def test_differences_give_the_curvature_of_derivatives(dtype, tolerance):
    """Central differences are right to the epsilon to the power 2/3, of products of a few terms of alike size."""

    class Plain(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs).tanh()

    torch.manual_seed(0)
    opaque = nn.Sequential(OpaqueLinear(FEATURES, 8), OpaqueLinear(8, CLASSES)).to(dtype)
    plain = nn.Sequential(Plain(FEATURES, 8), Plain(8, CLASSES)).to(dtype)
    plain.load_state_dict(opaque.state_dict())
    expected = reduced(plain, cross_entropy, approximates=False)
    found = reduced(opaque, opaque_loss, approximates=True)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


class Experts(nn.Module):
    """Experts of which a gate takes two a sample, and how unevenly it does, as a number times a number of Python's."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(FEATURES, 3), nn.Linear(FEATURES, 3 * CLASSES)

    def forward(self, inputs):
        shares = self.gate(inputs).softmax(dim=1)
        best = shares.topk(2, dim=1)
        kept = torch.zeros_like(shares).scatter(1, best.indices, best.values)
        outputs = self.experts(inputs).view(-1, 3, CLASSES)
        return (kept[:, :, None] * outputs).sum(dim=1), 3.0 * shares.mean(dim=0).square().sum()


def balanced(outputs, targets):
    return cross_entropy(outputs[0], targets) + 0.1 * outputs[1].square()


def test_a_number_without_samples_keeps_its_precision():
    torch.manual_seed(0)
    network = Experts()
    found = reduced(network, balanced, approximates=False)
    expected = reduced(network.double(), balanced, approximates=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.mpi
@pytest.mark.parametrize("name", FIRST)
def test_a_network_without_second_derivatives_is_trained_and_said_so_once(world, name, caplog):
    with caplog.at_level(logging.WARNING, logger="apts_mpi"):
        results = steps(APTS(network_of(name), cross_entropy, comm=world), 6)
    assert all(result.accepted for result in results[:3])
    assert results[-1].schwarz.trial_loss < 0.97 * results[0].schwarz.loss
    if name == "reentrant checkpoint":  # runs as it is where no graph is made, which is enough for forward mode
        assert not notes_of(results)
        return
    (note,) = notes_of(results)
    own = type(FIRST[name]()).__name__
    assert note.startswith(f"coarse.model auto: {own} has no second derivatives") and "differences are taken" in note
    assert [record.getMessage() for record in caplog.records] == ([note] if world.rank == 0 else [])


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("name", ["once differentiable", "bags"])
def test_stages_without_second_derivatives_take_the_same_steps(world, name):
    if world.size > 2:
        pytest.skip("the network has no more stages")
    options = APTSOptions(layout="staged", stall_timeout=60.0)
    staged = steps(StagedAPTS(network_of(name), cross_entropy, comm=world, options=options), 4)
    assert all(result.accepted for result in staged)
    assert len(notes_of(staged)) == 1


@pytest.mark.mpi
@pytest.mark.parametrize("loss", [opaque_loss, of_speech])
def test_a_loss_without_second_derivatives_is_trained(world, loss):
    network = speech() if loss is of_speech else network_of("once differentiable")
    results = steps(APTS(network, loss, comm=world), 6)
    assert results[-1].schwarz.trial_loss < 0.9 * results[0].schwarz.loss
    assert any("the loss has no second derivatives" in note for note in notes_of(results))


@pytest.mark.mpi
def test_a_model_that_was_asked_for_is_an_error(world):
    options = APTSOptions(coarse=CoarseOptions(model="gauss-newton"))
    with pytest.raises(InvalidInput, match=r"coarse.model: 'gauss-newton' .* choose --coarse none"):
        steps(APTS(network_of("bags"), cross_entropy, comm=world, options=options), 1)


def root_loss(outputs, targets):
    """Finite with its gradient, but not with its second derivative, where an output is 0."""
    return outputs.abs().pow(1.5).mean() + (outputs - 1.0).square().mean()


@pytest.mark.mpi
def test_a_curvature_that_is_not_finite_gives_the_plain_sum(world):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    network[2].weight.data.zero_()
    network[2].bias.data.zero_()
    results = steps(APTS(network, root_loss, comm=world, options=APTSOptions(subdomains=2)), 4)
    assert results[0].accepted and results[0].schwarz.predicted_reduction > 0.0
    assert any("is not finite" in note for note in results[0].notes)
    # Away from the root there is curvature again.
    assert results[-1].accepted and not notes_of(results[1:])


@pytest.mark.parametrize("solver", ["kfac", "gauss-newton"])
def test_the_plain_sum_is_that_of_a_solver_without_coarse_level(solver):
    found = []
    for model in ("auto", "none"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double()
        network[2].weight.data.zero_()
        network[2].bias.data.zero_()
        options = APTSOptions(
            subdomains=2, local=LocalOptions(solver=solver), coarse=CoarseOptions(model=model, samples=0.5)
        )
        apts = APTS(network, root_loss, comm=MPI.COMM_SELF, options=options)
        result = apts.step(classified())
        found.append((result.schwarz.predicted_reduction, apts.holding.objective.vector.values.clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


class Normalised(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        self.first, self.inner = nn.Linear(FEATURES, 8), nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.last, self.checkpointed = nn.Linear(8, CLASSES), checkpointed

    def forward(self, inputs):
        hidden = self.first(inputs)
        if self.checkpointed is not None and hidden.requires_grad:
            return self.last(torch.utils.checkpoint.checkpoint(self.inner, hidden, use_reentrant=self.checkpointed))
        return self.last(self.inner(hidden))


@pytest.mark.mpi
@pytest.mark.parametrize("solver", ["kfac", "sgd", "tr"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_statistics_of_what_is_run_again_count_once(world, reentrant, solver):
    """They move as without checkpointing, on acceptance."""
    found = []
    for checkpointed in (None, reentrant):
        torch.manual_seed(0)
        options = APTSOptions(subdomains=2, local=LocalOptions(solver=solver), coarse=CoarseOptions(model="none"))
        network = Normalised(checkpointed).double()
        apts = APTS(network, cross_entropy, comm=world, options=options)
        before = network.inner[1].running_mean.clone()
        if solver != "kfac":  # whose step may be short in any ball
            apts.state.radius = 1e9
            assert not apts.step(classified()).accepted
        assert torch.equal(network.inner[1].running_mean, before) and network.inner[1].num_batches_tracked == 0
        apts.state.radius = 1e-3
        assert apts.step(classified()).accepted
        found.append([buffer.clone() for buffer in network.buffers()])
    # What is recorded of checkpointed layers differs, and so do the steps: by no more than the ball.
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again.double(), plain.double(), rtol=1e-2, atol=2e-3)
    assert found[1][2] == 1


@pytest.mark.parametrize("loss", [cross_entropy, opaque_loss])
@pytest.mark.parametrize("name", ["once differentiable", "reentrant checkpoint"])
def test_dense_blocks_need_no_second_derivatives(name, loss):
    """The automatic local solver of a network that a function calls."""
    solver = APTS(network_of(name), loss, comm=MPI.COMM_SELF, forward=lambda network, inputs: network(inputs))
    assert solver.options.local.solver == "gauss-newton"
    results = steps(solver, 10)  # the damping begins low
    assert results[-1].schwarz.trial_loss < 0.95 * results[0].schwarz.loss
