"""The two writers of one format: all ranks into one file through MPI, or each rank into a file of its own."""

from __future__ import annotations

import faulthandler
import math
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import h5py
import numpy as np

from apts_mpi.checkpoint.arrays import Array, Slab
from apts_mpi.checkpoint.format import Checkpoint
from apts_mpi.checkpoint.index import (
    INDEX,
    METADATA,
    NUMBERS_OR_TRUTH_VALUES,
    check_names,
    dataset_in_part,
    describe,
    part_name,
)
from apts_mpi.checkpoint.seals import Region, Written, read_back, seal
from apts_mpi.errors import InvalidInput

if TYPE_CHECKING:
    from apts_mpi.parallel.communicator import Communicator

Writer = Literal["mpio", "parts"]

# The first version of the file format with virtual datasets.
HDF5_VERSION = ("v110", "v110")

# Bytes of a slab on disk. MPI libraries count bytes of one write in 32 bits.
LARGEST_SLAB = 2**28

# Seconds that a collective write may take, besides those for its bytes at the slowest rate in bytes a second.
WRITE_LIMIT, SLOWEST = 60.0, 1e6

# Bytes for HDF5's own structure in a file.
RESERVE = 2**16


class SlabPlace(NamedTuple):
    """Where a slab belongs: its rank, number of its array, first row and number of rows."""

    rank: int
    array: int
    first_row: int
    rows: int


def hdf5_versions() -> tuple[str, bool]:
    """Versions of h5py and its HDF5, in words, and whether it has MPI."""
    version = h5py.version
    return f"h5py {version.version}, HDF5 {version.hdf5_version}", bool(h5py.get_config().mpi)


def choose_writer(comm: Communicator) -> Writer:
    """``mpio`` where h5py has MPI and there are several ranks, else ``parts``."""
    return "mpio" if hdf5_versions()[1] and comm.size > 1 else "parts"


def prepare(arrays: Sequence[Array], copy: bool) -> list[Array]:
    """The same arrays with contiguous slabs of at most `LARGEST_SLAB` bytes and none without rows.

    Parameters
    ----------
    arrays
        This rank's part of each.
    copy
        Whether the values may change before they are written.

    Raises
    ------
    InvalidInput
        If a name cannot be used or a slab does not fit its array.
    """
    check_names([array.name for array in arrays])
    return [Array(array.name, tuple(array.shape), np.dtype(array.dtype), list(pieces(array, copy))) for array in arrays]


