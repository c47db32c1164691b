"""The measurements by their names on the command line."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

from mpi4py import MPI

from apts_mpi.bench.checkpoint import checkpoint
from apts_mpi.bench.events import events
from apts_mpi.bench.iteration import iteration
from apts_mpi.bench.memory import memory
from apts_mpi.bench.pipeline import pipeline
from apts_mpi.tools.command import FAILED

MEASUREMENTS: dict[str, Callable[..., None]] = {
    "iteration": iteration,
    "checkpoint": checkpoint,
    "memory": memory,
    "pipeline": pipeline,
    "events": events,
}


def make_measurement(name: str, options: Mapping[str, Any]) -> None:
    """Make one of the `MEASUREMENTS`; an error ends all ranks. Collective."""
    try:
        MEASUREMENTS[name](**options)
    except Exception:
        # The other ranks wait for this one.
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(FAILED)
