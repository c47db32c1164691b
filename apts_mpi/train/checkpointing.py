"""When a training run saves itself, and when it stops before its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from apts_mpi.checkpoint import Array, CheckpointDirectory
from apts_mpi.errors import SharedFailure, SharedInvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.parts import Parts
from apts_mpi.tools.environment import seconds, since_start
from apts_mpi.tools.events import Events
from apts_mpi.tools.signals import StopSignals, name_of
from apts_mpi.train.consistency import check_shared
from apts_mpi.train.options import TrainingOptions, as_seconds
from apts_mpi.train.saved_history import history_array
from apts_mpi.train.stopping import Stopping

# Steps and saves may take that many times as long as the longest so far without being cut off by the wall time.
MARGIN = 2.0

# Why a run stops, beside the numbers of signals.
GO_ON, WALLTIME, FAILURE = 0, -1, -2


class SavedRun(Protocol):
    """What is to be known of a run that is saved: `apts_mpi.train.training.Training`."""

    comm: Communicator
    stopping: Stopping

    @property
    def iteration(self) -> int:
        """How far it is."""

    @property
    def events(self) -> Events:
        """Of the run."""

    def save(self) -> tuple[list[Array], dict[str, Any]]:
        """What a checkpoint holds of it. Collective."""

    def fingerprint(self) -> tuple[int, int, int]:
        """Checksums of what ranks share."""


class KeptRecords(Protocol):
    """What is to be known of the records of a run: `apts_mpi.train.run.Destinations`."""

    def history(self) -> bytes:
        """The records so far, on rank 0."""

    def failure(self) -> str:
        """On rank 0: what of those who take them has failed, in words; empty as long as nothing has."""


class Survival:
    """Decides after each iteration whether to save and whether to stop. Collective.

    Parameters
    ----------
    training
        The run.
    directory
        Where checkpoints go.
    options
        When.
    signals
        What asks the run to stop.
    metadata
        What to save beside the state: configuration, versions.
    records
        Where the records are.
    tell
        Shows a message, on rank 0.

    Attributes
    ----------
    stopped_by : str
        What stopped the run, in words; empty as long as nothing has.
    """

    def __init__(
        self,
        training: SavedRun,
        directory: CheckpointDirectory,
        options: TrainingOptions,
        signals: StopSignals,
        metadata: dict[str, Any],
        records: KeptRecords,
        tell: Callable[[str], None],
    ) -> None:
        self._training = training
        self._comm: Communicator = training.comm
        self._directory = directory
        self._options = options
        self._signals = signals
        self._metadata = metadata
        self._records = records
        self._tell = tell
        self._walltime = as_seconds(options.walltime) if options.walltime else None
        every = options.checkpoint_every
        self._iterations = every if isinstance(every, int) else None
        self._interval = as_seconds(every) if isinstance(every, str) else None
        self._last_step = self._last_save = seconds()
        self._longest_step = self._longest_save = 0.0
        self._saves = 0
        self._under_way = 0
        self.stopped_by = ""

    def boundary(self, done: bool) -> bool:
        """Save if it is time to; return whether to stop. Collective.

        Raises
        ------
        SharedFailure
            If the ranks no longer share one state, the last save of the run fails, or a logger has.
        """
        iteration = self._training.iteration
        save, best, reason = self._decide(done, iteration)
        watch = self._options.drift_check_every
        if save or (watch and iteration % watch == 0):
            check_shared(self._training.fingerprint(), iteration, self._comm)
        if save:
            with self._training.events.timed("checkpoint"):
                self._save(iteration, best, last=done or reason != GO_ON)
        self._last_step = seconds()
        if reason == FAILURE:
            failure = self._comm.agree_on_text(self._records.failure())
            raise SharedFailure(f"{failure}; the run is saved after iteration {iteration}, to go on with --resume")
        if reason == WALLTIME:
            self.stopped_by = "the wall time is nearly over"
        elif reason != GO_ON:
            self.stopped_by = f"{name_of(reason)} was received"
        return reason != GO_ON

    def _decide(self, done: bool, iteration: int) -> tuple[bool, bool, int]:
        """Whether to save, as the best or not, and why to stop; rank 0's clock and any rank's signal decide."""

        def decide(parts: Parts) -> list[float]:
            now = seconds()
            self._longest_step = max(self._longest_step, now - self._last_step)
            reason = int(parts.largest[0])
            if reason == GO_ON and self._walltime is not None:
                needed = MARGIN * (self._longest_step + self._longest_save)
                reason = WALLTIME if since_start() + needed > self._walltime else GO_ON
            if reason == GO_ON and self._records.failure():
                reason = FAILURE
            best = self._options.keep_best and self._training.stopping.improved
            due = self._iterations is not None and iteration % self._iterations == 0
            due = due or (self._interval is not None and now - self._last_save >= self._interval)
            # The first save tells how long the one at the end of the wall time will take.
            due = due or (self._walltime is not None and self._saves == 0)
            return [due or best or done or reason != GO_ON, best, reason]

        save, best, reason = self._comm.combine(Parts(largest=[self._signals.received]), decide)
        return bool(save), bool(best), int(reason)

    def _save(self, iteration: int, best: bool, last: bool) -> None:
        started = seconds()
        # What is wrong with the one before is told, and no reason to do without this one.
        self._tolerate(self._directory.finish, f"checkpoint {self._under_way} could not be saved")
        self._tolerate(self._directory.finish_removal, "old checkpoints could not be removed")
        try:
            arrays, metadata = self._training.save()
            arrays.append(history_array(self._records.history, self._comm))
            in_background = self._options.checkpoint_in_background and not last
            save = self._directory.start_save if in_background else self._directory.save
            save(arrays, metadata | self._metadata, iteration, best)
            self._under_way = iteration
        except SharedInvalidInput as error:
            if last:
                raise SharedFailure(f"the last checkpoint could not be saved: {error}") from error
            # The run is worth more than this checkpoint, and the ones before it are still there.
            self._tell(f"warning: checkpoint {iteration} could not be saved, training goes on: {error}")
        if last:
            self._tolerate(self._directory.finish_removal, "old checkpoints could not be removed")
        self._saves += 1
        self._last_save = seconds()
        self._longest_save = max(self._longest_save, self._last_save - started)

    def _tolerate(self, act: Callable[[], None], failed: str) -> None:
        """Do what training does not depend on, and tell if it fails. Collective."""
        try:
            act()
        except SharedInvalidInput as error:
            self._tell(f"warning: {failed}, training goes on: {error}")
