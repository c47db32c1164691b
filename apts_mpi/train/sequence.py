"""A run through a sequence of tasks: each has its epochs, the stored samples of those before it, and the metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from apts_mpi.apts import APTS
from apts_mpi.checkpoint import Array, Checkpoint
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.objective.batch import Rows, Samples
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems import Problem, Task
from apts_mpi.result import State, StepResult
from apts_mpi.tools.schema import allow
from apts_mpi.train.baselines import BaselineResult
from apts_mpi.train.batches import Batches, to_device
from apts_mpi.train.metrics import Data
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.recovery import iterations_to_recover
from apts_mpi.train.replay import replayed, stored
from apts_mpi.train.training import Method, Training


def check_sequence(problem: Problem, options: TrainingOptions) -> None:
    """Refuse, before work starts, what a sequence of tasks, or a problem that is none, cannot have.

    Raises
    ------
    SharedInvalidInput
        Naming the option and a remedy.
    """
    metric, name = options.trust_region.metric, problem.name
    if not problem.tasks:
        if metric == "fisher":
            raise SharedInvalidInput(
                f"trust_region.metric: 'fisher' is that of earlier tasks, and problem {name} has none; choose "
                "identity, or a sequence of tasks such as --problem permuted-digits"
            )
        if options.replay:
            raise SharedInvalidInput(
                f"replay: {options.replay} is for earlier tasks, and problem {name} has none; give 0, or a sequence of "
                "tasks such as --problem permuted-digits"
            )
        return
    if options.layout == "staged":
        raise SharedInvalidInput(f"layout: 'staged' cannot train the tasks of {name}; choose --layout replicated")
    if metric == "fisher" and options.optimizer != "apts":
        raise SharedInvalidInput(
            f"trust_region.metric: 'fisher' is for optimizer apts, not {options.optimizer}; choose identity"
        )
    # A reason to end the run in its first task would leave out the others.
    for option in ("stop_on", "target_loss", "gradient_tolerance", "relative_gradient_tolerance"):
        value = getattr(options, option)
        if value is not None:
            raise SharedInvalidInput(f"{option}: {value!r} would end the run before the last task; leave it out")


class ReplayBatches(Batches):
    """Batches of the present task, joined by as many stored samples of earlier ones.

    Parameters
    ----------
    problem, options, device, comm
        See `apts_mpi.train.batches.Batches`.
    """

    def __init__(self, problem: Problem, options: TrainingOptions, device: torch.device, comm: Communicator) -> None:
        super().__init__(problem, options, device, comm)
        self.are_one = False
        self._tasks, self._replay, self._device = problem.tasks, options.replay, device

    def begin_task(self, number: int) -> None:
        """Have the samples of a task, and behind them the stored ones."""
        task = self._tasks[number]
        store = [stored(self._tasks[:number], self._replay, self._seed)] if number and self._replay else []
        joined = [torch.cat([own, *(part[place] for part in store)]) for place, own in enumerate(task.train)]
        self.replace((joined[0], joined[1]))

    def batch(self, epoch: int, number: int) -> tuple[Samples, Rows]:
        """See `apts_mpi.train.batches.Batches`."""
        samples, rows = super().batch(epoch, number)
        size = len(self.train[0]) - self.samples
        if size == 0:
            return samples, rows
        own = torch.arange(self.samples) if rows is None else rows.cpu()
        joining = self.samples + replayed(size, self.size, self._seed, epoch, number)
        return samples, torch.cat([own, joining]).to(self._device)


class SequenceTraining(Training):
    """A problem with tasks, see `apts_mpi.train.training.Training`.

    Parameters
    ----------
    problem, options, device, method
        As there; the epochs of the options are those of a task.

    Attributes
    ----------
    accuracies : list of list of float
        Of each task that has ended, the held-out accuracies of all tasks at its end.
    """

    def __init__(self, problem: Problem, options: TrainingOptions, device: torch.device, method: Method) -> None:
        epochs = options.epochs or problem.epochs
        super().__init__(problem, replace(options, epochs=epochs * len(problem.tasks)), device, method)
        self.cycle = epochs
        self._data: ReplayBatches = ReplayBatches(problem, options, device, self.comm)
        self._tasks = [
            Task(task.name, to_device(task.train, device), to_device(task.test, device)) for task in problem.tasks
        ]
        self._number = 0
        self.accuracies: list[list[float]] = []

    @property
    def train(self) -> Data:
        """Samples of the present task alone."""
        return self._tasks[self._number].train

    def _step(self) -> StepResult | BaselineResult:
        self._begin_task()
        return super()._step()

    def _begin_task(self) -> None:
        """Have the samples of the task that the present epoch is of; after the last one, still its."""
        number = min((self.progress.epoch - 1) // self.cycle, len(self._tasks) - 1)
        if number != self._number:
            self._number = number
            self._data.begin_task(number)
            self.test = self._tasks[number].test

    def _note(self, result: StepResult | BaselineResult) -> dict[str, Any]:
        values = super()._note(result)
        # A task that has nothing left to gain is not the end of the run.
        self.progress.at_rest = 0
        return values

    def _end_epoch(self, record: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        metrics = super()._end_epoch(record)
        if self.progress.batch == self.batches and self.progress.epoch % self.cycle == 0:
            self._end_task()
        return metrics

    def _end_task(self) -> None:
        """Measure all tasks, remember this one, and begin the next with a ball of its own. Collective."""
        self.accuracies.append(self._measure_tasks())
        if isinstance(self.solver, APTS):
            metric, state = self.solver.holding.inner.metric, self.solver.state
            if metric is not None:
                metric.remember(*self.train)
            counted = ("iteration", "functions", "accepted", "rejected", "skipped", "gradient_evaluations")
            first = State(radius=self.options.trust_region.initial_radius)
            self.solver.state = replace(first, **{name: getattr(state, name) for name in counted})

    def _measure_tasks(self) -> list[float]:
        return [self._metrics.measure(task.test, None)["train_accuracy"] for task in self._tasks]

    def save(self) -> tuple[list[Array], dict[str, Any]]:
        """See `Training.save`; the task follows from the epoch, and the stored samples from the seed."""
        arrays, metadata = super().save()
        return arrays, metadata | {"tasks": {"accuracies": self.accuracies}}

    def load(self, checkpoint: Checkpoint) -> list[str]:
        """See `Training.load`."""
        notices = super().load(checkpoint)
        saved, count = checkpoint.metadata.get("tasks", {"accuracies": []})["accuracies"], len(self._tasks)
        with self.comm.shared_errors():
            ended = (self.progress.epoch - 1) // self.cycle
            fits = len(saved) == ended and all(len(row) == count for row in saved)
            words = f"one for each of {ended} tasks that have ended, of {count} numbers each"
            allow(fits, f"{checkpoint.path}: tasks.accuracies", saved, words)
        self.accuracies = saved
        self._begin_task()
        return notices

    def summary(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """See `Training.summary`; with the accuracies of tasks after tasks, what was forgotten, and how it comes back.

        Collective.
        """
        learnt = [own[number] for number, own in enumerate(self.accuracies)]
        final = self.accuracies[-1] if self.accuracies else self._measure_tasks()
        recovery = self._recovery(learnt[:-1])
        table = {
            "tasks": [task.name for task in self._tasks],
            "accuracies": self.accuracies,
            "recovery": recovery,
        }
        scores: dict[str, Any] = {"mean_accuracy": sum(final) / len(final)}
        if len(learnt) > 1:
            lost = [before - after for before, after in zip(learnt[:-1], final, strict=False)]
            scores["forgetting"] = sum(lost) / len(lost)
            scores["mean_recovery"] = sum(recovery) / len(recovery)
        return super().summary(metrics) | scores | {"continual": table}

    def _recovery(self, learnt: Sequence[float]) -> list[int]:
        """Of each earlier task the iterations until it is back; all ranks do the same, and rank 0 has the word."""
        own = [
            iterations_to_recover(
                self.problem.network, self.problem.loss, task, accuracy, self.batch_size, self.options.seed
            )
            for task, accuracy in zip(self._tasks, learnt, strict=False)
        ]
        return [int(number) for number in self.comm.agree([*own, 0], lambda table: table[0])[:-1]]


def print_tasks(console: Console, summary: Mapping[str, Any]) -> None:
    """Print the accuracies of tasks (columns) after tasks (rows), where there are some."""
    found = summary.get("continual")
    if not found:
        return
    table = Table(title="held-out accuracy of each task after each task")
    table.add_column("after")
    for name in found["tasks"]:
        table.add_column(name, justify="right")
    for name, row in zip(found["tasks"], found["accuracies"], strict=False):
        table.add_row(name, *(f"{accuracy:.3f}" for accuracy in row))
    table.add_row("iterations to 95 %", *map(str, found["recovery"]))
    console.print(table)
