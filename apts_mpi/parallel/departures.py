"""Ranks that have come to the end of their program, so that nobody waits for them in vain."""

from __future__ import annotations

import atexit
import weakref

import numpy as np
from mpi4py import MPI

from apts_mpi.tools.environment import pause

# Of the only message; others on the same communicator have lower ones.
TAG = 1001

# Seconds between looks, at the end.
INTERVAL = 0.002


class Departures:
    """Tells, when the program of this rank ends, the next one of ``comm``, in a ring.

    As long as some ranks have left and others have not, one of these comes next to one of those.

    Parameters
    ----------
    comm
        A communicator of the package's own.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._comm = comm
        self._next, self._before = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        self._heard = False
        self._sent: MPI.Request | None = None

    def watch(self) -> None:
        """Tell at the end of the program, and be told. Called on all ranks."""
        if self._comm.size > 1:
            _WATCHED.add(self)

    def forget(self) -> None:
        """Before the communicator is freed."""
        _WATCHED.discard(self)

    def departed(self) -> int | None:
        """The rank before this one if it has left; from any thread."""
        if not self._heard and self in _WATCHED and MPI.Query_thread() == MPI.THREAD_MULTIPLE:
            self._listen()
        return self._before if self._heard else None

    def _listen(self) -> None:
        if self._comm.Iprobe(self._before, TAG):
            self._comm.Recv(np.empty(0, np.uint8), self._before, TAG)
            self._heard = True

    def _tell(self) -> None:
        self._sent = self._comm.Isend(np.empty(0, np.uint8), self._next, TAG)

    def _finish(self) -> None:
        """Wait until the one before leaves, as the end of MPI does anyway."""
        while not self._heard:
            self._listen()
            pause(INTERVAL)
        assert self._sent is not None  # told before
        self._sent.Wait()


_WATCHED: weakref.WeakSet[Departures] = weakref.WeakSet()


@atexit.register
def _leave() -> None:
    if MPI.Is_finalized():
        return
    watched = list(_WATCHED)
    # All are told before the first one is waited for: other ranks have them in another order.
    for departures in watched:
        departures._tell()
    for departures in watched:
        departures._finish()
