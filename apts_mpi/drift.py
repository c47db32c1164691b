"""Watch over what all ranks have to share: a rank with other bits is found before its state is saved."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable

import numpy as np
import torch

from apts_mpi.comm import Communicator
from apts_mpi.errors import SharedFailure
from apts_mpi.network_state import to_numpy


def fingerprint(tensors: Iterable[torch.Tensor], numbers: object) -> int:
    """CRC-32 of the values of tensors and of the text of numbers."""
    result = zlib.crc32(repr(numbers).encode())
    for tensor in tensors:
        result = zlib.crc32(to_numpy(tensor).reshape(-1).view(np.uint8).data, result)
    return result


def check_shared(own: int, iteration: int, comm: Communicator) -> None:
    """See that all ranks have the same `fingerprint`. Collective.

    Raises
    ------
    SharedFailure
        On every rank if one differs from most, naming the first that does.
    """

    def decide(table: np.ndarray) -> list[float]:
        values = table[:, 0]
        if values.min() == values.max():
            return [-1.0]
        usual = Counter(values.tolist()).most_common(1)[0][0]
        return [float(np.flatnonzero(values != usual)[0])]

    (rank,) = comm.agree([float(own)], decide)
    if rank >= 0.0:
        raise SharedFailure(
            f"after iteration {iteration} rank {int(rank)} has other parameters or another solver state than most "
            "ranks, and all should have the same bits: its memory, or what changes the network besides the solver, is "
            "at fault; nothing of this is saved, resume from the last checkpoint"
        )
