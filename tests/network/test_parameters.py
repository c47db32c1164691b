"""The flat vector that the tensors of a network alias."""

import pytest
import torch
from networks import classifier, flat
from torch import nn

from apts_mpi import InvalidInput
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.parallel.transport import Mirror, choose_device
from apts_mpi.trust_region.norms import norm


def test_norms():
    vector = torch.tensor([3.0, -4.0])
    assert norm(vector, "2") == 5.0 and norm(vector, "inf") == 4.0


def test_entries_lie_in_order_without_gaps():
    network = classifier(batch_norm=True)
    names, before = [name for name, _ in network.named_parameters()], flat(network.parameters())
    vector = FlatParameters(network)
    assert [entry.name for entry in vector.entries] == names
    assert [entry.start for entry in vector.entries] == [0, *(entry.stop for entry in vector.entries[:-1])]
    assert vector.entries[-1].stop == len(vector.values)
    assert torch.equal(vector.values, before)
    for entry, parameter in zip(vector.entries, network.parameters(), strict=True):
        assert torch.equal(vector.values[entry.start : entry.stop].view(parameter.shape), parameter)


def test_a_parameter_without_dimensions():
    """An unknown coefficient of an equation, say."""
    network = nn.Linear(2, 1)
    network.coefficient = nn.Parameter(torch.tensor(0.5))
    vector = FlatParameters(network)
    vector.values += 1.0
    assert network.coefficient.shape == () and network.coefficient.item() == 1.5


def test_backward_pass_accumulates_in_the_flat_vector():
    network = classifier()
    vector = FlatParameters(network)
    for turn in (1.0, 2.0):
        network(torch.ones(2, 10, dtype=torch.float64)).sum().backward()
        assert torch.equal(vector.gradients, flat(parameter.grad for parameter in network.parameters()))
        if turn == 1.0:
            once = vector.gradients.clone()
        torch.testing.assert_close(vector.gradients, turn * once, rtol=1e-14, atol=0.0)


def test_gradients_are_views_again_after_zero_grad():
    network = classifier()
    vector = FlatParameters(network)
    network.zero_grad()
    assert network[0].weight.grad is None
    vector.alias_gradients()
    network(torch.ones(2, 10, dtype=torch.float64)).sum().backward()
    assert vector.gradients.norm() > 0.0


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(0, 1, (0, 1)), (159, 160, (0, 1)), (159, 161, (0, 2)), (160, 176, (1, 2)), (170, 180, (1, 3))],
)
def test_parameters_that_a_range_touches(start, stop, expected):
    """Of a first layer of 160 weights and 16 biases, and 256 weights after it."""
    assert FlatParameters(classifier()).touching(start, stop) == slice(*expected)


def test_moved_parameters_are_noticed():
    network = classifier()
    vector = FlatParameters(network)
    vector.check_alias()
    network.float()
    with pytest.raises(InvalidInput, match="replaced after the solver was made"):
        vector.check_alias()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3, dtype=torch.float16),
        torch.zeros(3, dtype=torch.bfloat16),
        torch.zeros(3, dtype=torch.int64),
        torch.zeros(4, 4)[:, 0],
        torch.zeros(3, requires_grad=True),
    ],
    ids=["float16", "bfloat16", "int64", "strided", "requires_grad"],
)
def test_tensors_that_mpi_would_misread_are_refused(tensor):
    with pytest.raises(InvalidInput, match="cannot be reduced; give a contiguous float32 or float64 tensor"):
        Mirror(tensor)


def test_mirror_of_a_tensor_on_the_cpu_is_the_tensor():
    tensor = torch.arange(5.0)
    mirror = Mirror(tensor)
    memory = mirror.memory(1, 3)
    memory += 10.0
    mirror.push(0, 5)
    mirror.pull(0, 5)
    assert tensor.tolist() == [0.0, 11.0, 12.0, 3.0, 4.0]


def test_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("cpu", 3) == choose_device("auto", 3) == torch.device("cpu")
    with pytest.raises(InvalidInput, match="device: 'cuda' was asked for, but torch finds no GPU here; give --device"):
        choose_device("cuda", 0)


def test_one_device_a_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    devices = [choose_device("auto", rank) for rank in range(6)]
    assert [device.index for device in devices] == [0, 1, 2, 3, 0, 1]
    assert chosen == devices
