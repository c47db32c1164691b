"""The flat parameter and gradient buffers that the tensors of a network alias."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.parallel.transport import ADMITTED_DTYPES

# What is said of a network of which `FlatParameters.lost_gradients`.
FREEZES = "network: its forward pass changes requires_grad of a parameter; freeze and unfreeze between steps"


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


def trained_parameters(network: torch.nn.Module) -> list[tuple[Entry, torch.nn.Parameter]]:
    """The trainable parameters in the order of the flat vector, and where they lie in it; their values are not read."""
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InvalidInput(
                f"network: {name or 'it'} is a module of torch.jit's, whose tensors cannot be exchanged in a pass; "
                "train the network that it was made of, and script or trace it afterwards"
            )
    found = []
    start = 0
    for name, parameter in network.named_parameters():
        if _is_trained(parameter):
            size = parameter.numel() * (2 if parameter.is_complex() else 1)
            found.append((Entry(name, start, start + size), parameter))
            start += size
    return found


def _real_dtype(parameter: torch.Tensor) -> torch.dtype:
    return parameter.dtype.to_real() if parameter.is_complex() else parameter.dtype


def real_flat(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor in a row: of a complex one real and imaginary parts in turn."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).flatten()


def shaped_like(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What `real_flat` made of a tensor like this one, as a view; it may have further dimensions in front."""
    front = flat.shape[:-1]
    if like.is_complex():
        return torch.view_as_complex(flat.view(*front, *like.shape, 2))
    return flat.view((*front, *like.shape))


class FlatParameters:
    """The trainable parameters of a network as one flat vector; they keep their names and shapes as views of it.

    Parameters
    ----------
    network
        Its trainable parameters, all float32 or all float64 on one device, become views; complex ones of that precision
        have real and imaginary parts in turn.

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
        trained = trained_parameters(network)
        if not trained:
            raise InvalidInput("network: it has no trainable parameter; give a network with requires_grad parameters")
        self.entries = tuple(entry for entry, _ in trained)
        self.parameters = tuple(parameter for _, parameter in trained)
        first = self.parameters[0]
        for entry, parameter in trained:
            if _real_dtype(parameter) not in ADMITTED_DTYPES:
                raise InvalidInput(
                    f"network: parameter {entry.name} has dtype {parameter.dtype}, which MPI cannot reduce; "
                    "convert the network with network.float() or network.double()"
                )
            if _real_dtype(parameter) != _real_dtype(first) or parameter.device != first.device:
                raise InvalidInput(
                    f"network: parameter {entry.name} is {parameter.dtype} on {parameter.device}, "
                    f"{self.entries[0].name} is {first.dtype} on {first.device}; convert the network to one dtype "
                    "and device"
                )
            if parameter.is_complex() and entry.start % 2:
                raise InvalidInput(
                    f"network: complex parameter {entry.name} comes after {entry.start} real numbers, so that "
                    "torch has no complex view of its place; put it before the parameters of odd size"
                )
        self.network = network
        self.values = torch.empty(self.entries[-1].stop, dtype=_real_dtype(first), device=first.device)
        self.gradients = torch.zeros_like(self.values)
        for entry, parameter in trained:
            view = shaped_like(self.values[entry.start : entry.stop], parameter)
            view.copy_(parameter.detach())
            # The same memory with a storage of its own: saving some of the parameters saves no others.
            parameter.data = torch.from_dlpack(view)
        self._gradient_views = tuple(
            shaped_like(self.gradients[entry.start : entry.stop], parameter)
            for entry, parameter in zip(self.entries, self.parameters, strict=True)
        )
        self._frozen: list[tuple[int, int]] = []
        self._frozen_parameters: list[torch.nn.Parameter] = []
        self.alias_gradients()

    def freeze(self, frozen: Sequence[bool]) -> None:
        """From now on leave these parameters where they are, see `still`; all others move."""
        chosen = list(itertools.compress(zip(self.entries, self.parameters, strict=True), frozen))
        self._frozen_parameters = [parameter for _, parameter in chosen]
        self._frozen = []
        for entry, _ in chosen:
            follows = self._frozen and self._frozen[-1][1] == entry.start
            start = self._frozen.pop()[0] if follows else entry.start
            self._frozen.append((start, entry.stop))

    def still(self, values: torch.Tensor, start: int = 0) -> torch.Tensor:
        """Take what would move frozen parameters out of a direction, in place.

        Parameters
        ----------
        values : Tensor
            Its elements from ``start`` on.
        start
            Place of its first element in the flat vector.
        """
        for first, last in self._frozen:
            # Minus zero added to any number leaves its bits, plus zero makes another one of minus zero.
            values[max(first - start, 0) : max(last - start, 0)] = -0.0
        return values

    def matrices(self) -> torch.Tensor:
        """A copy of the parameters with zeros in the place of those with less than two dimensions, shape (n,)."""
        found = self.values.clone()
        for entry, parameter in zip(self.entries, self.parameters, strict=True):
            if parameter.dim() < 2:
                found[entry.start : entry.stop] = 0.0
        return found

    @contextmanager
    def evaluated(self) -> Iterator[None]:
        """Let all parts of a solver differentiate by all parameters in the block, also by frozen ones."""
        for parameter in self._frozen_parameters:
            parameter.requires_grad_(True)
        try:
            yield
        except RuntimeError as error:
            if self.lost_gradients:
                raise InvalidInput(FREEZES) from error
            raise
        finally:
            for parameter in self._frozen_parameters:
                parameter.requires_grad_(False)

    @property
    def lost_gradients(self) -> bool:
        """Whether a parameter was frozen within `evaluated`, by the network itself."""
        return not all(parameter.requires_grad for parameter in self.parameters)

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
