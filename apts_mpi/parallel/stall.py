"""Waiting for other ranks that comes to an end: after a time without a sign from one of them, all raise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from mpi4py import MPI

from apts_mpi.errors import StallError
from apts_mpi.parallel.waiting import WAITING
from apts_mpi.tools.environment import pause, seconds

# Of the notes that ranks send each other; messages of the pipeline have lower ones.
TAG = 1000

WAITS, WORKS = 1, 0

# When a rank tells the others that it waits, when it takes those that did not tell for stalled, and how often a rank
# that works gives a sign; of the timeout.
TELL, GIVE_UP, SIGN = 0.5, 0.9, 0.1

# A message between neighbours takes some microseconds; a rank that spins longer takes a core from those that compute.
EAGER_POLLS, NAP = 50, 2e-5


class Patience:
    """Waits with a time limit, and finds out for whom.

    When one rank stands still, soon all others wait, most of them for a rank that waits itself. So a rank that has
    waited for half of the limit tells all others; at its end the ranks that did not tell are those that stand still.
    A rank that works tells so as well, as often as it comes to `sign`, and the others then wait on.

    Parameters
    ----------
    comm
        The ranks; only these notes may go from rank to rank with `TAG`.
    timeout
        The limit in seconds.
    places
        Names of the ranks, for messages.
    """

    def __init__(self, comm: MPI.Intracomm, timeout: float, places: Sequence[str]) -> None:
        self._comm = comm
        self._timeout = timeout
        self._places = places
        self._waiting = [False] * comm.size
        self._sent: list[MPI.Request] = []
        self._heard = self._signed = seconds()

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Return when ``done()`` is true.

        Parameters
        ----------
        done
            Looks and lets MPI move data.
        what
            What is waited for, for the message.

        Raises
        ------
        StallError
            After the limit, naming the ranks that stand still.
        """
        polls, told = 0, False
        started = seconds()
        while not done():
            polls += 1
            if polls <= EAGER_POLLS:
                continue
            self._listen()
            waited = seconds() - max(started, self._heard)
            if waited > TELL * self._timeout and not told:
                self._tell(WAITS)
                told = True
            if waited > GIVE_UP * self._timeout:
                raise StallError(self._verdict(what))
            pause(NAP)
        WAITING.sign()
        if told:
            self._tell(WORKS)

    def sign(self) -> None:
        """Let the others know, now and then, that this rank works; to be called while it does."""
        WAITING.sign()
        if seconds() - self._signed > SIGN * self._timeout:
            self._listen()
            self._tell(WORKS)

    def _tell(self, note: int) -> None:
        self._signed = seconds()
        self._sent = [request for request in self._sent if not request.Test()]
        content = np.array([note], dtype=np.uint8)
        others = [rank for rank in range(self._comm.size) if rank != self._comm.rank]
        self._sent += [self._comm.Isend(content, rank, TAG) for rank in others]

    def _listen(self) -> None:
        status, content = MPI.Status(), np.empty(1, dtype=np.uint8)
        while self._comm.Iprobe(MPI.ANY_SOURCE, TAG, status):
            source = status.Get_source()
            self._comm.Recv(content, source, TAG)
            self._waiting[source] = content[0] == WAITS
            if content[0] == WORKS:
                self._heard = seconds()

    def _verdict(self, what: str) -> str:
        self._listen()
        own = self._comm.rank
        silent = [self._places[rank] for rank, waits in enumerate(self._waiting) if not waits and rank != own]
        told = f"{self._places[own]} has waited for {what}; stall_timeout is {self._timeout:g} s"
        if not silent:
            return f"all ranks wait for each other: {told}"
        return (
            f"no sign of {', '.join(silent)}: {told}. Look what it does there; if it only computes that long, raise "
            "--stall-timeout"
        )
