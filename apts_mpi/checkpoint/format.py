"""What is in a checkpoint file, and its reader.

Every array is a dataset under its own name, whole, whichever ranks wrote it. Beside them lie two datasets with the
bytes of a JSON text: ``checkpoint/metadata`` and ``checkpoint/index`` (step, arrays and parts). The *parts* are further
files, in a directory beside this one, with the slabs of each rank, which virtual datasets show as whole arrays.

After the end of the HDF5 file, where HDF5 ignores it, each file has a *seal*: the CRC-32 of each slab, taken from
memory, and of the bytes between them. HDF5 sees a file only after those were checked, as it
may crash on a damaged one.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BufferedIOBase, BufferedReader, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from apts_mpi.comm import Communicator
from apts_mpi.errors import InvalidInput

VERSION = 1
GROUP = "checkpoint"
INDEX, METADATA = f"{GROUP}/index", f"{GROUP}/metadata"

# The end of a file in every version: mark, version, number of regions and CRC-32 of their table, which lies before it,
# and the CRC-32 of these.
MAGIC = b"apts_mpi checkpoint\0"
FIELDS, CHECKSUM = struct.Struct(f"<{len(MAGIC)}sIII"), struct.Struct("<I")

# Bytes read at once. They are still in the processor's cache when their checksum is computed.
BUFFER = 2**20


class DamagedCheckpoint(InvalidInput):
    """A file that is not, or no longer, a checkpoint."""


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


class Region(NamedTuple):
    """Bytes of a file: of a slab, or of HDF5's own between slabs, with their CRC-32."""

    start: int
    length: int
    checksum: int
    is_slab: int


def file_checksum(file: BufferedIOBase | FileIO, start: int, length: int) -> int:
    """CRC-32 of a part of a file."""
    result = 0
    buffer = memoryview(bytearray(min(BUFFER, length)))
    file.seek(start)
    while length > 0 and (size := file.readinto(buffer[:length])):
        result = zlib.crc32(buffer[:size], result)
        length -= size
    return result


class Written(NamedTuple):
    """Values that were written, and their first byte in the file."""

    start: int
    values: np.ndarray


def read_back(path: Path, written: Iterable[Written]) -> list[Region]:
    """Compare a file that HDF5 has closed with the values that were written into it.

    Returns
    -------
    list of Region
        Where they lie, with the CRC-32 of the values in memory.

    Raises
    ------
    DamagedCheckpoint
        If they are not in the file.
    """
    with path.open("rb") as file:
        return [Region(start, values.nbytes, compared_checksum(file, start, values), True) for start, values in written]


def compared_checksum(file: BufferedReader, start: int, values: np.ndarray) -> int:
    """CRC-32 of values that a part of a file holds, too."""
    # Comparison and checksum in one pass, and the comparison takes a fraction of the time of a second checksum.
    result = 0
    content = values.reshape(-1).view(np.uint8).data
    buffer = bytearray(BUFFER)
    file.seek(start)
    for offset in range(0, len(content), BUFFER):
        expected = content[offset : offset + BUFFER]
        del buffer[len(expected) :]
        if file.readinto(buffer) != len(expected) or buffer != expected:
            raise DamagedCheckpoint(
                f"{file.name} does not hold what was written to it at byte {start + offset} and after; "
                "its disk is not to be relied on: give a directory on another one"
            )
        result = zlib.crc32(expected, result)
    return result


def seal(path: Path, slabs: Iterable[Region]) -> int:
    """Add checksums to a complete file.

    Parameters
    ----------
    path
        A file that HDF5 has closed.
    slabs
        All in it.

    Returns
    -------
    int
        A checksum of the checksums.
    """
    regions = list(slabs)
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        end = 0
        for region in [*sorted(regions), Region(size, 0, 0, False)]:
            if region.start > end:
                between = file_checksum(file, end, region.start - end)
                regions.append(Region(end, region.start - end, between, False))
            end = region.start + region.length
        table = np.array(sorted(regions), dtype="<i8").tobytes()
        fields = FIELDS.pack(MAGIC, VERSION, len(regions), zlib.crc32(table))
        file.seek(size)
        file.write(table + fields + CHECKSUM.pack(zlib.crc32(fields)))
    return zlib.crc32(fields)


