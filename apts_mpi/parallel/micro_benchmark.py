"""Latency and bandwidth between the ranks of a job, without what a call from Python costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from mpi4py import MPI

from apts_mpi.errors import InvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.environment import seconds
from apts_mpi.tools.events import Events

# Calls in a series, and series, of which the fastest counts: others only add to it.
CALLS, SERIES = 50, 20

# Bytes of the two long messages, whose difference is bandwidth alone.
SHORTER, LONGER = 1 << 20, 1 << 22


class Measured(NamedTuple):
    """Seconds of an empty message, bytes a second, and the seconds that a call costs without any message."""

    latency: float
    bandwidth: float
    call: float


def measure(keep: Callable[[Measured], None]) -> None:
    """See what messages take among all ranks. Collective.

    A sum among all ranks takes a call and so many messages in a row; one on a rank alone takes the call. The
    difference is the messages', whatever language called. Of long messages the difference of two lengths counts.

    Parameters
    ----------
    keep
        Called on rank 0 with what was found.

    Raises
    ------
    SharedInvalidInput
        On a rank alone, and if ``keep`` refuses.
    """
    world = MPI.COMM_WORLD
    comm = Communicator(world, Events())
    with comm.shared_errors():
        if world.size < 2:
            raise InvalidInput("network: there is one rank, and no message; start it with mpirun -n 2 or more")
    number, total = np.zeros(1), np.zeros(1)
    alone = _fastest(lambda: MPI.COMM_SELF.Allreduce(number, total))
    together = _fastest(lambda: world.Allreduce(number, total))
    rounds = math.ceil(math.log2(world.size))
    shorter, longer = (_fastest(_ring(world, size), CALLS // 10) for size in (SHORTER, LONGER))
    # No message is faster than the clock can tell.
    own = [max((together - alone) / rounds, 1e-9), (LONGER - SHORTER) / max(longer - shorter, 1e-9), alone]

    def decide(table: np.ndarray) -> list[float]:
        return [table[:, 0].max(), table[:, 1].min(), table[:, 2].max()]

    found = Measured(*comm.agree(own, decide))
    with comm.shared_errors():
        if world.rank == 0:
            keep(found)


def _ring(world: MPI.Intracomm, size: int) -> Callable[[], object]:
    """A message of so many bytes from each rank to the next one."""
    sent, received = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    return lambda: world.Sendrecv(sent, after, recvbuf=received, source=before)


def _fastest(call: Callable[[], object], calls: int = CALLS) -> float:
    """Seconds of a call in the fastest series."""
    taken = []
    for _ in range(SERIES):
        start = seconds()
        for _ in range(calls):
            call()
        taken.append((seconds() - start) / calls)
    return min(taken)
