"""Network and state of a staged solver in a checkpoint: the same arrays as of a replicated one, each rank its stage's.

So a checkpoint can be taken over by either layout, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from apts_mpi.checkpoint import Array, Checkpoint, Slab
from apts_mpi.local.gradient import LocalSolver
from apts_mpi.network.partition import Layer, Subdomain
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.additive import AdditiveSchwarz
from apts_mpi.state.local_solvers import save_local_solvers
from apts_mpi.state.solver import Part, load_solver
from apts_mpi.state.tensors import named_tensors, take_tensors, to_numpy

# Where vectors of all parameters are.
SOLVER = "solver/"


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


class _Whole:
    """A stage's Schwarz level with its subdomains and layers as they are in the whole network."""

    def __init__(self, schwarz: AdditiveSchwarz, extent: Extent, comm: Communicator) -> None:
        self.comm = comm
        self.leads = schwarz.leads
        self.correction, self.assembled = schwarz.correction, schwarz.assembled
        self.local_solver = schwarz.local_solver
        self.subdomains = extent.subdomains
        self.solvers: dict[int, LocalSolver] = {
            index + extent.first_subdomain: solver for index, solver in schwarz.solvers.items()
        }
        self.layers: list[Layer] = [
            replace(layer, start=layer.start + extent.start, stop=layer.stop + extent.start) for layer in schwarz.layers
        ]


def save_staged(
    network: torch.nn.Module,
    parts: Mapping[str, Part | None],
    correction: torch.Tensor | None,
    schwarz: AdditiveSchwarz,
    extent: Extent,
    comm: Communicator,
) -> tuple[list[Array], dict[str, Any]]:
    """`apts_mpi.state.solver.save_solver` for stages. Collective."""
    tensors: dict[str, torch.Tensor] = {}
    states = {name: None if part is None else part.state() for name, part in parts.items()}
    metadata = take_tensors(states | {"correction": correction}, SOLVER.rstrip("/"), tensors)
    solvers, metadata["subdomains"] = save_local_solvers(cast(AdditiveSchwarz, _Whole(schwarz, extent, comm)))
    metadata["local_solver"] = schwarz.local_solver
    vectors = [_vector(name, to_numpy(tensor), extent, schwarz.leads, comm.rank) for name, tensor in tensors.items()]
    return [*_tensors(named_tensors(network), schwarz.leads, comm), *vectors, *solvers], metadata


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


def load_staged(
    network: torch.nn.Module,
    parts: Mapping[str, Part | None],
    schwarz: AdditiveSchwarz,
    checkpoint: Checkpoint,
    metadata: dict[str, Any],
    extent: Extent,
    names: Collection[str],
) -> tuple[torch.Tensor | None, list[str]]:
    """`apts_mpi.state.solver.load_solver` for stages; ``names`` are those of the tensors of all stages."""
    own = _StagePart(checkpoint, extent, set(names) - set(named_tensors(network)))
    whole = cast(AdditiveSchwarz, _Whole(schwarz, extent, schwarz.comm))
    return load_solver(network, parts, whole, cast(Checkpoint, own), metadata)


class _StagePart:
    """A checkpoint without the tensors of other stages, with the stage's part of vectors of all parameters."""

    def __init__(self, checkpoint: Checkpoint, extent: Extent, others: Collection[str]) -> None:
        self.path, self.shape, self.dtype = checkpoint.path, checkpoint.shape, checkpoint.dtype
        self.names = tuple(name for name in checkpoint.names if name not in others)
        self._checkpoint = checkpoint
        self._extent = extent

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> np.ndarray:
        extent = self._extent
        if rows is None and name.startswith(SOLVER) and self.shape(name) == (extent.size,):
            first_row, rows = extent.start, extent.stop - extent.start
        return self._checkpoint.read(name, first_row, rows)
