"""Global arrays and the parts of them that a rank has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from apts_mpi.parallel.communicator import Communicator


@dataclass(frozen=True)
class Slab:
    """Consecutive rows of an array.

    Attributes
    ----------
    first_row : int
        Their place along the first dimension.
    values : ndarray, shape (rows, ...)
        The rows; shape () for an array of shape ().
    """

    first_row: int
    values: np.ndarray

    @property
    def rows(self) -> int:
        """How many; a scalar counts as one row."""
        return len(self.values) if self.values.ndim else 1


@dataclass(frozen=True)
class Array:
    """A global array and what this rank contributes to it.

    Attributes
    ----------
    name : str
        Path in the file, such as ``parameters/0.weight``.
    shape : tuple of int
        Global shape.
    dtype : dtype
        Of numbers or truth values.
    slabs : sequence of Slab
        This rank's. Those of all ranks together cover each row once; an array of shape () is rank 0's.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    slabs: Sequence[Slab]


def split_evenly(arrays: Mapping[str, np.ndarray], comm: Communicator) -> list[Array]:
    """Share arrays which all ranks have whole, so that each rank contributes about as many elements.

    The elements of all arrays in a row are cut at even places, rounded to rows.
    """
    total = sum(values.size for values in arrays.values())
    cuts = [total * rank // comm.size for rank in (comm.rank, comm.rank + 1)]
    shared, start = [], 0
    for name, values in arrays.items():
        if values.ndim == 0 or values.size == 0:
            slabs = [Slab(0, values)] if comm.rank == 0 else []
        else:
            row = values.size // len(values)
            first, last = (min(max(round((cut - start) / row), 0), len(values)) for cut in cuts)
            slabs = [Slab(first, values[first:last])]
        shared.append(Array(name, values.shape, values.dtype, slabs))
        start += values.size
    return shared
