"""What all sources of samples can do, and the source of arrays that may lie in files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from apts_mpi.errors import InvalidInput

# Inputs and targets of some samples, on the CPU.
Pair = tuple[Any, Any]


class Epoch(NamedTuple):
    """An epoch of a run; what is drawn at random for a sample depends on it. Number 0 is for what is no training."""

    seed: int
    number: int


# Some samples, by their numbers, in an epoch.
Request = tuple[torch.Tensor, Epoch]


class Position(NamedTuple):
    """Where the reading of a shard was, with what its data set says of that.

    Attributes
    ----------
    shard, seed, epoch, read : int
        Which shard, in which epoch, and how many of its samples were read.
    state : object
        The data set's ``state_dict()``, of what JSON has.
    """

    shard: int
    seed: int
    epoch: int
    read: int
    state: Any


class Source(Protocol):
    """Samples with numbers, of which some are read at a time.

    Attributes
    ----------
    varies : bool
        Whether a sample may be another one in another epoch.
    parts : int or None
        How many parts can be read each by itself; None: every sample can.
    """

    varies: bool
    parts: int | None

    @property
    def positions(self) -> Sequence[Position]:
        """Where the reading is, of data sets that say so: it can go on from there in another process."""

    def __len__(self) -> int:
        """Number of samples."""

    def take(self, rows: torch.Tensor, epoch: Epoch) -> Pair:
        """Read the samples with these numbers, in this order.

        Parameters
        ----------
        rows : Tensor of int64, shape (samples,)
        epoch : Epoch
            What a data set draws at random for a sample depends on it.

        Raises
        ------
        InvalidInput
            For a sample that cannot be read, with its number.
        """

    def ahead(self, requests: Sequence[Request]) -> Iterator[Pair] | None:
        """Read what will be asked for in other processes meanwhile; None where the source has none."""

    def go_on(self, positions: Sequence[Position]) -> None:
        """Know positions that were saved, to read on from them rather than from the beginning."""


class Rows(Protocol):
    """An array whose first dimension counts the samples."""

    @property
    def shape(self) -> tuple[int, ...]:
        """All dimensions."""

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers."""

    def read(self, rows: np.ndarray) -> np.ndarray:
        """A copy of these rows, in this order."""


class MemoryRows:
    """Rows of an array of numpy's, which may be a map of a file."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape, self.dtype = array.shape, array.dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        """See `Rows`."""
        return np.asarray(self._array[rows])


class Arrays:
    """Inputs and targets in two arrays, of which nothing but what is asked for is read.

    Raises
    ------
    InvalidInput
        For arrays that hold no numbers, or not one target for each input.
    """

    varies = False
    parts: int | None = None
    positions: Sequence[Position] = ()

    def __init__(self, inputs: Rows, targets: Rows, names: tuple[str, str] = ("inputs", "targets")) -> None:
        for name, array in zip(names, (inputs, targets), strict=True):
            check_numbers(name, array.shape, array.dtype)
        if inputs.shape[0] != targets.shape[0]:
            raise InvalidInput(
                f"{names[0]}: {inputs.shape[0]} samples, but {targets.shape[0]} in {names[1]}; give one target for "
                "each input"
            )
        self._arrays = inputs, targets

    def __len__(self) -> int:
        return int(self._arrays[0].shape[0])

    def take(self, rows: torch.Tensor, epoch: Epoch) -> Pair:
        """See `Source`."""
        inputs, targets = (as_tensor(array.read(rows.numpy())) for array in self._arrays)
        return inputs, targets

    def ahead(self, requests: Sequence[Request]) -> None:
        """See `Source`: there are no other processes."""

    def go_on(self, positions: Sequence[Position]) -> None:
        """See `Source`: there are none."""


def check_numbers(name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise `InvalidInput` unless an array holds numbers of at least one sample."""
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise InvalidInput(f"{name}: numbers of type {dtype} are not allowed; give integers or floats of up to 64 bits")
    if not shape or shape[0] == 0:
        raise InvalidInput(f"{name}: shape {tuple(shape)} has no samples; give at least one along the first dimension")


def as_tensor(array: np.ndarray) -> torch.Tensor:
    """The same numbers as a tensor; integers have 64 bits, but for bytes."""
    if (array.dtype.kind in "iu" and array.dtype.itemsize > 1) or array.dtype == np.int8:
        array = array.astype(np.int64)
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    # Neither read-only nor with negative strides: torch has no such tensors.
    usable = native.flags.writeable and native.flags.c_contiguous
    return torch.from_numpy(native if usable else np.array(native, order="C"))
