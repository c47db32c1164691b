"""Checksums at the end of a file, by which damage is found before HDF5 sees it.

After the end of the HDF5 file, where HDF5 ignores it, each file has a *seal*: the CRC-32 of each slab, taken from
memory, and of the bytes between them. HDF5 sees a file only after those were checked, as it may crash on a damaged one.
"""

from __future__ import annotations

import os
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase, BufferedReader, FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from apts_mpi.errors import InvalidInput

VERSION = 1

# The end of a file in every version: mark, version, number of regions and CRC-32 of their table, which lies before it,
# and the CRC-32 of these.
MAGIC = b"apts_mpi checkpoint\0"
FIELDS, CHECKSUM = struct.Struct(f"<{len(MAGIC)}sIII"), struct.Struct("<I")

# Bytes read at once. They are still in the processor's cache when their checksum is computed.
BUFFER = 2**20


class DamagedCheckpoint(InvalidInput):
    """A file that is not, or no longer, a checkpoint."""


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
        They cover each byte of the file up to the seal once, in order.
    end : int
        Where the seal begins.
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
            self.end = size - FIELDS.size - CHECKSUM.size - length
            if self.end < 0:
                raise damaged(path, "its table of checksums is longer than the file")
            file.seek(self.end)
            table = file.read(length)
        if zlib.crc32(table) != expected:
            raise damaged(path, "its table of checksums has another checksum")
        self.regions = [Region(*row) for row in np.frombuffer(table, "<i8").reshape(-1, len(Region._fields)).tolist()]
        self._check_cover()

    def _check_cover(self) -> None:
        """See that the regions are those of a file: each begins where the one before ends, up to the seal."""
        covered = 0
        for region in self.regions:
            if region.start != covered or region.length <= 0 or region.is_slab not in (0, 1):
                raise damaged(self.path, f"its table of checksums has a wrong line for byte {covered} and after")
            covered += region.length
        if covered != self.end:
            raise damaged(self.path, f"its table of checksums ends at byte {covered}, and the file at {self.end}")

    def verify(self, regions: Iterable[Region]) -> None:
        """Raise `DamagedCheckpoint` if the bytes of a region are others than when they were sealed."""
        with self._opened() as file:
            for start, length, expected, _ in regions:
                if file_checksum(file, start, length) != expected:
                    raise damaged(self.path, f"bytes {start} to {start + length} have another checksum")

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        try:
            # Not waiting for who writes into a pipe.
            with open(
                self.path, "rb", buffering=0, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)
            ) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise InvalidInput(f"{self.path} cannot be read (it is no file); give a checkpoint file")
                yield file
        except OSError as error:
            raise InvalidInput(f"{self.path} cannot be read ({error.strerror}); give a checkpoint file") from error


def damaged(path: Path, reason: object) -> DamagedCheckpoint:
    """The error for a damaged file."""
    return DamagedCheckpoint(f"{path} is damaged ({reason}); use an earlier checkpoint")
