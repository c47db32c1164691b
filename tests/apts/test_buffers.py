"""Buffers of a network: those that a pass changes move once, on all ranks alike, and others are left alone."""

import math

import pytest
import torch
from mpi4py import MPI
from networks import CLASSES, FEATURES, classified, cross_entropy
from torch import nn

from apts_mpi import APTS, APTSOptions, CoarseOptions, LocalOptions, TrustRegionOptions
from apts_mpi.network.buffers import Buffers
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.staged.solver import StagedAPTS
from apts_mpi.tools.events import Events

WIDTH = 8


class Kept(nn.Module):
    """A buffer, and what a pass does with it."""

    def __init__(self, buffer, change=lambda module, inputs: None, persistent=True):
        super().__init__()
        self.register_buffer("kept", buffer, persistent=persistent)
        self.change, self.calls = change, 0

    def forward(self, inputs):
        self.calls += 1
        self.change(self, inputs.detach())
        return inputs


def network(*kept):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, WIDTH), *kept, nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()


def solver(world, trained, layout="replicated"):
    chosen = {
        "local": LocalOptions(solver="sgd"),
        "coarse": CoarseOptions(model="none"),
        "trust_region": TrustRegionOptions(initial_radius=0.05),
    }
    if layout == "staged":
        return StagedAPTS(trained, cross_entropy, comm=world, options=APTSOptions(layout="staged", **chosen))
    return APTS(trained, cross_entropy, comm=world, options=APTSOptions(subdomains=2, **chosen))


def accepted_steps(world, trained, steps=2, layout="replicated"):
    made = solver(world, trained, layout)
    for _ in range(steps):
        assert made.step(classified()).accepted
    return made


def assert_same_on_all_ranks(world, tensor):
    # As text: nan is nan.
    assert len(set(world.allgather(repr((tensor.dtype, tensor.tolist()))))) == 1


