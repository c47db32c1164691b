"""What a backward pass has left on all ranks: the mean gradient, and which parameters and layers it has reached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apts_mpi.network.recorder import LayerRecord
from apts_mpi.optim.subdomains import LayerSubdomain
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror


@dataclass(frozen=True)
class Gathered:
    """The gradient as all ranks have it.

    Attributes
    ----------
    gradient : Tensor, shape (n,)
        Of the mean loss of all ranks; zero where there is none.
    active : list of list of bool
        Of each subdomain, which of its parameters have a gradient on one rank at least.
    called : list of bool
        Of each subdomain, whether its layer was seen to be called on one rank at least.
    records : list of list of LayerRecord
        Calls of the layer of each subdomain, on this rank.
    samples : int
        Number of this rank's samples, as layers see them.
    """

    gradient: torch.Tensor
    active: list[list[bool]]
    called: list[bool]
    records: list[list[LayerRecord]]
    samples: int


def gather(subdomains: Sequence[LayerSubdomain], records: Sequence[LayerRecord], comm: Communicator) -> Gathered:
    """What all ranks have, in one message. Collective."""
    reached = [record for record in records if record.gradient is not None]
    of_layers = [[record for record in reached if record.module is part.module] for part in subdomains]
    parameters = [value for part in subdomains for value in part.parameters]
    flags = [value.grad is not None for value in parameters] + [bool(found) for found in of_layers]
    gradient = torch.cat([_gradient_of(value) for value in parameters])
    if comm.size > 1:
        size = len(gradient)
        packed = Mirror(torch.cat([gradient, gradient.new_tensor(flags)]))
        comm.sum(packed)
        gradient = packed.tensor[:size] / comm.size
        flags = (packed.tensor[size:] > 0.0).tolist()
    given = iter(flags)
    active = [[next(given) for _ in part.parameters] for part in subdomains]
    return Gathered(gradient, active, list(given), of_layers, _samples_of(of_layers))


def _gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter).flatten()
    return (gradient.to_dense() if gradient.is_sparse else gradient).flatten()


def _samples_of(of_layers: Sequence[Sequence[LayerRecord]]) -> int:
    """Samples of the passes: of the layers' first dimensions the longest, as some have no samples in theirs."""
    counts = [sum(len(record.inputs) if record.inputs.dim() else 1 for record in found) for found in of_layers]
    return max([1, *counts])
