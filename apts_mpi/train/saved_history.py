"""The records of a run as an array of its checkpoints, so that a resumed run has them all."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from apts_mpi.checkpoint import Array, Checkpoint, Slab
from apts_mpi.parallel.communicator import Communicator

# The array: the bytes of the lines, compressed.
NAME = "training/history"


def history_array(history: Callable[[], bytes], comm: Communicator) -> Array:
    """The records so far, which ``history`` gives on rank 0. Collective."""
    values = np.zeros(0, np.uint8)
    if comm.rank == 0:
        values = np.frombuffer(zlib.compress(history(), 1), np.uint8)
    (size,) = comm.decide(lambda: [values.size])
    return Array(NAME, (int(size),), values.dtype, [Slab(0, values)] if comm.rank == 0 else [])


def history_of(checkpoint: Checkpoint | None) -> bytes:
    """The records of the run that goes on, up to its checkpoint; none for a new run."""
    return b"" if checkpoint is None else zlib.decompress(checkpoint.read(NAME).tobytes())
