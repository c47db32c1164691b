"""The state of all local solvers in a checkpoint, by subdomain and layer, whichever ranks carry them.

A vector of the subdomains is one array, the subdomains one after the other: without overlap it is a vector of all
parameters. A tensor of a layer has one row for each subdomain that carries the layer. Other subdomains than those
that were saved take what they need from the saved owners.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from apts_mpi.checkpoint.arrays import Array, Slab
from apts_mpi.local.solver import LayerState, LocalSolver, LocalState
from apts_mpi.network.partition import Layer, Subdomain, layers_between
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.state.tensors import Source, to_numpy

VECTORS, LAYERS = "solver/local/vectors/", "solver/local/layers/"


@dataclass(frozen=True)
class LocalSolvers:
    """The local solvers of a rank, with subdomains and layers as they are in the whole network.

    Attributes
    ----------
    name : str
        Of the kind of solver.
    solvers : dict of int to LocalSolver
        Those of the subdomains that this rank carries, by the numbers of these.
    subdomains
        All subdomains.
    layers
        The layers whose parameters this rank holds.
    comm
        All ranks.
    leads : bool
        Whether this rank speaks for those that carry the same subdomains.
    device
        Where tensors are.
    """

    name: str
    solvers: Mapping[int, LocalSolver]
    subdomains: Sequence[Subdomain]
    layers: Sequence[Layer]
    comm: Communicator
    leads: bool
    device: torch.device


def save_local_solvers(local: LocalSolvers) -> tuple[list[Array], list[dict[str, Any]]]:
    """Arrays of a checkpoint, and a record of each subdomain for its metadata. Collective."""
    states = {index: solver.state() for index, solver in local.solvers.items()} if local.leads else {}
    collected = local.comm.collect(
        [_describe(local.subdomains[index], state, local.layers) for index, state in states.items()]
    )
    records = sorted(itertools.chain.from_iterable(collected), key=lambda record: record["index"])
    return [*_vectors(states, records), *_layer_arrays(states, records)], records


def _describe(subdomain: Subdomain, state: LocalState, layers: Sequence[Layer]) -> dict[str, Any]:
    return asdict(subdomain) | {
        "numbers": state.numbers,
        "vectors": {name: to_numpy(vector).dtype.str for name, vector in state.vectors.items()},
        "layers": [
            {
                "name": layer.name,
                "kind": kept.kind,
                "tensors": [(tuple(tensor.shape), to_numpy(tensor).dtype.str) for tensor in kept.tensors],
            }
            for layer, kept in zip(layers_between(layers, subdomain.start, subdomain.stop), state.layers, strict=False)
        ],
    }


def _vectors(states: Mapping[int, LocalState], records: Sequence[dict[str, Any]]) -> Iterator[Array]:
    """A subdomain that lacks a vector which another one has contributes zeros."""
    starts = _first_rows(records)
    total = starts[-1]
    names = {name: dtype for record in records for name, dtype in record["vectors"].items()}
    for name, dtype in sorted(names.items()):
        slabs = []
        for index, state in states.items():
            missing = np.zeros(starts[index + 1] - starts[index], dtype)
            values = to_numpy(state.vectors[name]) if name in state.vectors else missing
            slabs.append(Slab(starts[index], values))
        yield Array(VECTORS + name, (total,), np.dtype(dtype), slabs)


def _first_rows(records: Sequence[dict[str, Any]]) -> list[int]:
    """Where each subdomain's part of a vector begins, and the end."""
    return [0, *itertools.accumulate(record["stop"] - record["start"] for record in records)]


def _layer_arrays(states: Mapping[int, LocalState], records: Sequence[dict[str, Any]]) -> Iterator[Array]:
    carriers: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}
    for record in records:
        for place, layer in enumerate(record["layers"]):
            carriers.setdefault(layer["name"], []).append((record["index"], place, layer))
    for name, carried in carriers.items():
        for number, (shape, dtype) in enumerate(carried[0][2]["tensors"]):
            slabs = [
                Slab(row, to_numpy(states[index].layers[place].tensors[number])[None])
                for row, (index, place, _) in enumerate(carried)
                if index in states
            ]
            yield Array(_place(name, number), (len(carried), *shape), np.dtype(dtype), slabs)


