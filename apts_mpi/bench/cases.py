"""Networks and batches whose iterations are timed.

The samples are random, in the shapes of the problems: the costs do not depend on their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.problems import Wanted, build
from apts_mpi.problems.images import PIXELS
from apts_mpi.problems.layers import mlp
from apts_mpi.problems.losses import token_cross_entropy
from apts_mpi.problems.text import CONTEXT, character_gpt

CLASSES, CHARACTERS = 10, 65

# Iterations that are timed together: what is not done in each of them, such as curvature, counts with its share. As
# many as lie between updates of curvature, so that the first of them, which all update, are not timed.
TOGETHER = 20

# Different batches, as an iteration on one that is solved may leave out parts.
BATCHES = 5

SUBDOMAINS = (1, 2, 3, 6)

HOST = torch.device("cpu")

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A network and its batches."""

    network: Callable[[], nn.Module]
    batch_size: int
    loss: Loss = cross_entropy
    sample: Callable[[int], Batch] = lambda count: (torch.randn(count, PIXELS), torch.randint(CLASSES, (count,)))

    def make(self, device: torch.device = HOST) -> nn.Module:
        """The network, the same on every call."""
        torch.manual_seed(0)
        return self.network().to(device)

    def batches(self, device: torch.device = HOST) -> list[Batch]:
        """Random ones, the same on every call."""
        torch.manual_seed(1)
        drawn = [self.sample(self.batch_size) for _ in range(BATCHES)]
        return [(inputs.to(device), targets.to(device)) for inputs, targets in drawn]

    def subdomains(self) -> list[int]:
        """Those of `SUBDOMAINS` for which the network has layers."""
        network = self.make()
        layers = SegmentedNetwork(network, None).layers(FlatParameters(network))
        return [number for number in SUBDOMAINS if number <= len(layers)]


def _of_problem(name: str) -> Callable[[], nn.Module]:
    """The network of a problem, without its data."""
    return lambda: build(name, wanted=Wanted(inputs=False, targets=False)).network


def _characters(count: int) -> Batch:
    tokens = torch.randint(CHARACTERS, (count, CONTEXT + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


CASES: Mapping[str, Case] = {
    "mlp-256": Case(_of_problem("fashion-mnist"), 256),
    "mlp-2000": Case(_of_problem("fashion-mnist"), 2000),
    "cnn-250": Case(_of_problem("fashion-mnist-cnn"), 250),
    "resnet-500": Case(_of_problem("fashion-mnist-resnet"), 500),
    "text-64": Case(lambda: character_gpt(CHARACTERS, CONTEXT, 128, 4, 4), 64, token_cross_entropy, _characters),
    "wide-1024": Case(lambda: mlp([PIXELS, 2048, 2048, CLASSES], nn.ReLU), 1024),
}
