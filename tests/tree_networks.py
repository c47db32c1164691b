"""Networks whose inputs and outputs are trees of tensors, and losses that read several of them."""

from dataclasses import dataclass, replace

import torch
from networks import cross_entropy, squared_error
from torch import nn

from apts_mpi.problems import Problem
from apts_mpi.tools.trees import map_tensors


@dataclass
class Found:
    """What `TwoInputs` returns: two outputs for the loss, and others that it does not read, or that have no samples."""

    classes: torch.Tensor
    value: torch.Tensor
    extent: torch.Tensor
    largest: torch.Tensor
    seen: torch.Tensor
    nothing: None = None
    note: str = "not a tensor"


class TwoInputs(nn.Module):
    """A network of two inputs, with two outputs; ``extent`` is an auxiliary loss, of no samples."""

    def __init__(self, returned=Found):
        super().__init__()
        self.image, self.features = nn.Linear(6, 8), nn.Linear(3, 8)
        self.inner, self.classes, self.value = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 1)
        self.returned = returned

    def forward(self, image, features):
        hidden = torch.tanh(self.image(image.flatten(1)) + self.features(features))
        hidden = torch.tanh(self.inner(hidden))
        scores = self.classes(hidden)
        return self.returned(
            classes=scores,
            value=self.value(hidden)[:, 0],
            extent=self.value.weight.square().mean(),
            largest=scores.argmax(dim=1),
            seen=hidden.detach(),
        )


def two_inputs(samples=24, seed=1):
    """Inputs of `TwoInputs`, and targets."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(samples, 2, 3, generator=generator, dtype=torch.float64)
    features = torch.randn(samples, 3, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 3, (samples,), generator=generator)
    return {"image": image, "features": features}, {"classes": classes, "value": image.sum(dim=(1, 2))}


def coupled(outputs, targets):
    """A loss in which the two outputs multiply each other, with an auxiliary loss."""
    apart = cross_entropy(outputs.classes, targets["classes"]) + squared_error(outputs.value, targets["value"])
    return apart + (outputs.value[:, None] * outputs.classes).sin().mean() + 0.1 * outputs.extent


def convex(outputs, targets):
    """Coupled, and convex in the outputs, as rows of a square root have to be."""
    both = torch.cat([outputs.classes, outputs.value[:, None]], dim=1)
    apart = squared_error(outputs.value, targets["value"]) + outputs.extent
    return cross_entropy(both, targets["classes"]) + apart


def coupled_in_mapping(outputs, targets):
    """The same of outputs in a mapping."""
    return coupled(Found(**outputs), targets)


def make_two_inputs(returned=Found):
    """The network in float64, the same on every rank."""
    torch.manual_seed(0)
    return TwoInputs(returned).double()


def problem():
    """A problem of trees for the command line, in the dtype that it asks for."""
    dtype = torch.get_default_dtype()
    data = [two_inputs(60), two_inputs(30, seed=2)]

    def as_wanted(tensor):
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    train, test = ((map_tensors(as_wanted, inputs), map_tensors(as_wanted, targets)) for inputs, targets in data)
    return Problem(name="trees", network=make_two_inputs().to(dtype), loss=convex, train=train, test=test)


def sequence():
    """The same with a network that can be cut into stages."""
    return replace(problem(), network=trees().to(torch.get_default_dtype()))


class Joined(nn.Module):
    """Takes two inputs by their names."""

    def __init__(self):
        super().__init__()
        self.image, self.features = nn.Linear(6, 8), nn.Linear(3, 8)

    def forward(self, image, features):
        return torch.tanh(self.image(image.flatten(1)) + self.features(features))


class Heads(nn.Module):
    """Returns several outputs."""

    def __init__(self):
        super().__init__()
        self.classes, self.value = nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, hidden):
        scores = self.classes(hidden)
        value, extent = self.value(hidden)[:, 0], self.value.weight.square().mean()
        return Found(classes=scores, value=value, extent=extent, largest=scores.argmax(dim=1), seen=hidden.detach())


def trees():
    """Nine linear layers and two heads, with mappings for inputs and targets and a dataclass for outputs."""
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(7)]
    return nn.Sequential(Joined(), *layers, Heads())
