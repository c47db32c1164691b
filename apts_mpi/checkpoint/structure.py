"""What HDF5 makes of a file, compared with the index without following anything that could lead elsewhere.

A file of HDF5 can name other files: by external and soft links, by values that are stored outside, and by the sources
of virtual datasets. It can share bytes between datasets, and compress them. A checkpoint has nothing of these but
virtual datasets, each of whose sources is a slab in one of its own parts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import h5py
import numpy as np

from apts_mpi.checkpoint.index import GROUP, INDEX, METADATA, Index, Shaped, dataset_in_part
from apts_mpi.errors import InvalidInput, shown


class Part(NamedTuple):
    """A file of a checkpoint: its name as seen from the main one, the open file, and where its seal begins."""

    name: str
    file: h5py.File
    end: int


class Source(NamedTuple):
    """Where some rows of a virtual dataset come from: the name of a part, and of the slab in it."""

    part: str
    dataset: str
    first_row: int
    rows: int


def read_text(file: h5py.File, name: str) -> str:
    """One of the two texts in a main file.

    Raises
    ------
    InvalidInput
        If there is something else, or more beside it.
    """
    _check_links(file.id, "", {GROUP: h5py.h5o.TYPE_GROUP}, others=True)
    _check_links(file.id, GROUP, {INDEX: h5py.h5o.TYPE_DATASET, METADATA: h5py.h5o.TYPE_DATASET})
    dataset = h5py.h5d.open(file.id, name.encode())
    if len(dataset.shape or ()) != 1:
        raise InvalidInput(f"{name} is no text")
    _check_plain(dataset, name, Shaped(dataset.shape, np.dtype(np.uint8)))
    try:
        return file[name][()].tobytes().decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name} is no text ({error})") from error


def check_structure(main: Part, index: Index, parts: Sequence[Part]) -> None:
    """Raise `InvalidInput` unless the files of a checkpoint have what its index says, and nothing else.

    No values are read.

    Parameters
    ----------
    main
        The main file.
    index
        Its index.
    parts
        The files of the ranks.
    """
    root = main.file.id
    _check_tree(root, [INDEX, METADATA, *index.arrays])
    plain = {name: h5py.h5d.open(root, name.encode()) for name in (INDEX, METADATA)}
    slabs: dict[str, dict[str, Shaped]] = {part.name: {} for part in parts}
    for name, expected in index.arrays.items():
        dataset = h5py.h5d.open(root, name.encode())
        if dataset.get_create_plist().get_layout() != h5py.h5d.VIRTUAL:
            _check_plain(dataset, name, expected)
            plain[name] = dataset
            continue
        _check_shape(dataset, name, expected)
        for source in _sources(dataset, name, expected):
            if source.part not in slabs:
                raise InvalidInput(f"{name} has values in {shown(source.part)}, which is no part of this checkpoint")
            slabs[source.part][source.dataset] = Shaped((source.rows, *expected.shape[1:]), expected.dtype)
    _check_places(plain, main.end)
    for part in parts:
        _check_part(part, slabs[part.name])


def _check_part(part: Part, slabs: Mapping[str, Shaped]) -> None:
    """See that a part has these slabs and nothing else."""
    _check_tree(part.file.id, slabs)
    datasets = {name: h5py.h5d.open(part.file.id, name.encode()) for name in slabs}
    for name, dataset in datasets.items():
        _check_plain(dataset, f"{part.name}: {name}", slabs[name])
    _check_places(datasets, part.end)


def _check_tree(root: h5py.h5g.GroupID, names: Iterable[str]) -> None:
    """See that a file has datasets of these names, the groups that they need, and nothing else."""
    groups: dict[str, dict[str, int]] = {"": {}}
    for name in names:
        steps = name.split("/")
        for depth in range(1, len(steps)):
            inner = "/".join(steps[:depth])
            groups["/".join(steps[: depth - 1])][inner] = h5py.h5o.TYPE_GROUP
            groups.setdefault(inner, {})
        groups["/".join(steps[:-1])][name] = h5py.h5o.TYPE_DATASET
    # Each after the one that it lies in.
    for group, members in groups.items():
        _check_links(root, group, members)


def _check_links(root: h5py.h5g.GroupID, group: str, members: Mapping[str, int], others: bool = False) -> None:
    """See that a group has these members, by their full names and kinds, as objects of this file.

    Parameters
    ----------
    root
        Of the file.
    group
        Its name, which has been checked.
    members
        Kinds by names.
    others
        Whether there may be others.
    """
    opened = h5py.h5g.open(root, (group or "/").encode())
    if not others and opened.get_num_objs() != len(members):
        raise InvalidInput(f"group {shown(group)} has {opened.get_num_objs()} members, not {len(members)}")
    for name, kind in members.items():
        own = name.rpartition("/")[2].encode()
        if own not in opened:
            raise InvalidInput(f"{name} is missing")
        if opened.links.get_info(own).type != h5py.h5l.TYPE_HARD:
            raise InvalidInput(f"{name} is a link to somewhere else")
        if h5py.h5o.get_info(opened, own).type != kind:
            raise InvalidInput(f"{name} is a {'dataset' if kind == h5py.h5o.TYPE_GROUP else 'group'} or a type")


def _check_shape(dataset: h5py.h5d.DatasetID, name: str, expected: Shaped) -> None:
    found = dataset.shape, dataset.dtype
    if found != (expected.shape, expected.dtype) or dataset.get_type().get_size() != expected.dtype.itemsize:
        raise InvalidInput(f"{name} has shape and type {found}, and in the index {(expected.shape, expected.dtype)}")


def _check_plain(dataset: h5py.h5d.DatasetID, name: str, expected: Shaped) -> None:
    """See that a dataset has its values, as many as its shape needs and as they are, in one piece in this file."""
    _check_shape(dataset, name, expected)
    properties = dataset.get_create_plist()
    if properties.get_external_count():
        raise InvalidInput(f"{name} has values in other files")
    if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_nfilters():
        raise InvalidInput(f"{name} is not stored in one piece, or compressed")
    if dataset.get_storage_size() != expected.size:
        raise InvalidInput(f"{name} has {dataset.get_storage_size()} bytes, and its shape needs {expected.size}")


def _check_places(datasets: Mapping[str, h5py.h5d.DatasetID], end: int) -> None:
    """See that datasets lie in the file, before ``end``, and that none shares bytes with another."""
    stored = {name: dataset.get_storage_size() for name, dataset in datasets.items()}
    places = sorted((datasets[name].get_offset() or 0, name) for name, size in stored.items() if size)
    covered = 0
    for start, name in places:
        if start < covered:
            raise InvalidInput(f"{name} shares bytes with another dataset")
        covered = start + stored[name]
    if covered > end:
        raise InvalidInput(f"{places[-1][1]} ends behind the end of the file")


def _sources(dataset: h5py.h5d.DatasetID, name: str, expected: Shaped) -> list[Source]:
    """Where the rows of a virtual dataset come from, in their order; each row from one place."""
    properties = dataset.get_create_plist()
    sources = []
    for number in range(properties.get_virtual_count()):
        rows = properties.get_virtual_vspace(number)
        first, last = rows.get_select_bounds()
        shape = (last[0] - first[0] + 1, *expected.shape[1:])
        # As many points as the box around them has: they are the box, which reaches over whole rows.
        is_box = rows.get_select_npoints() == math.prod(shape)
        is_whole = (first[1:], last[1:]) == ((0,) * len(shape[1:]), tuple(length - 1 for length in shape[1:]))
        # The source is all of a dataset, whose shape is compared there.
        if not is_box or not is_whole or properties.get_virtual_srcspace(number).get_select_type() != h5py.h5s.SEL_ALL:
            raise InvalidInput(f"{name} is put together of other pieces than rows")
        sources.append(
            Source(
                properties.get_virtual_filename(number),
                properties.get_virtual_dsetname(number),
                first[0],
                shape[0],
            )
        )
    sources.sort(key=lambda source: source.first_row)
    covered = 0
    for source in sources:
        if source.first_row != covered or source.dataset != dataset_in_part(name, source.first_row):
            break
        covered += source.rows
    if (covered,) != expected.shape[:1]:
        raise InvalidInput(f"{name} lacks rows after the first {covered}, or has them from another place")
    return sources
