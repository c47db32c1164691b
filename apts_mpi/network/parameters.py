"""The flat parameter and gradient buffers that the tensors of a network alias."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.parallel.transport import ADMITTED_DTYPES


@dataclass(frozen=True)
class Entry:
    """Where a parameter lies in the flat vector: elements ``start`` to ``stop``."""

    name: str
    start: int
    stop: int


def _is_trained(parameter: torch.nn.Parameter) -> bool:
    """Whether there is something to train; an empty tensor has no place in a vector."""
    if isinstance(parameter, torch.nn.UninitializedParameter):
        raise InvalidInput("network: it has lazy modules, without parameters yet; call it once before")
    return parameter.requires_grad and parameter.numel() > 0


class FlatParameters:
    """The trainable parameters of a network as one flat vector; they keep their names and shapes as views of it.

    Parameters
    ----------
    network
        Its trainable parameters, all float32 or all float64 on one device, become views.

    Attributes
    ----------
    network : nn.Module
        As given.
    values : Tensor, shape (n,)
        The parameters.
    gradients : Tensor, shape (n,)
        Where a backward pass accumulates; the parameters' ``grad`` are views of it.
    entries : tuple of Entry
        The parameters in the order of the vector.
    parameters : tuple of Parameter
        The same, as tensors.

    Raises
    ------
    InvalidInput
        If there is no trainable parameter, or they differ in dtype or device, or have another dtype.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        named = [(name, parameter) for name, parameter in network.named_parameters() if _is_trained(parameter)]
        if not named:
            raise InvalidInput("network: it has no trainable parameter; give a network with requires_grad parameters")
        first = named[0][1]
        for name, parameter in named:
            if parameter.dtype not in ADMITTED_DTYPES:
                raise InvalidInput(
                    f"network: parameter {name} has dtype {parameter.dtype}, which MPI cannot reduce; "
                    "convert the network with network.float() or network.double()"
                )
            if parameter.dtype != first.dtype or parameter.device != first.device:
                raise InvalidInput(
                    f"network: parameter {name} is {parameter.dtype} on {parameter.device}, {named[0][0]} is "
                    f"{first.dtype} on {first.device}; convert the network to one dtype and device"
                )
        self.network = network
        self.parameters = tuple(parameter for _, parameter in named)
        size = sum(parameter.numel() for parameter in self.parameters)
        self.values = torch.empty(size, dtype=first.dtype, device=first.device)
        self.gradients = torch.zeros_like(self.values)
        entries = []
        start = 0
        for name, parameter in named:
            entry = Entry(name, start, start + parameter.numel())
            view = self.values[entry.start : entry.stop].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            entries.append(entry)
            start = entry.stop
        self.entries = tuple(entries)
        self._gradient_views = tuple(
            self.gradients[entry.start : entry.stop].view(parameter.shape)
            for entry, parameter in zip(self.entries, self.parameters, strict=True)
        )
        self.alias_gradients()

    def alias_gradients(self) -> None:
        """Make the parameters' ``grad`` views of `gradients`; ``network.zero_grad()`` takes them away."""
        for parameter, view in zip(self.parameters, self._gradient_views, strict=True):
            if parameter.grad is not view:
                parameter.grad = view

    def check_alias(self) -> None:
        """Raise `InvalidInput` if the network's parameters were moved away from the flat vector."""
        base, size = self.values.data_ptr(), self.values.element_size()
        places = zip(self.entries, self.parameters, strict=True)
        if any(parameter.data_ptr() != base + entry.start * size for entry, parameter in places):
            raise InvalidInput(
                "network: its parameters were replaced after the solver was made (by network.to(...)?); "
                "convert the network first, then make the solver"
            )

    def versions(self) -> list[int]:
        """How often each parameter was changed in place through its own tensor, as users do, the solver never."""
        return [parameter._version for parameter in self.parameters]

    def touching(self, start: int, stop: int) -> slice:
        """The parameters that have elements in ``start`` to ``stop``, as a slice of `entries`."""
        touched = [index for index, entry in enumerate(self.entries) if entry.start < stop and start < entry.stop]
        return slice(touched[0], touched[-1] + 1)
