"""How much of a run is behind it, by which it ends and schedules go."""

from __future__ import annotations

from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.progress import Progress


def share_of_time(options: TrainingOptions, progress: Progress) -> float:
    """Share of the seconds that a run may take; 0 without a limit, and 1 or more at its end. Of this rank's clocks."""
    limits = ((options.max_seconds, progress.seconds), (options.max_cpu_seconds, progress.cpu_seconds))
    return max((used / limit for limit, used in limits if limit is not None), default=0.0)


def share_of_steps(options: TrainingOptions, progress: Progress, epochs: int, batches: int) -> float:
    """Share of the batches of a run that are behind it, or of its iterations where there is a limit of them."""
    share = ((progress.epoch - 1) * batches + progress.batch) / (epochs * batches)
    limit = options.max_iterations
    return share if limit is None else max(share, progress.iteration / limit)
