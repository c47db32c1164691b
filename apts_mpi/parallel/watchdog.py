"""An end to every wait: a thread that ends the job when a rank waits for others, or stands still, for too long.

MPI libraries wait for ever for a host that the network no longer reaches. ``apts_mpi.parallel.stall`` finds out who
stands still where ranks give signs, but cannot leave a blocking call; this leaves everything, the process with it.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mpi4py import MPI

from apts_mpi.errors import WAIT_LIMIT
from apts_mpi.parallel.waiting import WAITING
from apts_mpi.tools.environment import end_after, host, pause
from apts_mpi.tools.status import FAILED

# Seconds for the launcher to print a message before the job ends; between rank 0, rank 1 and all others, as who is
# first ends the rest, so that there is one message; and for an end that waits for a network that is lost.
PRINTING, HEAD_START, ENDING = 0.5, 0.6, 1.5

# All of them together, and the share of the limit that they may take: by the limit every rank has ended.
RESERVE, SHARE = 4.0, 0.35

# Seconds between looks.
INTERVAL = 0.1

# Seconds in which a rank may do nothing with others, unless the user says otherwise: what it does alone, such as to
# read data, may take long.
ALONE_LIMIT = 3600.0

# Seconds after which a wait is in vain if another rank has left. Who is left behind by one that went ahead, such as out
# of the same broadcast, waits less.
LEFT_BEHIND = 3.0

# Calls of a standing process that are shown.
SHOWN = 12


class Watch:
    """In its block, ends the job when this rank waits for others, or does nothing with them, for too long.

    Parameters
    ----------
    world
        All ranks of the job.
    limit
        Seconds of either. None: `apts_mpi.errors.WAIT_LIMIT` to wait, and `ALONE_LIMIT` to do nothing with others.
    program
        What the message begins with.

    Attributes
    ----------
    commands : int
        Of the class: how many blocks this process is in.
    """

    commands = 0

    def __init__(self, world: MPI.Comm, limit: float | None, program: str = "apts_mpi.train") -> None:
        self._world = world
        self._limit = limit or WAIT_LIMIT
        self._alone = limit or ALONE_LIMIT
        self._program = program
        self._watched = threading.main_thread().ident
        self._left = threading.Event()
        # A daemon: the interpreter waits for other threads when it ends, also after an error.
        self._thread = threading.Thread(target=self._look, daemon=True)

    def start(self) -> None:
        """Watch to the end of the program."""
        WAITING.sign()
        self._thread.start()

    def extend(self, limit: float | None) -> None:
        """Let the limit be at least this one."""
        self._limit = max(self._limit, limit or WAIT_LIMIT)
        self._alone = max(self._alone, limit or ALONE_LIMIT)

    def __enter__(self) -> Watch:
        Watch.commands += 1
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()
        Watch.commands -= 1

    def _look(self) -> None:
        later = turn(self._world)
        while not self._left.wait(INTERVAL):
            patience = self._limit - min(RESERVE, SHARE * self._limit) + later
            waited, what = WAITING.longest()
            if waited > patience:
                self._end(
                    f"rank {self._world.rank} on {host()} has waited {waited:.1f} s for {what}; "
                    f"stall_timeout is {self._limit:g} s. Another rank, its host or the network stands still: look "
                    "there; if a rank only works that long, raise --stall-timeout"
                )
            if waited > LEFT_BEHIND + later and (departed := WAITING.departed()) is not None:
                self._end(f"rank {departed} has come to the end of its program while this one waits for {what}")
            if WAITING.silence() > self._alone + later:
                self._end(
                    f"rank {self._world.rank} on {host()} has done nothing with others for {self._alone:g} s; raise "
                    f"--stall-timeout if it only works that long. It stands in\n{self._place()}"
                )

    def _place(self) -> str:
        """Where the program is, as in a traceback."""
        frame = sys._current_frames().get(self._watched or 0)
        return "".join(traceback.format_stack(frame)[-SHOWN:])

    def _end(self, message: str) -> None:
        end_job(self._world, f"{self._program}: error: {message}")


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


@contextmanager
def exits_told(world: MPI.Comm) -> Iterator[None]:
    """Let ``os._exit`` in the block, of a user's code, end the job as a failure.

    A launcher takes a rank that leaves with status 0 for one that is done, and ends the others with that status.
    """
    system, own = os._exit, os.getpid()

    def leave(status: int) -> None:
        if os.getpid() == own:
            place = "".join(traceback.format_stack())
            end_job(world, f"apts_mpi.train: rank {world.rank} called os._exit({status}), which ends the run:\n{place}")
        system(status)

    os._exit = leave  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = system
