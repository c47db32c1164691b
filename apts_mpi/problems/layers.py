"""Networks that several families of problems use."""

from torch import nn


def mlp(widths: list[int], activation: type[nn.Module]) -> nn.Sequential:
    """Linear layers of the given widths, (b, widths[0]) to (b, widths[-1]), with the activation between them."""
    layers = []
    for width_in, width_out in zip(widths[:-1], widths[1:]):
        layers += [nn.Linear(width_in, width_out), activation()]
    return nn.Sequential(*layers[:-1])
