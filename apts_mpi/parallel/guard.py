"""Programs that use the library: an error on one rank, or a wait without end, ends the job with a message."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType

from apts_mpi.errors import SharedFailure, SharedInvalidInput, StallError
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.watchdog import Watch, end_job, turn
from apts_mpi.tools.environment import pause

PROGRAM = "apts_mpi"

# Such as `sys.excepthook`.
ShowError = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def guard(comm: Communicator, limit: float | None) -> None:
    """Let no rank of a solver be left waiting, from now on, unless a command watches over the job already.

    An exception that nobody catches ends all ranks, with its traceback; so does a wait for a rank whose program has
    come to its end, and one that lasts longer than ``limit``, of all solvers the longest.

    Parameters
    ----------
    comm
        The ranks.
    limit
        Seconds; see `apts_mpi.parallel.watchdog.Watch`.
    """
    if comm.size == 1 or Watch.commands:
        return
    comm.watch_departures()
    if _WATCHES:
        _WATCHES[0].extend(limit)
        return
    _WATCHES.append(Watch(comm.mpi, limit, PROGRAM))
    _WATCHES[0].start()
    sys.excepthook = functools.partial(_end_after_error, sys.excepthook, comm)


# That of this process, from its first solver on ranks to its end.
_WATCHES: list[Watch] = []


def _end_after_error(
    show: ShowError, comm: Communicator, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What Python calls for an exception that nobody has caught."""
    if isinstance(error, (SharedInvalidInput, SharedFailure)):
        # All ranks have it, and end.
        if comm.rank == 0:
            show(kind, error, trace)
        return
    if isinstance(error, StallError):
        # All ranks that wait know the same, at the same time.
        pause(turn(comm.mpi))
    show(kind, error, trace)
    end_job(comm.mpi, f"{PROGRAM}: error: rank {comm.rank} failed as above and ends the job")
