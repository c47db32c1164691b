"""Samples and outputs as trees: tensors in tuples, lists, mappings and dataclasses, nested as one likes.

Those of ``torch.utils._pytree``, and with them dataclasses and mappings that nobody has registered there.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from apts_mpi.errors import InvalidInput

# A tensor, or one of the containers above with trees in it.
Tree = Any

# Inputs and targets of some samples, on one device.
Data = tuple[Tree, Tree]


class Unread(ABC):
    """Samples, of one tensor or of a tree of them, that are read when some of them are taken."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, rows: slice | torch.Tensor) -> Tree:
        """Some of them, read."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where what is read comes to."""

    @property
    @abstractmethod
    def example(self) -> Tree:
        """The first sample, shape (1, ...)."""


ALLOWED = "give tensors or arrays of numbers, samples first, in tuples, lists, mappings or dataclasses"


def map_leaves(function: Callable[[Any], Any], tree: Tree) -> Tree:
    """The tree with ``function`` of each leaf in its place."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    return tree_map(lambda leaf: _map_inside(function, leaf), tree)


def _map_inside(function: Callable[[Any], Any], leaf: Any) -> Any:
    """The same for what torch takes for a leaf."""
    inside = _parts(leaf)
    if inside is None:
        return function(leaf)
    parts = {key: map_leaves(function, part) for key, part in inside.items()}
    if isinstance(leaf, Mapping) and not isinstance(leaf, MutableMapping):
        return parts
    made = copy.copy(leaf)
    for key, part in parts.items():
        if isinstance(leaf, Mapping):
            made[key] = part
        else:
            object.__setattr__(made, key, part)  # it may be frozen
    return made


def _parts(leaf: Any) -> dict[Any, Any] | None:
    """What is in a container that torch does not know; None for a leaf."""
    if isinstance(leaf, Mapping):
        return dict(leaf)
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        return {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf)}
    return None


def named_leaves(tree: Tree, name: str) -> dict[str, Any]:
    """Its leaves by their paths, such as ``inputs['image'][0]`` of the tree ``inputs``."""
    found: dict[str, Any] = {}
    for path, leaf in tree_flatten_with_path(tree)[0]:
        place, inside = name + keystr(path), _parts(leaf)
        if inside is None:
            found[place] = leaf
        else:
            for key, part in inside.items():
                found |= named_leaves(part, f"{place}[{key!r}]" if isinstance(leaf, Mapping) else f"{place}.{key}")
    return found


def map_tensors(function: Callable[[torch.Tensor], torch.Tensor], tree: Tree) -> Tree:
    """The tree with ``function`` of each tensor in its place; other leaves stay."""
    return map_leaves(lambda leaf: function(leaf) if isinstance(leaf, torch.Tensor) else leaf, tree)


def tensors_of(tree: Tree) -> tuple[torch.Tensor, ...]:
    """Its tensors, in the order in which `map_tensors` meets them."""
    if isinstance(tree, torch.Tensor):
        return (tree,)
    found: list[torch.Tensor] = []
    map_leaves(lambda leaf: found.append(leaf) if isinstance(leaf, torch.Tensor) else None, tree)
    return tuple(found)


def count_samples(tree: Tree) -> int:
    """Number of samples, in a tree of which `as_samples` has seen that it has one."""
    return len(tree if isinstance(tree, Unread) else tensors_of(tree)[0])


def first_sample(tree: Tree) -> Tree:
    """The first of the samples, shape (1, ...)."""
    return tree.example if isinstance(tree, Unread) else take(tree, slice(1))


def numbers_of_sample(tree: Tree) -> int:
    """How many numbers a sample has, in all tensors together."""
    return sum(tensor.numel() for tensor in tensors_of(first_sample(tree)))


def device_of(tree: Tree) -> torch.device:
    """Where the samples are."""
    return tree.device if isinstance(tree, Unread) else tensors_of(tree)[0].device


def take(tree: Tree, rows: slice | torch.Tensor) -> Tree:
    """Some of the samples: views for a slice, copies for their numbers; what has to be read is read here."""
    if isinstance(tree, Unread):
        return tree[rows]

    def of_tensor(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows if isinstance(rows, slice) else rows.to(tensor.device)]

    return map_tensors(of_tensor, tree)


def joined(trees: Sequence[Tree]) -> Tree:
    """One tree with the samples of several of the same form, one behind the other."""
    made = iter([torch.cat(parts) for parts in zip(*map(tensors_of, trees), strict=True)])
    return map_tensors(lambda _: next(made), trees[0])


def as_samples(tree: Tree, name: str) -> Tree:
    """The tree with arrays as tensors, which share their memory where torch can.

    Parameters
    ----------
    tree
        Tensors and numpy arrays, with the samples in the first dimension; or what is to be read.
    name
        What it is called in messages.

    Raises
    ------
    InvalidInput
        Naming a leaf that is something else, or leaves that differ in their number of samples.
    """
    if isinstance(tree, Unread) or (isinstance(tree, torch.Tensor) and tree.dim()):
        return tree
    leaves = named_leaves(tree, name)
    if not leaves:
        raise InvalidInput(f"{name}: there is no tensor in this {type(tree).__name__}; {ALLOWED}")
    made = iter([_as_tensor(leaf, place) for place, leaf in leaves.items()])
    tree = map_leaves(lambda _: next(made), tree)
    counts = {place: len(tensor) for place, tensor in zip(leaves, tensors_of(tree), strict=True)}
    first, *others = counts
    for place in others:
        if counts[place] != counts[first]:
            raise InvalidInput(
                f"{place}: there are {counts[place]} samples, but {counts[first]} in {first}; give as many of each, in "
                "the first dimension"
            )
    return tree


def _as_tensor(leaf: Any, place: str) -> torch.Tensor:
    """A leaf as a tensor with samples."""
    tensor = leaf
    if isinstance(leaf, np.ndarray):
        try:
            tensor = _of_array(leaf)
        except TypeError as error:
            raise InvalidInput(f"{place}: an array of {leaf.dtype} is not allowed; {ALLOWED}") from error
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInput(f"{place}: {type(leaf).__name__} {leaf!r:.60} is not allowed; {ALLOWED}")
    if tensor.dim() == 0:
        raise InvalidInput(f"{place}: a single number, shape (), has no samples; {ALLOWED}")
    return tensor


def _of_array(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        # Of arrays that may not be written to, such as mapped files: nothing here writes to samples.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        native = np.asarray(array, dtype=array.dtype.newbyteorder("="))
        try:
            return torch.from_numpy(native)
        except ValueError:  # of strides that torch has not, such as those of array[::-1]
            return torch.from_numpy(np.ascontiguousarray(native))
