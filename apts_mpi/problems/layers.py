"""Networks that several families of problems use."""

from itertools import pairwise

from torch import nn


def mlp(widths: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers of the given widths, (b, widths[0]) to (b, widths[-1]), with the activation between them."""
    layers = []
    for width_in, width_out in pairwise(widths):
        layers += [nn.Linear(width_in, width_out), activation()]
    return nn.Sequential(*layers[:-1])
