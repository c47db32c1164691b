"""What a run through a sequence of tasks may be asked for, its batches, and the table of what it came to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from apts_mpi.errors import SharedInvalidInput
from apts_mpi.objective.batch import Rows, Samples
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems import Problem
from apts_mpi.train.batches import Batches
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.replay import replayed, stored


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
