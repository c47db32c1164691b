"""The tensors of a network and of solvers as named arrays of a checkpoint, and back.

Parameters are ``parameters/NAME`` and buffers ``buffers/NAME`` with the names of ``network.state_dict()``, so that a
checkpoint without a solver is a ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from apts_mpi.checkpoint.arrays import Array, split_evenly
from apts_mpi.checkpoint.values import check_finite
from apts_mpi.errors import InvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.schema import Check, allow, record, text

PARAMETERS, BUFFERS = "parameters/", "buffers/"


class Source(Protocol):
    """Where saved arrays are read from: a checkpoint, or the part of it that a rank needs."""

    @property
    def path(self) -> Path:
        """Of the file, for messages."""

    @property
    def names(self) -> Sequence[str]:
        """Of the arrays."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array."""

    def dtype(self, name: str) -> np.dtype:
        """Of its elements."""

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> np.ndarray:
        """Some of its rows, or all."""


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The values of a tensor in host memory; a view where they are there already."""
    return tensor.detach().cpu().contiguous().numpy()


def replicated_arrays(tensors: Mapping[str, torch.Tensor], comm: Communicator) -> list[Array]:
    """Arrays of tensors that all ranks have; each rank contributes an even share."""
    return split_evenly({name: to_numpy(tensor) for name, tensor in tensors.items()}, comm)


def named_tensors(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a network by their names in a checkpoint.

    As in a ``state_dict``, a tensor with two names comes twice, and buffers that are not persistent do not come.
    """
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return {
        (PARAMETERS if name in parameters else BUFFERS) + name: tensor
        for name, tensor in network.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
    }


def check_network(network: torch.nn.Module, source: Source) -> None:
    """See that the parameters and buffers of a checkpoint are those of a network, before anything of it changes.

    Raises
    ------
    InvalidInput
        If they are not, naming the first difference; or for parameters with nan or inf, naming the first place.
    """
    own = named_tensors(network)
    saved = [name for name in source.names if name.startswith((PARAMETERS, BUFFERS))]
    remedy = "; give the checkpoint of the same network, or the options with which it was made"
    for name in [*own, *saved]:
        place = f"{source.path}: {name}"
        if name not in own:
            raise InvalidInput(f"{place} is not in the network{remedy}")
        if name not in saved:
            raise InvalidInput(f"{place} of the network is missing{remedy}")
        for what, there, here in (
            ("shape", source.shape(name), tuple(own[name].shape)),
            ("type", source.dtype(name), to_numpy(own[name]).dtype),
        ):
            if there != here:
                raise InvalidInput(f"{place} has {what} {there}, in the network it has {here}{remedy}")
    for name in own:
        if name.startswith(PARAMETERS):
            check_finite(source.path, name, source.read(name))


@torch.no_grad()
def load_network(network: torch.nn.Module, source: Source) -> None:
    """Put the parameters and buffers of a checkpoint into a network; see `check_network`."""
    for name, tensor in named_tensors(network).items():
        # Not in place through the tensor itself: a solver takes that for a change by the user.
        tensor.data.copy_(torch.from_numpy(source.read(name)))


def take_tensors(tree: Any, name: str, found: dict[str, torch.Tensor]) -> Any:
    """A copy of nested dictionaries and lists with names in the place of their tensors, which go into ``found``."""
    if isinstance(tree, torch.Tensor):
        found[name] = tree
        return {"array": name}
    if isinstance(tree, Mapping):
        return {str(key): take_tensors(value, f"{name}/{key}", found) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [take_tensors(value, f"{name}/{index}", found) for index, value in enumerate(tree)]
    return tree


def put_tensors(tree: Any, read: Callable[[str], torch.Tensor]) -> Any:
    """The inverse of `take_tensors`; tuples are lists."""
    if isinstance(tree, Mapping):
        if set(tree) == {"array"}:
            return read(tree["array"])
        return {key: put_tensors(value, read) for key, value in tree.items()}
    if isinstance(tree, list):
        return [put_tensors(value, read) for value in tree]
    return tree


def reader(source: Source, device: torch.device) -> Callable[[str], torch.Tensor]:
    """Function that reads a whole array as a tensor on ``device``."""
    return lambda name: torch.from_numpy(source.read(text(name, f"{source.path}: array"))).to(device)


def array(source: Source, *shapes: tuple[int, ...], dtype: np.dtype | None = None) -> Check:
    """A check of what `take_tensors` leaves in the place of a tensor: an array of one of these shapes, of a type.

    Parameters
    ----------
    source
        Where the array is to be.
    shapes
        Those that it may have; any, if there is none.
    dtype
        None is any.
    """
    wanted = f"of shape {' or '.join(map(str, shapes))}" if shapes else "an array"

    def check(value: Any, place: str) -> Any:
        name = record({"array": text})(value, place)["array"]
        allow(name in source.names, place, name, "the name of an array in the file")
        found = (source.shape(name), source.dtype(name))
        # Not `in`: numpy takes None for float64 where types are compared.
        fits = (not shapes or found[0] in shapes) and (dtype is None or dtype == found[1])
        allow(fits, f"{place} {name}", found, wanted + ("" if dtype is None else f" and type {dtype}"))
        return value

    return check
