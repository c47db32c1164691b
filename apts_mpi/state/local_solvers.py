"""The state of all local solvers in a checkpoint, by subdomain and layer, whichever ranks carry them.

A vector of the subdomains is one array, the subdomains one after the other: without overlap it is a vector of all
parameters. A tensor of a layer has one row for each subdomain that carries the layer. Other subdomains than those
that were saved take what they need from the saved owners.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from apts_mpi.checkpoint.arrays import Array, Slab
from apts_mpi.errors import InvalidInput, shown
from apts_mpi.local.solver import LayerState, LocalSolver, LocalState, SavedState, SavedTensor
from apts_mpi.network.partition import Layer, Subdomain, layers_between
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.state.tensors import Source, array, to_numpy
from apts_mpi.tools import schema
from apts_mpi.tools.schema import Check, allow, mapping, sequence, text, whole

VECTORS, LAYERS = "solver/local/vectors/", "solver/local/layers/"


@dataclass(frozen=True)
class LocalSolvers:
    """The local solvers of a rank, with subdomains and layers as they are in the whole network.

    Attributes
    ----------
    name : str
        Of the kind of solver.
    solvers : dict of int to LocalSolver
        Those that this rank keeps, by the numbers of their subdomains.
    carried : collection of int
        Subdomains that this rank carries, whose solvers it saves.
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
    carried: Collection[int]
    subdomains: Sequence[Subdomain]
    layers: Sequence[Layer]
    comm: Communicator
    leads: bool
    device: torch.device

    @property
    def size(self) -> int:
        """Parameters of the whole network."""
        return max(part.stop for part in self.subdomains)


def save_local_solvers(local: LocalSolvers) -> tuple[list[Array], list[dict[str, Any]]]:
    """Arrays of a checkpoint, and a record of each subdomain for its metadata. Collective."""
    states = {index: local.solvers[index].state() for index in local.carried} if local.leads else {}
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
            yield Array(f"{place_of_layer(name)}/{number}", (len(carried), *shape), np.dtype(dtype), slabs)


def place_of_layer(layer: str) -> str:
    """Folder of the arrays of a layer's tensors; the network's own parameters belong to a layer without a name."""
    return f"{LAYERS}{layer or '(network)'}"


def check_local_solvers(local: LocalSolvers, source: Source, metadata: Mapping[str, Any], place: str) -> None:
    """See that metadata and arrays are what `save_local_solvers` makes for such a network.

    Parameters
    ----------
    local
        Those that are to take it over.
    source
        Where the arrays are.
    metadata
        With ``subdomains``, the records, and ``local_solver``.
    place
        Of the records, for messages.

    Raises
    ------
    InvalidInput
        Naming the first difference.
    """
    records = [_record(local.size)(record, f"{place}[{index}]") for index, record in enumerate(metadata["subdomains"])]
    _check_cover(records, local.size, place)
    _check_arrays(source, records, place)
    if metadata["local_solver"] != local.name or not _can_be_given(local, records):
        return
    for solver in list(local.solvers.values())[:1]:
        # What other ranks are to take over, too, so that none goes on where another cannot; layers are theirs to check.
        for found in records:
            vectors = {
                name: SavedTensor((found["stop"] - found["start"],), found["vectors"][name])
                for name in found["vectors"]
            }
            solver.check_saved(SavedState(f"{place}[{found['index']}]", found["numbers"], vectors, []))
    for index, solver in local.solvers.items():
        reader = _Reader(source, records, local.device, index if _are_same(local, records) else None)
        solver.check_saved(reader.describe(local.subdomains[index], local.layers, place))


def _record(size: int) -> Check:
    """A check of the record of a subdomain of a network with ``size`` parameters."""
    tensors = sequence(_shape_and_dtype)
    places = dict.fromkeys(("start", "stop", "owned_start", "owned_stop"), whole(0, size))
    others = dict.fromkeys(("index", "first_segment", "last_segment"), whole())
    layers = sequence(schema.record({"name": text, "kind": text, "tensors": tensors}))
    return schema.record(places | others | {"numbers": mapping(), "vectors": mapping(text), "layers": layers})


def _shape_and_dtype(value: Any, place: str) -> SavedTensor:
    allow(isinstance(value, list) and len(value) == 2, place, value, "a shape and a type")
    return SavedTensor(tuple(sequence(whole())(value[0], place)), text(value[1], place))


def _check_cover(records: Sequence[dict[str, Any]], size: int, place: str) -> None:
    """See that each parameter has an owner, and that each subdomain has what it owns."""
    covered = 0
    for number, found in enumerate(records):
        allow(found["index"] == number, f"{place}[{number}].index", found["index"], f"{number}")
        inside = found["start"] <= found["owned_start"] < found["owned_stop"] <= found["stop"]
        allow(inside, f"{place}[{number}]", _extent(found), "start, owned start, owned stop and stop in this order")
        if found["owned_start"] <= covered:
            covered = max(covered, found["owned_stop"])
    allow(covered == size, place, covered, f"subdomains of all {size} parameters, in their order")


