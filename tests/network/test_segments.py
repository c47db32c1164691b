"""A network as a sequence of segments."""

import pytest
import torch
from networks import classifier
from torch import nn

from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.segments import SegmentedNetwork


def cut(network, forward=None):
    segmented = SegmentedNetwork(network, forward)
    return segmented, segmented.layers(FlatParameters(network))


def places(layers):
    return [(layer.start, layer.stop, layer.first_segment, layer.last_segment) for layer in layers]


def test_a_layer_has_the_segments_without_parameters_after_it():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Dropout(), nn.Linear(3, 2))
    segmented, layers = cut(network)
    assert len(segmented) == 5
    assert places(layers) == [(0, 15, 1, 3), (15, 23, 4, 4)]
    assert [layer.name for layer in layers] == ["1", "4"]


def test_nested_sequentials_are_flattened():
    inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    network = nn.Sequential(nn.Sequential(nn.Linear(4, 3), nn.Tanh()), nn.Sequential(inner, nn.Linear(3, 2)))
    segmented, layers = cut(network)
    assert [type(segment) for segment in segmented.segments] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert places(layers) == [(0, 15, 0, 1), (15, 27, 2, 3), (27, 35, 4, 4)]
    assert [layer.name for layer in layers] == ["0.0", "1.0.0", "1.1"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, inputs):
        return inputs + self.second(self.first(inputs))


def test_modules_inside_a_segment_are_layers_that_share_it():
    segmented, layers = cut(nn.Sequential(nn.Linear(3, 3), Block(), nn.Tanh(), nn.Linear(3, 2)))
    assert len(segmented) == 4
    assert places(layers) == [(0, 12, 0, 0), (12, 24, 1, 1), (24, 36, 1, 2), (36, 44, 3, 3)]


def test_other_networks_are_one_segment():
    segmented, layers = cut(Block())
    assert len(segmented) == 1
    assert places(layers) == [(0, 12, 0, 0), (12, 24, 0, 0)]


def test_network_that_is_called_by_a_function_is_one_segment():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)).double()
    segmented, layers = cut(network, lambda network, inputs: 2.0 * network(inputs))
    assert len(segmented) == 1 and len(layers) == 2
    inputs = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(segmented.segments[0](inputs), 2.0 * network(inputs))


def test_subclass_of_sequential_is_one_segment():
    """It may have a forward of its own."""

    class Doubled(nn.Sequential):
        def forward(self, inputs):
            return 2.0 * super().forward(inputs)

    assert len(cut(Doubled(nn.Linear(2, 2), nn.Linear(2, 2)))[0]) == 1


def test_shared_tensor_extends_its_layer_to_its_last_user():
    network = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    network[2].weight = network[0].weight
    _, layers = cut(network)
    assert places(layers) == [(0, 12, 0, 2), (12, 15, 2, 3), (15, 23, 4, 4)]


def test_frozen_layers_belong_to_the_one_before():
    network = classifier()
    network[2].requires_grad_(False)
    _, layers = cut(network)
    assert [(layer.first_segment, layer.last_segment) for layer in layers] == [(0, 3), (4, 5), (6, 7), (8, 9), (10, 10)]


@pytest.mark.parametrize(
    ("network", "shape", "counts"),
    [
        (lambda: classifier(), (5, 10), [160, 0, 256, 0, 256, 0, 256, 0, 256, 0, 48]),
        # Convolutions: 6 x 6 outputs of 9 products for each of 2 channels, then 4 x 4 of 18 for 3.
        (
            lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 5)).double(),
            (5, 1, 8, 8),
            [36 * 9 * 2, 16 * 18 * 3, 0, 48 * 5],
        ),
    ],
    ids=["linear", "convolutions"],
)
def test_share_of_work(network, shape, counts):
    segmented = SegmentedNetwork(network(), None)
    segmented.measure(torch.zeros(shape, dtype=torch.float64))
    for index, count in enumerate(counts):
        assert segmented.share(index, index) == pytest.approx(count / sum(counts), abs=1e-15)
    assert segmented.share(0, len(counts) - 1) == pytest.approx(1.0)


def test_share_without_weights_is_even():
    segmented = SegmentedNetwork(nn.Sequential(nn.Tanh(), nn.Tanh()), None)
    segmented.measure(torch.zeros(2, 3))
    assert segmented.share(0, 0) == 0.5
