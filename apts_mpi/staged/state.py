"""Network and state of a staged solver in a checkpoint: the same arrays as of a replicated one, each rank its stage's.

So a checkpoint can be taken over by either layout, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from apts_mpi.checkpoint.arrays import Array, Slab
from apts_mpi.checkpoint.format import Checkpoint
from apts_mpi.local.solver import LocalSolver
from apts_mpi.network.partition import Layer, Subdomain
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.state.solver import SOLVER
from apts_mpi.state.tensors import to_numpy

# Where vectors of all parameters are.
VECTORS = f"{SOLVER}/"


@dataclass(frozen=True)
class Extent:
    """Where a stage lies in the whole network.

    Attributes
    ----------
    start, stop, size : int
        Range of its parameters in the flat vector of all, and the length of that.
    subdomains : tuple of Subdomain
        All subdomains, numbered in the whole network.
    first_subdomain : int
        Number of the stage's first one.
    """

    start: int
    stop: int
    size: int
    subdomains: tuple[Subdomain, ...]
    first_subdomain: int

    def layers(self, layers: Sequence[Layer]) -> list[Layer]:
        """The stage's layers as they are in the whole network."""
        return [replace(layer, start=layer.start + self.start, stop=layer.stop + self.start) for layer in layers]

    def solvers(self, solvers: Mapping[int, LocalSolver]) -> dict[int, LocalSolver]:
        """The stage's local solvers by the numbers of their subdomains in the whole network."""
        return {index + self.first_subdomain: solver for index, solver in solvers.items()}

    @staticmethod
    def of(subdomains: Sequence[Subdomain], size: int, first_segment: int, stages: Communicator) -> Extent:
        """From each stage's own subdomains, parameters and first segment. Collective over the stages."""
        found: list[Subdomain] = []
        starts, firsts = [0], [0]
        for own, count, segment in stages.collect((tuple(subdomains), size, first_segment)):
            found += [_moved(part, len(found) + place, starts[-1], segment) for place, part in enumerate(own)]
            starts.append(starts[-1] + count)
            firsts.append(len(found))
        stage = stages.rank
        return Extent(starts[stage], starts[stage + 1], starts[-1], tuple(found), firsts[stage])


def _moved(part: Subdomain, index: int, parameters: int, segments: int) -> Subdomain:
    return Subdomain(
        index,
        part.start + parameters,
        part.stop + parameters,
        part.owned_start + parameters,
        part.owned_stop + parameters,
        part.first_segment + segments,
        part.last_segment + segments,
    )


def make_arrays(
    tensors: Mapping[str, torch.Tensor],
    vectors: Mapping[str, torch.Tensor],
    extent: Extent,
    leads: bool,
    comm: Communicator,
) -> list[Array]:
    """`apts_mpi.state.solver.MakeArrays` of a stage. Collective.

    Parameters
    ----------
    tensors, vectors
        Those of the stage.
    extent
        Where it lies.
    leads
        Whether this rank speaks for its stage, as one of the replicas.
    comm
        All ranks.
    """
    parts = [_vector(name, to_numpy(tensor), extent, leads, comm.rank) for name, tensor in vectors.items()]
    return [*_tensors(tensors, leads, comm), *parts]


def _vector(name: str, values: np.ndarray, extent: Extent, leads: bool, rank: int) -> Array:
    """A vector of all parameters, of which each stage has its part, or one of no elements."""
    if len(values) == 0:
        return Array(name, (0,), values.dtype, [Slab(0, values)] if rank == 0 else [])
    return Array(name, (extent.size,), values.dtype, [Slab(extent.start, values)] if leads else [])


def _tensors(own: Mapping[str, torch.Tensor], leads: bool, comm: Communicator) -> list[Array]:
    """The tensors of all stages; those without rows are rank 0's."""
    arrays = {name: to_numpy(tensor) for name, tensor in own.items()}
    told = [
        (name, values.shape, values.dtype, values if values.ndim == 0 or values.size == 0 else None)
        for name, values in arrays.items()
        if leads
    ]
    found = []
    for rank, of_rank in enumerate(comm.collect(told)):
        for name, shape, dtype, content in of_rank:
            holder = rank if content is None else 0
            values = arrays[name] if content is None and rank == comm.rank else content
            found.append(Array(name, shape, dtype, [Slab(0, values)] if holder == comm.rank else []))
    return found


class StagePart:
    """A checkpoint without the tensors of other stages, with the stage's part of vectors of all parameters.

    Parameters
    ----------
    checkpoint
        Of any layout.
    extent
        Where the stage lies.
    others
        Names of the tensors of other stages.
    """

    def __init__(self, checkpoint: Checkpoint, extent: Extent, others: Collection[str]) -> None:
        self.path = checkpoint.path
        self.names = tuple(name for name in checkpoint.names if name not in others)
        self._checkpoint = checkpoint
        self._extent = extent

    def shape(self, name: str) -> tuple[int, ...]:
        """See `apts_mpi.state.tensors.Source`."""
        return self._checkpoint.shape(name)

    def dtype(self, name: str) -> np.dtype:
        """See `apts_mpi.state.tensors.Source`."""
        return self._checkpoint.dtype(name)

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> np.ndarray:
        """See `apts_mpi.state.tensors.Source`."""
        extent = self._extent
        if rows is None and name.startswith(VECTORS) and self.shape(name) == (extent.size,):
            first_row, rows = extent.start, extent.stop - extent.start
        return self._checkpoint.read(name, first_row, rows)
