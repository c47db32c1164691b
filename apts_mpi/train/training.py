"""One training run: batches by seed, an optimizer, metrics once an epoch, records on rank 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from apts_mpi.apts import APTS
from apts_mpi.checkpoint import Array, Checkpoint
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems import Problem
from apts_mpi.result import StepResult
from apts_mpi.tools.environment import cpu_seconds
from apts_mpi.tools.events import OTHER, Events
from apts_mpi.tools.trees import Data, numbers_of_sample
from apts_mpi.train.average import Average, TensorArrays, restore_average
from apts_mpi.train.baselines import BaselineResult, DataParallel
from apts_mpi.train.batches import Batches, to_device
from apts_mpi.train.consistency import fingerprint
from apts_mpi.train.ending import Ending
from apts_mpi.train.identity import check_identity, identity
from apts_mpi.train.metrics import Metrics, Outputs
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.progress import Progress, check_metadata, check_progress, share_of_steps
from apts_mpi.train.rejection import Rejections
from apts_mpi.train.resampling import Resampling
from apts_mpi.train.stopping import Reason, Stopping

# A rejected batch is tried again in a smaller ball that often, then the next batch has its turn.
RETRIES = 3

# Takes what an iteration or an epoch did, and a message.
Record = Callable[[dict[str, Any]], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Method:
    """What trains a problem, and what depends on the part of the network that a rank holds.

    Attributes
    ----------
    solver : APTS or DataParallel
        Makes the steps.
    outputs : callable
        How samples come through the network, see `apts_mpi.train.metrics.Outputs`.
    arrays : callable
        Makes arrays of a checkpoint of named tensors of the network, of which this rank may hold a part. Collective.
    part : int
        Ranks with the same one share the tensors of their part of the network.
    places : str
        Where the parts are, for those who watch; empty where all ranks hold all.
    notes : sequence of str
        What of a new run is other than asked for, one sentence each; a resumed one has them from `Training.load`.
    """

    solver: APTS | DataParallel
    outputs: Outputs
    arrays: TensorArrays
    part: int = 0
    places: str = ""
    notes: Sequence[str] = ()


class Training:
    """A problem, a solver and their progress.

    Parameters
    ----------
    problem, options
        What to train and how.
    device
        Where the data belong.
    method
        The solver of the problem. Collective.

    Attributes
    ----------
    solver : APTS or DataParallel
        The solver.
    progress : Progress
        How far training has come.
    cycle : int
        Epochs after which radii and step sizes that go down begin anew.
    average : Average or None
        Of the iterates, where that is asked for.
    stopping : Stopping
        What may end the run before its limits.
    places, notes
        See `Method`.
    """

    def __init__(self, problem: Problem, options: TrainingOptions, device: torch.device, method: Method) -> None:
        self.problem = problem
        self.options = options
        self.test = None if problem.test is None else to_device(problem.test, device)
        self.epochs = self.cycle = options.epochs or problem.epochs
        self.solver = method.solver
        self.comm: Communicator = self.solver.comm
        self._data = Batches(problem, options, device, self.comm)
        self.samples, self.batch_size = self._data.samples, self._data.size
        self._resampling = Resampling(problem, options, self.comm)
        self.progress = Progress()
        self._check_batch()
        average = options.average
        self.average = None if average is None else Average(problem.network, average, method.arrays)
        self._metrics = Metrics(problem, self.comm, method.outputs, self.average)
        names = [] if options.stop_on is None else self._metrics.names(self.train, self.test)
        with self.comm.shared_errors():
            self.stopping = Stopping(options, self.batches, names)
        self._part = method.part
        self.places = method.places
        self.notes = method.notes
        self._resumed = False
        self._ending = Ending(options, self.epochs, self.batches, self.stopping, self.comm)
        self._last: StepResult | BaselineResult | None = None
        self._rejections = Rejections()

    def _check_batch(self) -> None:
        least, group = self.solver.smallest_batch, self.problem.group_size
        if self.batch_size % group or self.samples % group:
            raise SharedInvalidInput(
                f"batch_size: {self.batch_size} of {self.samples} samples are no whole numbers of groups of {group} "
                "(group_size); give a multiple of it"
            )
        if self.batch_size < least:
            raise SharedInvalidInput(
                f"batch_size: {self.batch_size} is too small for {self.comm.size} ranks with "
                f"{self.solver.subdomains} subdomains; give at least {least}, or fewer ranks or subdomains"
            )

    @property
    def iteration(self) -> int:
        """Steps so far."""
        return self.progress.iteration

    @property
    def events(self) -> Events:
        """Of the solver."""
        return self.solver.events

    @property
    def train(self) -> Data:
        """Inputs and targets of the training samples as they are now."""
        return self._data.train

    @property
    def batches(self) -> int:
        """Batches an epoch; samples that do not fill one are left out, others each epoch."""
        return self._data.count

    def run(
        self, record: Record, boundary: Callable[[bool], bool] = lambda done: False, tell: Tell = lambda text: None
    ) -> dict[str, Any] | None:
        """Train to the end and return the metrics, or None if stopped before. Collective.

        Parameters
        ----------
        record
            Called on every rank with one dictionary an iteration and one an epoch, the same on every rank up to
            the seconds.
        boundary
            Called on every rank after each iteration, and told whether it was the last one; true stops the run.
            Between the iterations `save` may be called.
        tell
            Called on every rank with a warning where steps keep being rejected, once until one is accepted.
        """
        self.solver.events.clear()
        with self.solver.events.timed(OTHER):
            return self._run(record, boundary, tell)

    def _run(self, record: Record, boundary: Callable[[bool], bool], tell: Tell) -> dict[str, Any] | None:
        metrics: dict[str, Any] | None = None
        progress = self.progress
        self._ending.interrupted = False
        self._ending.look(progress)
        while not self.done:
            self.problem.network.train()
            started = cpu_seconds()
            result = self._step()
            progress.cpu_seconds += cpu_seconds() - started
            record(self._note(result))
            if warning := self._rejections.note(result, progress.iteration):
                tell(warning)
            metrics = None
            if progress.batch == self.batches:
                metrics = self._end_epoch(record)
                self.stopping.see_epoch(progress.epoch, progress.iteration, metrics)
                progress.epoch += 1
                progress.batch = 0
            self._ending.look(progress)
            if boundary(self.done) and not self.done:
                self._ending.interrupted = True
                return None
        if metrics is None:
            # A run that its limit ends within an epoch, or that had nothing left to do.
            metrics = self._end_epoch(record) if progress.within_epoch else self.metrics()
        self._ending.diverged = not math.isfinite(metrics["train_loss"])
        return metrics

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self._ending.due(self.progress) is not None

    @property
    def reason(self) -> Reason | None:
        """Why the run ended, the same on all ranks; None as long as it has not."""
        return self._ending.reason(self.progress)

    def _step(self) -> StepResult | BaselineResult:
        """One iteration; with APTS the batch of the one before where that was rejected, or where all are one batch."""
        with self.solver.events.timed("data"):
            anew = self._resampling.renew(self._data, self.progress)
            batch, rows = self._data.batch(self.progress.epoch, self.progress.batch)
        share = max(share_of_steps(self.progress, self.cycle, self.batches) % 1.0, self._ending.time_share)
        if isinstance(self.solver, DataParallel):
            return self.solver.step(batch, rows, share)
        known = self.progress.tries > 0 or (self._data.are_one and self.progress.iteration > 0 and not anew)
        if known and self._resumed:
            self.solver.repeat(batch, rows)
        self._resumed = False
        return self.solver.step(None if known else batch, rows, share)

    def _note(self, result: StepResult | BaselineResult) -> dict[str, Any]:
        """Count an iteration, and say what it did."""
        self._last = result
        progress = self.progress
        progress.iteration += 1
        progress.gradient_evaluations += result.gradient_evaluations
        progress.seconds += result.seconds
        progress.accepted += result.accepted
        progress.skipped += result.skipped
        progress.rejected += not (result.accepted or result.skipped)
        progress.at_rest = progress.at_rest + 1 if result.at_rest else 0
        values: dict[str, Any] = {"iteration": progress.iteration, "epoch": progress.epoch}
        if isinstance(result, StepResult):
            values |= result.schwarz.record()
            if result.global_step is not None:
                values["global_step"] = result.global_step.record()
            if result.notes:
                values["notes"] = list(result.notes)
        else:
            values |= {"loss": result.loss, "gradient_norm": result.gradient_norm, "accepted": True}
        if self.average is not None and result.accepted:
            self.average.follow()
        progress.tries += 1
        if result.accepted or result.skipped or result.at_rest or progress.tries > RETRIES:
            progress.tries = 0
            progress.batch += 1
        self.stopping.see_iteration(values["gradient_norm"], progress.tries == 0)
        return values | self._totals()

    def _end_epoch(self, record: Record) -> dict[str, Any]:
        metrics = self.metrics()
        progress = self.progress
        record({"epoch": progress.epoch, "iteration": progress.iteration, **self._totals(), **metrics})
        return metrics

    def _totals(self) -> dict[str, float]:
        return {name: getattr(self.progress, name) for name in ("gradient_evaluations", "seconds", "cpu_seconds")}

    def save(self) -> tuple[list[Array], dict[str, Any]]:
        """What a checkpoint holds of the run: arrays, and metadata for JSON. Collective. See `apts_mpi.APTS.save`."""
        arrays, solver = self.solver.save()
        run = identity(self.problem, self.options, self.batch_size)
        metadata: dict[str, Any] = {"solver": solver, "progress": asdict(self.progress), "run": run}
        metadata |= self._resampling.metadata() | self._data.metadata()
        arrays = [*arrays, *self._resampling.arrays()]
        if self.stopping.is_asked:
            metadata["stopping"] = asdict(self.stopping.state)
        if self.average is not None:
            of_average, metadata["average"] = self.average.save()
            arrays = [*arrays, *of_average]
        return arrays, metadata

    def fingerprint(self) -> tuple[int, int, int]:
        """Checksums of what ranks share, see `apts_mpi.train.consistency`."""
        tensors, numbers = self.solver.shared()
        averaged = [] if self.average is None else self.average.tensors.values()
        return fingerprint([*tensors, *averaged], numbers, part=self._part)

    def load(self, checkpoint: Checkpoint) -> list[str]:
        """Go on where a checkpoint was saved; return what could not be taken over, one sentence each. Collective.

        Raises
        ------
        SharedInvalidInput
            If the checkpoint is not one of such a run, naming the first difference.
        """
        with self.comm.shared_errors():
            saved = check_metadata(checkpoint)
            check_identity(identity(self.problem, self.options, self.batch_size), saved["run"], checkpoint)
            check_progress(saved["progress"], self.batches, RETRIES, checkpoint)
            if self.average is not None and "average" in saved:
                self.average.check(checkpoint)
        self._resampling.load(checkpoint, self._data)
        notices = self.solver.load(checkpoint, checkpoint.metadata["solver"])
        averaged = restore_average(self.average, checkpoint, saved.get("average"))
        self._data.go_on(saved.get("data", []))
        self.progress, self._resumed = saved["progress"], True
        return [*notices, *averaged, *self.stopping.restore(saved.get("stopping"))]

    def metrics(self) -> dict[str, Any]:
        """Losses and accuracies on all samples, the network in evaluation mode. Collective."""
        with self.solver.events.timed("metrics"):
            if isinstance(self.solver, DataParallel):
                self.solver.to_evaluated_point()
            return self._metrics.measure(self.train, self.test)

    def warning(self) -> str:
        """Why the run is no success, in a sentence; empty where nothing is known against it."""
        progress, last = self.progress, self._last
        if isinstance(last, BaselineResult):
            return "" if math.isfinite(last.loss) else "the loss is not finite; give a smaller --learning-rate"
        if progress.accepted or not (progress.rejected or progress.skipped):
            return ""
        return "no step was accepted" + ("" if last is None else f": {last.reason}")

    def summary(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What the run came to. Collective."""
        own = [self.solver.events.totals[name].seconds for name in ("wait", "checkpoint")]
        # Ranks that do not need the targets have none in their place.
        own.append(numbers_of_sample(self.train[1]))
        communication, checkpoints, targets = self.comm.agree(own, lambda table: table.max(axis=0))
        return {
            "problem": self.problem.name,
            "optimizer": self.options.optimizer,
            "reason": self.reason and self.reason.value,
            "ranks": self.comm.size,
            "subdomains": self.solver.subdomains,
            "batch_size": self.batch_size,
            "targets_per_sample": int(targets),
            "parameters": self.solver.parameters,
            "epochs": self.progress.epoch - (not self.progress.within_epoch),
            "iterations": self.progress.iteration,
            **metrics,
            **self.stopping.summary(),
            "accepted_steps": self.progress.accepted,
            "rejected_steps": self.progress.rejected,
            "skipped_steps": self.progress.skipped,
            **self._totals(),
            "seconds_in_communication": communication,
            "seconds_in_checkpoints": checkpoints,
        }
