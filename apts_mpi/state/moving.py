"""The state of local solvers from subdomains to others, in memory: what a checkpoint does, without a file."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apts_mpi.checkpoint.arrays import Array, Slab
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.partition import layers_between
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.state.local_solvers import LocalSolvers, load_local_solvers, place_of_layer, save_local_solvers


class Moving:
    """What local solvers know, on its way to those of other subdomains.

    Made while the old ones are there. Collective, as `give` is not.

    Parameters
    ----------
    old
        The local solvers of this rank.
    stay
        Names of layers whose owner carries them in the new subdomains as well, alone: their state is not sent.
    """

    def __init__(self, old: LocalSolvers, stay: Collection[str]) -> None:
        arrays, self._records = save_local_solvers(old)
        kept = {place_of_layer(name) for name in stay}
        self._source = _InMemory(arrays, kept, old.comm)

    def give(self, new: LocalSolvers) -> None:
        """Give the local solvers of this rank, of the new subdomains, what those of the old ones knew."""
        load_local_solvers(new, self._source, self._records)


def staying(old: LocalSolvers, new: Decomposition) -> set[str]:
    """Layers that in the new subdomains the same single rank carries, alone, that owned them in the old ones."""
    teams = new.teams
    if teams.count < teams.ranks:
        return set()
    owners = list(itertools.chain.from_iterable([team] * len(teams.subdomains_of(team)) for team in range(teams.count)))
    found = set()
    for layer in old.layers:
        before = {owners[part.index] for part in old.subdomains if part.owned_start <= layer.start < part.owned_stop}
        after = {owners[part.index] for part in new.subdomains if layers_between([layer], part.start, part.stop)}
        if before == after:
            found.add(layer.name)
    return found


class _InMemory:
    """Arrays of which this rank has its own parts, and those that others sent; see `apts_mpi.state.tensors.Source`.

    Parameters
    ----------
    arrays
        Of all ranks, with the parts of this one.
    kept
        Folders of arrays that are not sent.
    comm
        All ranks.
    """

    path = Path("memory")

    def __init__(self, arrays: Sequence[Array], kept: Collection[str], comm: Communicator) -> None:
        self._arrays = {array.name: array for array in arrays}
        self._slabs: dict[str, list[Slab]] = {array.name: list(array.slabs) for array in arrays}
        sent = [
            (array.name, slab) for array in arrays if array.name.rpartition("/")[0] not in kept for slab in array.slabs
        ]
        for rank, of_rank in enumerate(comm.collect(sent)):
            for name, slab in of_rank if rank != comm.rank else ():
                self._slabs[name].append(slab)

    @property
    def names(self) -> Sequence[str]:
        """Of the arrays."""
        return list(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array."""
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Of its elements."""
        return self._arrays[name].dtype

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> np.ndarray:
        """Some of its rows, or all; a copy."""
        shape = self.shape(name)
        last_row = shape[0] if rows is None else first_row + rows
        found: np.ndarray[Any, Any] = np.empty((last_row - first_row, *shape[1:]), self.dtype(name))
        for slab in self._slabs[name]:
            start, stop = max(slab.first_row, first_row), min(slab.first_row + slab.rows, last_row)
            if start < stop:
                values = slab.values[start - slab.first_row : stop - slab.first_row]
                found[start - first_row : stop - first_row] = values
        return found
