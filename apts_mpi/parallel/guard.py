"""Programs that use the library: an error on one rank, or a wait without end, ends the job with a message."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType

from mpi4py import MPI

from apts_mpi.errors import SharedFailure, SharedInvalidInput, StallError
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.watchdog import Watch, end_job, turn
from apts_mpi.tools.environment import pause
from apts_mpi.tools.events import Events

PROGRAM = "apts_mpi"

# Such as `sys.excepthook`.
ShowError = Callable[[type[BaseException], BaseException, TracebackType | None], object]


def guarded(comm: MPI.Intracomm | None, limit: float | None) -> Communicator:
    """Communicator of a solver, none of whose ranks is left waiting from now on. Collective.

    An exception that nobody catches ends all ranks, with its traceback; so does a wait for a rank whose program has
    come to its end, and one that lasts longer than ``limit``, of all solvers the longest. Where a command watches over
    the job, this is its matter.

    Parameters
    ----------
    comm
        Any intracommunicator; None is ``MPI.COMM_WORLD``.
    limit
        Seconds; see `apts_mpi.parallel.watchdog.Watch`.

    Raises
    ------
    InvalidInput
        For what is no intracommunicator.
    """
    comm = MPI.COMM_WORLD if comm is None else comm
    alone = comm == MPI.COMM_NULL or comm.size == 1
    if not (alone or Watch.commands):
        # Before the first collective, for which another rank may never come.
        _watch(limit)
    made = Communicator(comm, Events())
    if not (alone or Watch.commands):
        made.watch_departures()
    return made


def _watch(limit: float | None) -> None:
    if _WATCHES:
        _WATCHES[0].extend(limit)
        return
    _WATCHES.append(Watch(MPI.COMM_WORLD, limit, PROGRAM))
    _WATCHES[0].start()
    sys.excepthook = functools.partial(_end_after_error, sys.excepthook)


# That of this process, from its first solver on ranks to its end.
_WATCHES: list[Watch] = []


def _end_after_error(
    show: ShowError, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """What Python calls for an exception that nobody has caught."""
    world = MPI.COMM_WORLD
    if isinstance(error, (SharedInvalidInput, SharedFailure)):
        # All ranks have it, and end.
        if world.rank == 0:
            show(kind, error, trace)
        return
    if isinstance(error, StallError):
        # All ranks that wait know the same, at the same time.
        pause(turn(world))
    show(kind, error, trace)
    end_job(world, f"{PROGRAM}: error: rank {world.rank} failed as above and ends the job")
