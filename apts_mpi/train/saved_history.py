"""The records of a run as an array of its checkpoints, so that a resumed run has them all."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from apts_mpi.checkpoint import Array, Checkpoint, Slab
from apts_mpi.errors import InvalidInput
from apts_mpi.parallel.communicator import Communicator

# The array: the bytes of the lines, compressed.
NAME = "training/history"

# Bytes of records that a compressed one may stand for, and some more at the beginning: each record has numbers that the
# ones before have not. What stands for more was made to fill the memory.
LARGEST_RATIO, ALLOWANCE = 200, 2**20

# Compressed bytes that are taken at once.
PIECE = 2**12


def history_array(history: Callable[[], bytes], comm: Communicator) -> Array:
    """The records so far, which ``history`` gives on rank 0. Collective."""
    values = np.zeros(0, np.uint8)
    if comm.rank == 0:
        values = np.frombuffer(zlib.compress(history(), 1), np.uint8)
    (size,) = comm.decide(lambda: [values.size])
    return Array(NAME, (int(size),), values.dtype, [Slab(0, values)] if comm.rank == 0 else [])


def history_of(checkpoint: Checkpoint | None) -> bytes:
    """The records of the run that goes on, up to its checkpoint; none for a new run.

    Raises
    ------
    InvalidInput
        If they are no records.
    """
    if checkpoint is None:
        return b""
    place = f"{checkpoint.path}: {NAME}"
    if checkpoint.dtype(NAME) != np.uint8 or len(checkpoint.shape(NAME)) != 1:
        raise InvalidInput(f"{place} is not of bytes; give another checkpoint")
    records = b"".join(_inflated(checkpoint.read(NAME).tobytes(), place))
    if records and not records.endswith(b"\n"):
        raise InvalidInput(f"{place} ends within a record; give another checkpoint")
    for number, line in enumerate(records.splitlines(), 1):
        if not _is_record(line):
            raise InvalidInput(f"{place} has a line {number} that is no record; give another checkpoint")
    return records


def _inflated(compressed: bytes, place: str) -> Iterator[bytes]:
    """The bytes, in pieces, none of which is much larger than records could be."""
    inflating = zlib.decompressobj()
    total = 0
    try:
        for start in range(0, len(compressed), PIECE):
            piece = compressed[start : start + PIECE]
            most = LARGEST_RATIO * (start + len(piece)) + ALLOWANCE - total
            inflated = inflating.decompress(piece, most)
            if inflating.unconsumed_tail:
                raise InvalidInput(f"{place} is larger than records can be; give another checkpoint")
            total += len(inflated)
            yield inflated
    except zlib.error as error:
        raise InvalidInput(f"{place} cannot be inflated ({error}); give another checkpoint") from error
    if not inflating.eof or inflating.unused_data:
        raise InvalidInput(f"{place} has no end, or more behind it; give another checkpoint")


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
