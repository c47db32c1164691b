"""By how much the clocks of ranks differ."""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.waiting import WAITING
from apts_mpi.tools.environment import seconds

# Tag of its messages, beside those of `Communicator`.
CLOCK = 900

# Round trips by which two clocks are compared. The shortest counts: the others met a busy machine.
ROUND_TRIPS = 20


def clock_offset(comm: Communicator) -> tuple[float, float]:
    """Seconds by which this rank's clock is ahead of rank 0's, and by how much that may be wrong. Collective.

    Rank 0 asks each rank for the time; the answer is taken for the time of the middle of the round trip (Cristian,
    doi 10.1007/BF01784024), which is wrong by at most half of it.
    """
    mpi, own, offsets = comm.mpi, np.empty(1), np.zeros((comm.size, 2))
    with WAITING.noted("all ranks to compare their clocks"):
        if comm.rank > 0:
            for _ in range(ROUND_TRIPS):
                mpi.Recv(own, 0, CLOCK)
                own[0] = seconds()
                mpi.Send(own, 0, CLOCK)
        else:
            for rank in range(1, comm.size):
                offsets[rank] = _compare_clocks(mpi, rank, own)
        mpi.Bcast(offsets)
    return float(offsets[comm.rank, 0]), float(offsets[comm.rank, 1])


def _compare_clocks(mpi: MPI.Intracomm, rank: int, answer: np.ndarray) -> tuple[float, float]:
    trips = []
    for _ in range(ROUND_TRIPS):
        asked = seconds()
        mpi.Send(answer, rank, CLOCK)
        mpi.Recv(answer, rank, CLOCK)
        answered = seconds()
        trips.append((answered - asked, answer[0] - (asked + answered) / 2))
    length, offset = min(trips)
    return offset, length / 2
