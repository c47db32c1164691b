"""An end to every wait for other ranks: a thread that ends the job when one takes too long.

MPI libraries wait for ever for a host that the network no longer reaches. ``apts_mpi.parallel.stall`` finds out who
stands still where ranks give signs, but cannot leave a blocking call; this leaves everything, the process with it.
"""

from __future__ import annotations

import sys
import threading

from mpi4py import MPI

from apts_mpi.parallel.nonblocking import WAITING
from apts_mpi.tools.command import FAILED
from apts_mpi.tools.environment import end_after, host, pause

# Seconds for the launcher to print a message before the job ends; between rank 0, rank 1 and all others, as who is
# first ends the rest, so that there is one message; and for an end that waits for a network that is lost.
PRINTING, HEAD_START, ENDING = 0.5, 0.6, 1.5

# All of them together, and the share of the limit that they may take: by the limit every rank has ended.
RESERVE, SHARE = 4.0, 0.35

# Seconds between looks.
INTERVAL = 0.1


class Watch:
    """In its block, ends the job when this rank waits for others longer than ``limit`` seconds.

    Parameters
    ----------
    world
        All ranks of the job.
    limit
        In seconds.
    """

    def __init__(self, world: MPI.Comm, limit: float) -> None:
        self._world = world
        self._limit = limit
        self._left = threading.Event()
        # A daemon: the interpreter waits for other threads when it ends, also after an error.
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def _look(self) -> None:
        patience = self._limit - min(RESERVE, SHARE * self._limit) + turn(self._world)
        while not self._left.wait(INTERVAL):
            waited, what = WAITING.longest()
            if waited > patience:
                end_job(
                    self._world,
                    f"apts_mpi.train: error: rank {self._world.rank} on {host()} has waited {waited:.1f} s for {what}; "
                    f"stall_timeout is {self._limit:g} s. Another rank, its host or the network stands still: look "
                    "there; if a rank only works that long, raise --stall-timeout",
                )


def turn(world: MPI.Comm) -> float:
    """Seconds that this rank lets others go first when it is to say what all know."""
    return HEAD_START * min(world.rank, 2)


def end_job(world: MPI.Comm, message: str) -> None:
    """Print ``message`` and end all ranks, this one also where MPI reaches no other. Does not return."""
    print(message, file=sys.stderr, flush=True)
    # mpirun drops what it has not read when it ends the job: tracebacks came out without their end.
    pause(PRINTING)
    end_after(ENDING)
    world.Abort(FAILED)
    # Abort may return before the end, and what a process does at its exit may wait for the others.
    pause(2 * ENDING)