def _place(layer: str, number: int) -> str:
    """Name of the array of a layer's tensor; the network's own parameters belong to a layer without a name."""
    return f"{LAYERS}{layer or '(network)'}/{number}"


def load_local_solvers(local: LocalSolvers, source: Source, records: Sequence[dict[str, Any]]) -> list[str]:
    """Give the local solvers of this rank what `save_local_solvers` has saved; return what could not be given."""
    same = _extents(records) == _extents(map(asdict, local.subdomains))
    if not same and not all(solver.divisible for solver in local.solvers.values()):
        return [f"the state of local solver {local.name} is dropped: it belongs to the saved subdomains, others now"]
    for index, solver in local.solvers.items():
        reader = _Reader(source, records, local.device, index if same else None)
        solver.restore(reader.read(local.subdomains[index], local.layers))
    return []


def other_subdomains(
    options: APTSOptions, subdomains: Sequence[Subdomain], records: Sequence[dict[str, Any]]
) -> list[str]:
    """Say, in a list, that subdomains are others than the saved ones; where another number was asked for, nothing."""
    asked = options.subdomains is not None or options.schwarz.cuts is not None
    pairs = itertools.zip_longest(_extents(map(asdict, subdomains)), _extents(records))
    other = next((index for index, (now, saved) in enumerate(pairs) if now != saved), None)
    if other is None or (asked and len(subdomains) != len(records)):
        return []
    return [
        f"the subdomains are others than the saved ones, {len(subdomains)} for {len(records)}, from number {other} on: "
        "what follows is another run"
    ]


def _extents(records: Iterable[Mapping[str, Any]]) -> list[tuple[int, ...]]:
    return [tuple(record[name] for name in ("start", "stop", "owned_start", "owned_stop")) for record in records]


class _Reader:
    """Reads the state of a subdomain from saved ones: from its own, or (``index`` None) from the owners."""

    def __init__(
        self, source: Source, records: Sequence[dict[str, Any]], device: torch.device, index: int | None
    ) -> None:
        self._source = source
        self._records = records
        self._starts = _first_rows(records)
        self._device = device
        self._index = index

    def read(self, subdomain: Subdomain, layers: Sequence[Layer]) -> LocalState:
        record = self._owner(subdomain.owned_start) if self._index is None else self._records[self._index]
        own_layers = layers_between(layers, subdomain.start, subdomain.stop)
        return LocalState(
            numbers=record["numbers"],
            vectors={name: self._vector(name, subdomain) for name in record["vectors"]},
            layers=[state for layer in own_layers for state in self._layer(layer)],
        )

    def _owner(self, parameter: int) -> dict[str, Any]:
        return next(r for r in self._records if r["owned_start"] <= parameter < r["owned_stop"])

    def _vector(self, name: str, subdomain: Subdomain) -> torch.Tensor:
        if self._index is not None:
            start = self._starts[self._index]
            return self._tensor(VECTORS + name, start, subdomain.stop - subdomain.start)
        parts, at = [], subdomain.start
        while at < subdomain.stop:
            owner = self._owner(at)
            stop = min(owner["owned_stop"], subdomain.stop)
            row = self._starts[owner["index"]] + at - owner["start"]
            parts.append(self._tensor(VECTORS + name, row, stop - at))
            at = stop
        return torch.cat(parts)

    def _layer(self, layer: Layer) -> list[LayerState]:
        """The layer's state, in a list that is empty if nothing was saved."""
        carriers = [record for record in self._records if _kept(record, layer.name)]
        if not carriers:
            return []
        wanted = self._owner(layer.start)["index"] if self._index is None else self._index
        row = [record["index"] for record in carriers].index(wanted)
        kept = _kept(carriers[row], layer.name)
        assert kept is not None
        tensors = [self._tensor(_place(layer.name, number), row, 1)[0] for number in range(len(kept["tensors"]))]
        return [LayerState(kept["kind"], tensors)]

    def _tensor(self, name: str, first_row: int, rows: int) -> torch.Tensor:
        return torch.from_numpy(self._source.read(name, first_row, rows)).to(self._device)


def _kept(record: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return next((layer for layer in record["layers"] if layer["name"] == name), None)
