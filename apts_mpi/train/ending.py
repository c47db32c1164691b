"""When a run is at its end, as rank 0 finds by its limits and by what it watches."""

from __future__ import annotations

import math

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.progress import Progress, is_timed, share_of_time
from apts_mpi.train.stopping import Reason, Stopping

# What cuts a run off, and is no reason of the method's.
LIMITS = (Reason.LIMIT_EPOCHS, Reason.LIMIT_ITERATIONS, Reason.LIMIT_SECONDS)


class Ending:
    """Knows whether a run is at its end, and why; the same on all ranks.

    Parameters
    ----------
    options, epochs, batches
        Of the run: batches are those of an epoch.
    stopping
        What it watches.
    comm
        All ranks.

    Attributes
    ----------
    time_share : float
        Of the seconds that it may take, as of the last `look`.
    interrupted, diverged : bool
        Whether it was stopped, and whether its last training loss is not finite.
    """

    def __init__(
        self, options: TrainingOptions, epochs: int, batches: int, stopping: Stopping, comm: Communicator
    ) -> None:
        self._options = options
        self._epochs, self._batches = epochs, batches
        self._stopping = stopping
        self._comm = comm
        self._found: Reason | None = None
        self.time_share = 0.0
        self.interrupted = self.diverged = False

    def look(self, progress: Progress) -> None:
        """Tell all ranks how much of its seconds rank 0 has used, and whether a tolerance is met. Collective."""
        if is_timed(self._options) or self._stopping.is_asked:
            known = [None, *Reason]
            self.time_share, number = self._comm.decide(
                lambda: [share_of_time(self._options, progress), known.index(self._stopping.reason)]
            )
            self._found = known[int(number)]

    def due(self, progress: Progress) -> Reason | None:
        """Why there is nothing left to do; None where there is."""
        if self._found is not None:
            return self._found
        if progress.at_rest >= self._batches:
            return Reason.AT_REST
        if progress.epoch > self._epochs:
            return Reason.LIMIT_EPOCHS
        if progress.iteration >= (self._options.max_iterations or math.inf):
            return Reason.LIMIT_ITERATIONS
        return Reason.LIMIT_SECONDS if self.time_share >= 1.0 else None

    def reason(self, progress: Progress) -> Reason | None:
        """Why the run ended; None as long as it has not."""
        if self.interrupted:
            return Reason.INTERRUPTED
        reason = self.due(progress)
        return Reason.DIVERGED_LOSS if self.diverged and reason in LIMITS else reason