def pieces(array: Array, copy: bool) -> Iterator[Slab]:
    """The slabs of an array, cut where they are large."""
    for slab in array.slabs:
        values = np.array(slab.values, order="C", copy=True if copy else None)
        fits = values.shape[1:] == tuple(array.shape[1:]) and values.ndim == len(array.shape)
        if values.dtype != array.dtype or not fits or values.dtype.kind not in NUMBERS_OR_TRUTH_VALUES:
            raise InvalidInput(
                f"checkpoint: {array.name} of shape {array.shape} and dtype {array.dtype} was given a slab of shape "
                f"{values.shape} and dtype {values.dtype}; give rows of the array, of numbers or truth values"
            )
        if values.ndim == 0:
            yield Slab(0, values)
            continue
        rows = max(LARGEST_SLAB // max(values[:1].nbytes, 1), 1)
        if values.size:
            for start in range(0, len(values), rows):
                yield Slab(slab.first_row + start, values[start : start + rows])


def own_places(arrays: Sequence[Array], rank: int) -> list[SlabPlace]:
    """The slabs of a rank, in the order of arrays and slabs."""
    return [
        SlabPlace(rank, number, slab.first_row, slab.rows)
        for number, array in enumerate(arrays)
        for slab in array.slabs
    ]


def agree_on_places(arrays: Sequence[Array], comm: Communicator) -> list[SlabPlace]:
    """The slabs of all ranks, in the order of ranks, arrays and slabs. Collective.

    Raises
    ------
    SharedInvalidInput
        If the ranks describe different arrays, or their slabs do not cover each row once.
    """
    described = [(array.name, array.shape, array.dtype.str) for array in arrays]
    collected = comm.collect((described, own_places(arrays, comm.rank)))
    places = [place for _, rank_places in collected for place in rank_places]
    with comm.shared_errors():
        for rank, (others, _) in enumerate(collected):
            for first, other in zip_longest(collected[0][0], others):
                if first != other:
                    raise InvalidInput(
                        f"checkpoint: where rank 0 gives the array {first}, rank {rank} gives {other}; "
                        "all ranks give the same list"
                    )
        for number, array in enumerate(arrays):
            check_cover(array, [place for place in places if place.array == number])
    return places


def check_cover(array: Array, places: Sequence[SlabPlace]) -> None:
    """Raise `InvalidInput` unless slabs cover each row of an array once, and rank 0 gives a scalar."""
    if array.shape == () and any(place.rank for place in places):
        raise InvalidInput(f"checkpoint: {array.name} of shape () comes from another rank; it is rank 0's to give")
    covered = 0
    for place in sorted(places, key=lambda place: place.first_row):
        if place.first_row != covered:
            break
        covered += place.rows
    else:
        if covered == (array.shape or (1,))[0] or 0 in array.shape:
            return
    raise InvalidInput(
        f"checkpoint: the slabs of {array.name} of shape {array.shape} leave out or repeat a row after the first "
        f"{covered}; together the ranks give each row once"
    )


def shared(arrays: Sequence[Array], comm: Communicator) -> list[int]:
    """Numbers of the arrays that several ranks may contribute to; the others are rank 0's."""
    return [number for number, array in enumerate(arrays) if array.shape and 0 not in array.shape and comm.size > 1]


def write_part(path: Path, arrays: Sequence[Array], numbers: Sequence[int]) -> tuple[int, Flush]:
    """Write this rank's slabs of the arrays ``numbers`` into a file of its own; returns what `seal` does, too."""
    written = []
    with h5py.File(path, "w", libver=HDF5_VERSION, locking=False) as file:
        for number in numbers:
            for slab in arrays[number].slabs:
                name = dataset_in_part(arrays[number].name, slab.first_row)
                file[name] = slab.values
                start = file[name].id.get_offset()
                written.append(Written(start, slab.values))
                # Linux begins to bring these bytes to disk, and does not wait.
                os.posix_fadvise(file.id.get_vfd_handle(), start, slab.values.nbytes, os.POSIX_FADV_DONTNEED)
    seal_checksum = seal(path, read_back(path, written))
    return seal_checksum, Flush(path)


def written_slabs(dataset: h5py.Dataset, array: Array) -> list[Written]:
    """Where this rank's slabs lie in the dataset of a whole array."""
    start = dataset.id.get_offset()
    return [Written(start + slab.first_row * (slab.values.nbytes // slab.rows), slab.values) for slab in array.slabs]


def write_together(
    path: Path, arrays: Sequence[Array], numbers: Sequence[int], places: Sequence[SlabPlace], comm: Communicator
) -> list[Written]:
    """Write the slabs that all ranks have of the arrays ``numbers`` into one file through MPI. Collective.

    Returns
    -------
    list of Written
        This rank's.

    Raises
    ------
    Exception
        Of HDF5, on the ranks where it failed, after all have come to the end.
    """
    failures = []
    written = []
    size = sum(math.prod(arrays[number].shape) * arrays[number].dtype.itemsize for number in numbers)
    with (
        ended_after(WRITE_LIMIT + size / SLOWEST),
        h5py.File(path, "w", driver="mpio", comm=comm.mpi, libver=HDF5_VERSION, locking=False) as file,
    ):
        collective = h5py.h5p.create(h5py.h5p.DATASET_XFER)
        collective.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
        for number in numbers:
            array = arrays[number]
            # Without the fill value, which would be written to disk before the values.
            dataset = file.create_dataset(array.name, array.shape, array.dtype, fill_time="never")
            counts = np.bincount([place.rank for place in places if place.array == number])
            for turn in range(counts.max()):
                try:
                    write_slab(dataset.id, array.slabs[turn] if turn < len(array.slabs) else None, collective)
                except Exception as error:
                    # The others go on to the next collective write; to stay away would leave them waiting there.
                    failures.append(error)
            written += written_slabs(dataset, array)
    if failures:
        raise failures[0]
    return written


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """End this process, and with it the job, if the block takes longer, with a traceback on the error output.

    A collective write to a disk that has become full may never return, and h5py keeps the interpreter to itself
    meanwhile: a thread in Python would not get its turn.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def write_slab(dataset: h5py.h5d.DatasetID, slab: Slab | None, collective: h5py.h5p.PropDXID) -> None:
    """Write one slab, or take part with nothing: h5py itself leaves an empty slice out (h5py/h5py#965). Collective."""
    target = dataset.get_space()
    if slab is None:
        source, values = target.copy(), np.empty(0, dataset.dtype)
        source.select_none()
        target.select_none()
    else:
        source, values = h5py.h5s.create_simple(slab.values.shape), slab.values
        target.select_hyperslab((slab.first_row,) + (0,) * (values.ndim - 1), values.shape)
    dataset.write(source, target, values, dxpl=collective)


def write_own(path: Path, arrays: Sequence[Array]) -> list[Written]:
    """On rank 0: write arrays to which only it contributes into the main file, which may be there already."""
    written = []
    with h5py.File(path, "a", libver=HDF5_VERSION, locking=False) as file:
        for array in arrays:
            dataset = file.create_dataset(array.name, array.shape, array.dtype)
            for slab in array.slabs:
                part = slice(slab.first_row, slab.first_row + slab.rows) if array.shape else ()
                dataset[part] = slab.values
            written += written_slabs(dataset, array)
    return written


def show_parts(
    path: Path, arrays: Sequence[Array], numbers: Sequence[int], places: Sequence[SlabPlace], parts: str
) -> None:
    """On rank 0: make of the slabs in directory ``parts`` virtual datasets of the main file, the arrays ``numbers``."""
    with h5py.File(path, "a", libver=HDF5_VERSION, locking=False) as file:
        for number in numbers:
            array = arrays[number]
            layout = h5py.VirtualLayout(array.shape, array.dtype)
            for place in (place for place in places if place.array == number):
                layout[place.first_row : place.first_row + place.rows] = h5py.VirtualSource(
                    f"{parts}/{part_name(place.rank)}",  # relative to the main file
                    dataset_in_part(array.name, place.first_row),
                    (place.rows, *array.shape[1:]),
                    array.dtype,
                )
            file.create_virtual_dataset(array.name, layout)


def finish_file(path: Path, index: str, metadata: str, slabs: Iterable[Region]) -> None:
    """On rank 0: add the two texts to the main file, and seal it with the checksums of the ``slabs`` in it."""
    with h5py.File(path, "a", libver=HDF5_VERSION, locking=False) as file:
        for name, text in ((INDEX, index), (METADATA, metadata)):
            file[name] = np.frombuffer(text.encode(), dtype=np.uint8)
    seal(path, slabs)


def reserve(path: Path, size: int) -> None:
    """Make a file that occupies disk space for ``size`` bytes of values, or raise `OSError`."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(number, 0, size + RESERVE)
    finally:
        os.close(number)


class Flush:
    """Brings a file to disk, from now on and in the background; `finish` ends it."""

    def __init__(self, path: Path) -> None:
        # Opened here, as the file may soon have another name.
        number = os.open(path, os.O_RDONLY)
        self._number = number
        self._close = weakref.finalize(self, os.close, number)
        self._flushing = ThreadPoolExecutor(1).submit(os.fsync, number)

    def finish(self) -> None:
        """Wait until the file as it is now is on disk."""
        self._flushing.result()
        os.fsync(self._number)
        self._close()


def synchronise(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_file(path: Path, arrays: Sequence[Array]) -> None:
    """Write a checkpoint of arrays without MPI, and read it back.

    Raises
    ------
    InvalidInput, OSError, RuntimeError
        If the arrays cannot be saved or the file not written.
    """
    arrays = prepare(arrays, copy=False)
    slabs = read_back(path, write_own(path, arrays))
    finish_file(path, describe(arrays, 0, "", ()), "{}", slabs)
    Checkpoint(path).close()
    synchronise(path)