class CausalAttention(nn.Module):
    """With torch's own mask, which has minus infinity above the diagonal."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(4))
        self.layer = nn.TransformerEncoderLayer(2, 1, 8, dropout=0.0, batch_first=True)

    def forward(self, inputs):
        return self.layer(inputs.view(-1, 4, 2), src_mask=self.mask, is_causal=True).flatten(1)


@pytest.mark.mpi
@pytest.mark.parametrize("layout", ["replicated", "staged"])
def test_a_causal_mask_stays_as_it_is(world, layout):
    if layout == "staged" and world.size > 2:
        pytest.skip("the network has two stages")
    torch.manual_seed(0)
    attention = CausalAttention()
    trained = network(attention)
    before, version = attention.mask.clone(), attention.mask._version
    made = accepted_steps(world, trained, layout=layout)
    mask = dict(trained.named_buffers()).get("1.mask")
    if mask is not None:
        assert mask is attention.mask and torch.equal(mask, before)
        assert layout == "staged" or mask._version == version
    assert math.isfinite(made.step(classified()).schwarz.trial_loss)


@pytest.mark.mpi
def test_a_buffer_that_does_not_change_is_neither_copied_nor_sent(world):
    kept = Kept(torch.full((1 << 20,), -math.inf, dtype=torch.float64))
    made = solver(world, network(kept))
    own, version, seen = torch._C._data_address(kept.kept), kept.kept._version, set()
    kept.change = lambda module, inputs: seen.add(torch._C._data_address(module.kept))
    assert made.step(classified()).accepted and seen == {own}
    assert kept.kept._version == version and torch._C._data_address(kept.kept) == own


CHANGES = {
    "in place": lambda module, inputs: module.kept.mul_(0.9).add_(inputs.mean(0), alpha=0.1),
    "through data": lambda module, inputs: module.kept.data.mul_(0.9).add_(inputs.mean(0), alpha=0.1),
    "by assignment": lambda module, inputs: setattr(module, "kept", 0.9 * module.kept + 0.1 * inputs.mean(0)),
}


@pytest.mark.mpi
@pytest.mark.parametrize("change", CHANGES)
def test_a_buffer_moves_by_the_mean_over_all_samples(world, change):
    kept = Kept(torch.zeros(WIDTH), CHANGES[change])
    trained, own = network(kept), kept.kept
    accepted_steps(world, trained, steps=1)
    with torch.no_grad():
        expected = 0.1 * trained[0](classified()[0]).mean(0)
    torch.testing.assert_close(kept.kept, expected, rtol=1e-12, atol=1e-14)
    assert kept.kept is own
    assert_same_on_all_ranks(world, kept.kept)


@pytest.mark.mpi
def test_complex_buffers_are_averaged(world):
    def change(module, inputs):
        module.kept.add_(torch.complex(inputs.mean(0), 2.0 * inputs.mean(0)))

    kept = Kept(torch.zeros(WIDTH, dtype=torch.complex128), change)
    trained = network()
    trained.insert(1, kept)
    accepted_steps(world, trained, steps=1)
    mean = trained[0](classified()[0]).mean(0).detach()
    torch.testing.assert_close(kept.kept, torch.complex(mean, 2.0 * mean), rtol=1e-12, atol=1e-14)


@pytest.mark.mpi
def test_infinity_that_a_buffer_has_or_takes_is_kept(world):
    """A running maximum begins at minus infinity; what overflows is infinite."""

    def change(module, inputs):
        module.kept[0] = torch.maximum(module.kept[0], torch.tensor(3.0))
        module.kept[1] = math.inf

    kept = Kept(torch.tensor([-math.inf, 0.0, -math.inf, math.nan]), change)
    accepted_steps(world, network(kept), steps=1)
    found = kept.kept.tolist()
    assert found[0] == pytest.approx(3.0) and found[1:3] == [math.inf, -math.inf] and math.isnan(found[3])


@pytest.mark.mpi
@pytest.mark.parametrize("on_one_rank", [False, True])
def test_a_buffer_that_changes_now_and_then(world, on_one_rank):
    """Only in some calls, which may be on one rank alone: the others must not miss the message."""

    def change(module, inputs):
        if module.calls % 3 == 0 and (not on_one_rank or world.rank == world.size - 1):
            module.kept.add_(1.0)

    kept = Kept(torch.zeros(3), change)
    trained = network(kept, Kept(torch.ones(2)))
    made = solver(world, trained)
    for _ in range(5):
        made.step(classified())
        assert_same_on_all_ranks(world, kept.kept)
    assert 0.0 < kept.kept[0] <= 5.0
    trained.eval()
    kept.change = lambda module, inputs: module.kept.add_(1.0) if module.training else None
    before = kept.kept.clone()
    made.step(classified())
    assert torch.equal(kept.kept, before)


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8])
def test_integers_are_those_of_rank_0(world, dtype):
    """Counts of what a rank sees are other ones on each; all have to go on with the same."""

    def change(module, inputs):
        module.kept.copy_((inputs[:4, 0] > 0.0).to(dtype) + (0 if dtype == torch.bool else world.rank))

    kept = Kept(torch.zeros(4, dtype=dtype), change)
    trained = network(kept)
    accepted_steps(world, trained)
    assert kept.kept.dtype == dtype
    assert_same_on_all_ranks(world, kept.kept)


@pytest.mark.mpi
@pytest.mark.parametrize("first", [None, torch.zeros(1, 2)], ids=["none yet", "another shape"])
def test_a_buffer_that_is_made_anew_is_the_same_on_all_ranks(world, first):
    """As masks and angles that are kept for the longest input so far."""

    def change(module, inputs):
        if module.kept is None or len(module.kept) < 3:
            module.register_buffer("kept", torch.full((3, 2), float(world.rank)), persistent=False)

    kept = Kept(first, change, persistent=False)
    trained = network(kept)
    accepted_steps(world, trained, steps=3)
    assert kept.kept.shape == (3, 2) and (kept.kept == 0.0).all()


@pytest.mark.mpi
def test_a_buffer_of_two_modules_stays_one(world):
    shared = torch.zeros(2)
    first, second = Kept(shared, lambda module, inputs: module.kept.add_(1.0)), Kept(torch.zeros(2))
    second.kept = shared = first.kept
    seen = []
    second.change = lambda module, inputs: seen.append(module.kept is first.kept)
    trained = network().insert(1, first).insert(2, second)
    accepted_steps(world, trained)
    assert first.kept is second.kept is shared and all(seen)
    assert shared.tolist() == pytest.approx([2.0, 2.0])


@pytest.mark.mpi
@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(1, 3).expand(4, 3),
        torch.from_numpy(torch.zeros(3).numpy()),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(0),
        torch.eye(3).to_sparse(),
        torch.arange(6.0).view(2, 3).T,
    ],
    ids=["expanded", "numpy's", "bfloat16", "empty", "sparse", "transposed"],
)
def test_buffers_of_all_kinds_stay(world, buffer):
    torch.manual_seed(0)
    kept = Kept(buffer)
    trained = network().insert(1, kept)
    accepted_steps(world, trained)
    assert kept.kept is buffer
    assert torch.equal(kept.kept.to_dense(), buffer.to_dense())


@pytest.mark.mpi
def test_rejected_steps_move_no_buffers(world):
    kept = Kept(torch.zeros(WIDTH), CHANGES["in place"])
    trained = network(kept)
    made = solver(world, trained)
    made.state.radius = 1e6
    before = kept.kept.clone()
    assert not made.step((100.0 * classified()[0], classified()[1])).accepted
    assert torch.equal(kept.kept, before)


def test_a_graph_keeps_the_buffers_that_it_saw():
    """The backward pass comes after the buffers have moved."""
    trained = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    buffers = Buffers(trained, Communicator(MPI.COMM_SELF, Events()), trained[0].weight.detach())
    inputs = torch.randn(5, 3, dtype=torch.float64)
    buffers.begin()
    with buffers.noted(1.0):
        outputs = trained(inputs)
    buffers.accept()
    outputs.sum().backward()
    assert trained[1].num_batches_tracked == 1 and trained[1].running_mean.abs().sum() > 0.0