def _check_arrays(source: Source, records: Sequence[dict[str, Any]], place: str) -> None:
    """See that the arrays are there of which the records speak."""
    total = _first_rows(records)[-1]
    for found in records:
        for name, dtype in found["vectors"].items():
            _check_array(source, VECTORS + name, SavedTensor((total,), dtype), place)
    carriers: dict[str, list[Sequence[SavedTensor]]] = {}
    for found in records:
        for layer in found["layers"]:
            carriers.setdefault(layer["name"], []).append(layer["tensors"])
    for name, tensors in carriers.items():
        alike = all(others == tensors[0] for others in tensors)
        allow(alike, f"{place}: layers", name, "a layer with the same tensors in all subdomains")
        for number, tensor in enumerate(tensors[0]):
            expected = SavedTensor((len(tensors), *tensor.shape), tensor.dtype)
            _check_array(source, f"{place_of_layer(name)}/{number}", expected, place)


def _check_array(source: Source, name: str, expected: SavedTensor, place: str) -> None:
    array(source, expected.shape)({"array": name}, f"{place}: arrays")
    allow(source.dtype(name).str == expected.dtype, f"{place}: {name}", source.dtype(name).str, shown(expected.dtype))


def load_local_solvers(local: LocalSolvers, source: Source, records: Sequence[dict[str, Any]]) -> list[str]:
    """Give the local solvers of this rank what `save_local_solvers` has saved; return what could not be given."""
    if not _can_be_given(local, records):
        return [f"the state of local solver {local.name} is dropped: it belongs to the saved subdomains, others now"]
    for index, solver in local.solvers.items():
        reader = _Reader(source, records, local.device, index if _are_same(local, records) else None)
        solver.restore(reader.read(local.subdomains[index], local.layers))
    return []


def other_subdomains(
    options: APTSOptions, subdomains: Sequence[Subdomain], records: Sequence[dict[str, Any]]
) -> list[str]:
    """Say, in a list, that subdomains are others than the saved ones; where another number was asked for, nothing."""
    asked = options.subdomains is not None or options.schwarz.cuts is not None
    pairs = itertools.zip_longest(
        [_extent(asdict(part)) for part in subdomains], [_extent(record) for record in records]
    )
    first = next((index for index, (one, other) in enumerate(pairs) if one != other), None)
    if first is None or (asked and len(subdomains) != len(records)):
        return []
    return [
        f"the subdomains are others than the saved ones, {len(subdomains)} for {len(records)}, from number {first} on: "
        "what follows is another run"
    ]


def _are_same(local: LocalSolvers, records: Sequence[dict[str, Any]]) -> bool:
    """Whether the saved subdomains are those that there are now."""
    return [_extent(record) for record in records] == [_extent(asdict(part)) for part in local.subdomains]


def _can_be_given(local: LocalSolvers, records: Sequence[dict[str, Any]]) -> bool:
    """Whether the subdomains that there are now can have the state of the saved ones."""
    return _are_same(local, records) or all(solver.divisible for solver in local.solvers.values())


def _extent(record: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(record[name] for name in ("start", "stop", "owned_start", "owned_stop"))


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

    def describe(self, subdomain: Subdomain, layers: Sequence[Layer], place: str) -> SavedState:
        """What `read` would read, unread."""
        own = self._owner(subdomain.owned_start) if self._index is None else self._records[self._index]
        kept = [self._kept(layer) for layer in layers_between(layers, subdomain.start, subdomain.stop)]
        return SavedState(
            f"{place}[{own['index']}]",
            own["numbers"],
            {name: SavedTensor((subdomain.stop - subdomain.start,), dtype) for name, dtype in own["vectors"].items()},
            [(found[1]["kind"], found[1]["tensors"]) for found in kept if found is not None],
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
        found = self._kept(layer)
        if found is None:
            return []
        row, kept = found
        place, count = place_of_layer(layer.name), len(kept["tensors"])
        tensors = [self._tensor(f"{place}/{number}", row, 1)[0] for number in range(count)]
        return [LayerState(kept["kind"], tensors)]

    def _kept(self, layer: Layer) -> tuple[int, dict[str, Any]] | None:
        """The row of the layer's state among those that carry it, and what is said of it; None if nothing was saved."""
        carriers = [record for record in self._records if _kept(record, layer.name)]
        if not carriers:
            return None
        wanted = self._owner(layer.start)["index"] if self._index is None else self._index
        rows = [record["index"] for record in carriers]
        if wanted not in rows:
            raise InvalidInput(f"{self._source.path}: solver.subdomains[{wanted}].layers lacks layer {layer.name!r}")
        kept = _kept(carriers[rows.index(wanted)], layer.name)
        assert kept is not None
        return rows.index(wanted), kept

    def _tensor(self, name: str, first_row: int, rows: int) -> torch.Tensor:
        return torch.from_numpy(self._source.read(name, first_row, rows)).to(self._device)


def _kept(record: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return next((layer for layer in record["layers"] if layer["name"] == name), None)
