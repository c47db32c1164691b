"""Watch over what all ranks have to share: a rank with other bits is found before its state is saved."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
import torch

from apts_mpi.errors import SharedFailure
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.sameness import first_other
from apts_mpi.state.tensors import to_numpy


def fingerprint(tensors: Iterable[torch.Tensor], numbers: object, part: int = 0) -> tuple[int, int, int]:
    """``part``, and the CRC-32 of the values of tensors and of the text of numbers.

    All ranks share the numbers; those that give the same ``part`` of a network share its tensors.
    """
    result = 0
    for tensor in tensors:
        result = zlib.crc32(to_numpy(tensor).reshape(-1).view(np.uint8).data, result)
    return part, result, zlib.crc32(repr(numbers).encode())


def check_shared(own: tuple[int, int, int], iteration: int, comm: Communicator) -> None:
    """See that all ranks have the same numbers, and those with one part the same tensors. Collective.

    Parameters
    ----------
    own
        This rank's `fingerprint`.
    iteration
        For the message.
    comm
        The ranks.

    Raises
    ------
    SharedFailure
        On every rank if one differs from most, naming the first that does.
    """

    def decide(table: np.ndarray) -> list[float]:
        parts, tensors, numbers = table.T
        for part in np.unique(parts):
            ranks = np.flatnonzero(parts == part)
            if (found := first_other(tensors[ranks].tolist())) is not None:
                return [float(ranks[place]) for place in found]
        return list(map(float, first_other(numbers.tolist()) or (-1, -1)))

    rank, usual = (int(number) for number in comm.agree(own, decide))
    if rank >= 0:
        raise SharedFailure(
            f"after iteration {iteration} rank {rank} has other parameters or another solver state than rank {usual}, "
            "and they should have the same bits: the memory of one, or what changes the network besides the solver, is "
            "at fault; nothing of this is saved, resume from the last checkpoint"
        )
