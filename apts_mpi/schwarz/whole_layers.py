"""The layers of a subdomain with their curvature."""

from __future__ import annotations

from torch import nn

from apts_mpi.curvature.kinds import make_curvature
from apts_mpi.local.solver import WholeLayer
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.partition import Subdomain


def whole_layers(decomposition: Decomposition, network: nn.Module, subdomain: Subdomain) -> list[WholeLayer]:
    """The layers of a subdomain with their curvature and their range within its block."""
    found = []
    for layer in decomposition.layers_of(subdomain):
        module = network.get_submodule(layer.name)
        part = slice(layer.start - subdomain.start, layer.stop - subdomain.start)
        found.append(WholeLayer(make_curvature(module, layer.stop - layer.start), module, part))
    return found
