"""The training command on all ranks: from its arguments to its exit status."""

from __future__ import annotations

import contextlib
import io
import sys
import traceback
from collections.abc import Callable, Sequence

from mpi4py import MPI
from rich.console import Console

from apts_mpi.errors import InvalidInput, SharedFailure, SharedInvalidInput, StallError
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.launcher import check_launcher
from apts_mpi.parallel.watchdog import Watch, end_job, exits_told, turn
from apts_mpi.tools import environment
from apts_mpi.tools.events import Events
from apts_mpi.tools.status import FAILED, USAGE
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.parser import parse
from apts_mpi.train.sharing import check_same_options

# What is to be done with the arguments, their options and configuration, the ranks and a console: see
# `apts_mpi.train.run.run`.
RunFunction = Callable[[Sequence[str], TrainingOptions, str, Communicator, MPI.Intracomm, Console], int]


def carry_out(arguments: Sequence[str], run: RunFunction) -> int:
    """Train, and return the exit status; an error that the ranks do not share ends all of them. Collective."""
    world = MPI.COMM_WORLD
    check_launcher(world)
    try:
        return train(arguments, run, world)
    except (SharedInvalidInput, SharedFailure) as error:
        if world.rank == 0:
            print(f"apts_mpi.train: error: {error}", file=sys.stderr, flush=True)
        return USAGE if isinstance(error, SharedInvalidInput) else FAILED
    except SystemExit:
        # After --help, of all ranks.
        raise
    except BaseException as error:
        # The other ranks are waiting for this one, or soon will be: end them all.
        if isinstance(error, StallError):
            # All ranks that wait know the same, at the same time.
            environment.pause(turn(world))
            end_job(world, f"apts_mpi.train: error: {error}")
        told = str(error) if isinstance(error, InvalidInput) else traceback.format_exc()
        end_job(world, f"apts_mpi.train: rank {world.rank} failed and ends the run:\n{told}")
        return FAILED


def train(arguments: Sequence[str], run: RunFunction, world: MPI.Intracomm) -> int:
    """Parse, and run within the time that a rank may wait for others; return the exit status. Collective.

    Raises
    ------
    SharedInvalidInput
        On every rank, before any work, for input that cannot be used.
    SharedFailure
        On every rank, for what went wrong later.
    """
    comm = Communicator(world, Events())
    console = Console(quiet=comm.rank != 0)
    # --help and --print_config print and exit, on every rank.
    quiet = contextlib.nullcontext() if comm.rank == 0 else contextlib.redirect_stdout(io.StringIO())
    with comm.shared_errors(), quiet:
        options, config = parse(arguments)
    check_same_options(options, comm)
    with Watch(world, options.stall_timeout), exits_told(world):
        try:
            return run(arguments, options, config, comm, world, console)
        except SystemExit as error:
            raise RuntimeError("sys.exit was called, which does not end a run on several ranks") from error