class SealedFile:
    """The checksums of a file.

    Attributes
    ----------
    regions : list of Region
        They cover the file up to the seal.
    checksum : int
        What `seal` has returned.

    Raises
    ------
    DamagedCheckpoint
        If there is no seal or it is damaged.
    InvalidInput
        If the file cannot be read or has a newer format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._opened() as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - FIELDS.size - CHECKSUM.size, 0))
            fields, own = file.read(FIELDS.size), file.read(CHECKSUM.size)
            if not fields.startswith(MAGIC):
                raise DamagedCheckpoint(
                    f"{path} is not a checkpoint of apts_mpi, or has lost its end; give another one"
                )
            self.checksum = zlib.crc32(fields)
            if own != CHECKSUM.pack(self.checksum):
                raise damaged(path, "its last bytes have another checksum")
            _, version, number, expected = FIELDS.unpack(fields)
            if version > VERSION:
                raise InvalidInput(
                    f"{path} has version {version} of the checkpoint format, and this program reads versions up to "
                    f"{VERSION}; update apts_mpi"
                )
            length = number * len(Region._fields) * 8
            file.seek(max(size - FIELDS.size - CHECKSUM.size - length, 0))
            table = file.read(length)
        if zlib.crc32(table) != expected:
            raise damaged(path, "its table of checksums has another checksum")
        self.regions = [Region(*row) for row in np.frombuffer(table, "<i8").reshape(number, -1).tolist()]

    def verify(self, regions: Iterable[Region]) -> None:
        """Raise `DamagedCheckpoint` if the bytes of a region are others than when they were sealed."""
        with self._opened() as file:
            for start, length, expected, _ in regions:
                if file_checksum(file, start, length) != expected:
                    raise damaged(self.path, f"bytes {start} to {start + length} have another checksum")

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        try:
            with self.path.open("rb", buffering=0) as file:
                yield file
        except OSError as error:
            raise InvalidInput(f"{self.path} cannot be read ({error.strerror}); give a checkpoint file") from error


def damaged(path: Path, reason: object) -> DamagedCheckpoint:
    """The error for a damaged file."""
    return DamagedCheckpoint(f"{path} is damaged ({reason}); use an earlier checkpoint")


def describe(arrays: Sequence[Array], step: int, parts: str, checksums: Sequence[int]) -> str:
    """The text of the index. ``checksums`` are those that `seal` returned for the files in directory ``parts``."""
    listed = [{"name": array.name, "shape": array.shape, "dtype": array.dtype.str} for array in arrays]
    return json.dumps({"step": step, "arrays": listed, "parts": parts, "checksums": checksums})


def part_name(rank: int) -> str:
    """Name of a rank's file in the directory of parts."""
    return f"{rank:04d}.h5"


def open_file(path: Path) -> h5py.File:
    """Open for reading. Without locks, which some file systems lack: a file is never changed once it has its name."""
    return h5py.File(path, "r", locking=False)


def read_texts(path: Path) -> tuple[SealedFile, dict[str, Any], dict[str, Any]]:
    """Checksums, index and metadata of a main file, without a look at its parts; raises as `Checkpoint` does."""
    main = SealedFile(path)
    main.verify(region for region in main.regions if not region.is_slab)
    try:
        with open_file(path) as file:
            index, metadata = (json.loads(file[name][()].tobytes()) for name in (INDEX, METADATA))
    except Exception as error:
        # HDF5 and h5py meet what they cannot read with errors of many kinds.
        raise damaged(path, error) from error
    return main, index, metadata


class Checkpoint:
    """Reader of a checkpoint file; closed by `close` or at the end of a ``with`` block.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    path : Path
        The file.
    step : int
        When it was saved.
    metadata : dict
        What was saved beside the arrays.
    names : tuple of str
        The arrays in the order in which they were saved.
    parts : str
        Name of the directory with the slabs of the ranks; empty if the file holds them all.

    Raises
    ------
    DamagedCheckpoint
        If it is not a checkpoint, or damaged elsewhere than in the values; these are checked by `verify`.
    InvalidInput
        If it cannot be read or has a newer format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # A link may lie elsewhere than the parts, which are sought beside the file.
        place = path.resolve()
        main, index, self.metadata = read_texts(place)
        self.step: int = index["step"]
        self.parts: str = index["parts"]
        self._shapes = {array["name"]: tuple(array["shape"]) for array in index["arrays"]}
        self._dtypes = {array["name"]: np.dtype(array["dtype"]) for array in index["arrays"]}
        self.names = tuple(self._shapes)
        self._files = [main]
        for rank, expected in enumerate(index["checksums"]):
            part = SealedFile(place.parent / self.parts / part_name(rank))
            if part.checksum != expected:
                raise damaged(part.path, f"it does not belong to {path}")
            part.verify(region for region in part.regions if not region.is_slab)
            self._files.append(part)
        self._file = open_file(place)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of an array."""
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        """Type of an array."""
        return self._dtypes[name]

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> np.ndarray:
        """Rows of an array, all from ``first_row`` on if ``rows`` is None; an array of shape () is read whole.

        Raises
        ------
        DamagedCheckpoint
            If HDF5 cannot read them.
        """
        part = slice(first_row, None if rows is None else first_row + rows) if self.shape(name) else ()
        try:
            return np.asarray(self._file[name][part])
        except Exception as error:
            raise damaged(self.path, error) from error

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Check the values, or one of ``shares`` parts of them of about as many bytes.

        Raises
        ------
        DamagedCheckpoint
            If a slab is not as it was saved.
        """
        total = sum(region.length for file in self._files for region in file.regions if region.is_slab)
        before = 0
        for file in self._files:
            chosen = []
            for region in file.regions:
                if region.is_slab:
                    # A slab belongs to the share in which its middle lies.
                    if (2 * before + region.length) * shares // (2 * total) == share:
                        chosen.append(region)
                    before += region.length
            file.verify(chosen)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoint(path: Path, comm: Communicator) -> Checkpoint:
    """Open a checkpoint on all ranks; each verifies an even share of its values. Collective.

    Raises
    ------
    SharedInvalidInput
        If it is damaged, not a checkpoint, of a newer format or cannot be read; on all ranks.
    """
    with ExitStack() as stack:
        with comm.shared_errors():
            checkpoint = stack.enter_context(Checkpoint(path))
            checkpoint.verify(comm.rank, comm.size)
        stack.pop_all()
    return checkpoint
