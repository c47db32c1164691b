"""How far a run has come, and what else its checkpoints say of it beside the solver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from apts_mpi.checkpoint.format import Checkpoint
from apts_mpi.errors import InvalidInput
from apts_mpi.tools.environment import seconds
from apts_mpi.tools.schema import allow, anything, instance, mapping, number, record, sequence, text, whole
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.stopping import CHECK_WATCHED


@dataclass
class Progress:
    """How far a run has come.

    Attributes
    ----------
    epoch : int
        The present one, from 1.
    batch : int
        Batches of it that are done with.
    tries : int
        Steps on the next batch that were rejected.
    iteration, accepted, rejected, skipped : int
        Steps so far.
    at_rest : int
        Batches in a row, up to now, that had nothing left to gain.
    gradient_evaluations, seconds, cpu_seconds : float
        Of the steps; metrics are not counted. The last are those of this rank's processors.
    """

    epoch: int = 1
    batch: int = 0
    tries: int = 0
    iteration: int = 0
    accepted: int = 0
    rejected: int = 0
    skipped: int = 0
    at_rest: int = 0
    gradient_evaluations: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def within_epoch(self) -> bool:
        """Whether the present epoch has begun."""
        return self.batch > 0 or self.tries > 0


def is_timed(options: TrainingOptions) -> bool:
    """Whether seconds end a run."""
    return options.max_seconds is not None or options.max_cpu_seconds is not None


def share_of_time(options: TrainingOptions, progress: Progress) -> float:
    """Share of the seconds that a run may take; 0 without a limit, and 1 or more at its end. Of this rank's clocks."""
    limits = ((options.max_seconds, progress.seconds), (options.max_cpu_seconds, progress.cpu_seconds))
    return max((used / limit for limit, used in limits if limit is not None), default=0.0)


def share_of_steps(progress: Progress, epochs: int, batches: int) -> float:
    """Share of the batches of a run that are behind it.

    A limit of iterations does not count: it cuts a run off, which may go on with another one to the same end.
    """
    return ((progress.epoch - 1) * batches + progress.batch) / (epochs * batches)


def shares_of_limits(options: TrainingOptions, progress: Progress, epochs: int, batches: int) -> tuple[float, ...]:
    """Of each limit of a run the share that is behind it: its epochs, iterations and seconds; 0 without a limit."""
    iterations = 0.0 if options.max_iterations is None else progress.iteration / options.max_iterations
    return share_of_steps(progress, epochs, batches), iterations, share_of_time(options, progress)


class Pace:
    """How much of a run is done, and how long the rest will take if it goes on as it has gone so far.

    What ends a run before its limits is not foreseen.

    Parameters
    ----------
    shares
        Gives the present shares of all limits, see `shares_of_limits`. The run ends with the first that comes to 1.
    """

    def __init__(self, shares: Callable[[], Sequence[float]]) -> None:
        self._shares = shares
        self._first = shares()
        self._started = seconds()

    def share(self) -> float:
        """What is done, from 0 to 1."""
        return min(max(self._shares()), 1.0)

    def seconds_left(self) -> float | None:
        """Seconds to the end on the clock, whatever the limits count; None as long as nothing is done."""
        elapsed = seconds() - self._started
        pairs = zip(self._first, self._shares(), strict=True)
        times = [elapsed * (1.0 - now) / (now - first) for first, now in pairs if now > first]
        return max(min(times), 0.0) if times else None


# What a run has to share with one that it goes on with.
_IDENTITY = record(
    {
        **dict.fromkeys(("problem", "optimizer", "dtype"), text),
        **dict.fromkeys(("seed", "train_samples", "batch_size"), whole()),
    }
)


def _solver(value: Any, place: str) -> dict[str, Any]:
    """Of any solver, which knows the rest; how many subdomains there are is asked before there is one."""
    solver: dict[str, Any] = mapping()(value, place)
    sequence(anything)(solver.get("subdomains", []), f"{place}.subdomains")
    return solver


_POSITIONS = sequence(record(dict.fromkeys(("shard", "seed", "epoch", "read"), whole()) | {"state": anything}))

_METADATA = record(
    {
        "solver": _solver,
        "progress": instance(
            Progress,
            later=("skipped", "at_rest", "cpu_seconds"),
            epoch=whole(1),
            gradient_evaluations=number(0.0),
            seconds=number(0.0),
            cpu_seconds=number(0.0),
        ),
        "run": _IDENTITY,
    },
    {
        **{"configuration": text, "versions": mapping()},
        **{"data": _POSITIONS, "average": record({"steps": whole()}), "stopping": CHECK_WATCHED},
        "tasks": record({"accuracies": sequence(sequence(number(0.0, 1.0)))}),
        "resampling": record({"number": whole(1), "checksum": whole()}),
    },
)


def check_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The metadata of a run's checkpoint, with a `Progress`; all is known to be what a run saves but the solver's own.

    Raises
    ------
    InvalidInput
        Naming the first difference.
    """
    if "run" not in checkpoint.metadata:
        raise InvalidInput(f"resume: {checkpoint.path} was not saved by a training run; give one that was")
    checked: dict[str, Any] = _METADATA(checkpoint.metadata, f"{checkpoint.path}:")
    return checked


def check_progress(progress: Progress, batches: int, retries: int, checkpoint: Checkpoint) -> None:
    """Raise `InvalidInput` for a place that is none in a run with so many batches an epoch and tries on each."""
    place = f"{checkpoint.path}: progress"
    allow(progress.batch < batches, f"{place}.batch", progress.batch, f"below {batches}, the batches of an epoch")
    allow(progress.tries <= retries, f"{place}.tries", progress.tries, f"at most {retries}")
