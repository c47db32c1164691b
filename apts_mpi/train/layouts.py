"""The problem of a run and its solver in either layout: each rank holds the network, or a stage of it.

A rank with a stage reads the data that its stage needs. A sequence of tasks has a run of its own kind.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from mpi4py import MPI

from apts_mpi.apts import APTS
from apts_mpi.checkpoint import Array, Checkpoint
from apts_mpi.data import Half
from apts_mpi.errors import InvalidInput
from apts_mpi.network.segments import segments_of
from apts_mpi.network.teams import Teams
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems import ALL, Parts, Problem, Task, Wanted, build, read_parts
from apts_mpi.result import State, StepResult
from apts_mpi.staged.build import build_stage
from apts_mpi.staged.micro_batches import placeholder
from apts_mpi.staged.solver import StagedAPTS
from apts_mpi.state.tensors import replicated_arrays
from apts_mpi.tools.events import Events
from apts_mpi.tools.schema import allow
from apts_mpi.tools.trees import Data, Tree, count_samples, first_sample, take, tensors_of
from apts_mpi.train.baselines import BaselineResult, DataParallel
from apts_mpi.train.batches import to_device
from apts_mpi.train.metrics import Consume, edges_of, piece_of, whole_outputs
from apts_mpi.train.noise import with_noise
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.recovery import iterations_to_recover
from apts_mpi.train.sequence import ReplayBatches, check_sequence
from apts_mpi.train.sharing import check_same_problem
from apts_mpi.train.training import Method, Training


def make_training(options: TrainingOptions, device: torch.device, comm: Communicator, world: MPI.Intracomm) -> Training:
    """The run that the options describe. Collective.

    Parameters
    ----------
    options
        Of the run.
    device
        Of this rank.
    comm, world
        All ranks, for what is no part of the training and for the training.
    """
    make = functools.partial(
        build,
        options.problem,
        data_dir=options.data_dir,
        train_samples=options.train_samples,
        seed=options.seed,
        dtype=getattr(torch, options.dtype),
        arguments=options.arguments("problem_args"),
        parts=Parts(options.network, options.loss, options.arguments("network_args")),
    )
    with comm.shared_errors():
        problem = make() if options.layout == "replicated" else None
    if problem is None:
        problem = build_staged_problem(make, options, world)
    else:
        check_same_problem(problem, ALL, comm)
    return train_problem(problem, options, device, world)


def train_problem(problem: Problem, options: TrainingOptions, device: torch.device, world: MPI.Intracomm) -> Training:
    """The run that the options describe, on a problem that is there. Collective."""
    check_sequence(problem, options)
    problem.network.to(device)
    options = with_noise(options, problem)
    make_method = staged_method if options.layout == "staged" else replicated_method
    make = SequenceTraining if problem.tasks else Training
    return make(problem, options, device, make_method(problem, options, world))


def replicated_method(problem: Problem, options: TrainingOptions, world: MPI.Intracomm) -> Method:
    """The solver of a problem whose network every rank has as a whole. Collective."""
    network, loss, forward = problem.network, problem.loss, problem.forward
    solver_options = with_groups(options, problem)
    called = torch.nn.Sequential(*segments_of(network, forward))
    if options.optimizer == "apts":
        apts = APTS(network, loss, comm=world, options=solver_options, forward=forward)
        arrays = functools.partial(replicated_arrays, comm=apts.comm)
        outputs = whole_outputs(called, apts.comm, solver_options.group, lambda: apts.holding.most)
        return Method(apts, outputs, arrays)
    baseline = replace(options.baseline_options(), group=solver_options.group, most=solver_options.most)
    other = DataParallel(network, loss, comm=world, options=baseline, forward=forward)
    arrays = functools.partial(replicated_arrays, comm=other.comm)
    outputs = whole_outputs(called, other.comm, solver_options.group, lambda: other.micro_batches.most)
    return Method(other, outputs, arrays, notes=other.notes)


def with_groups(options: TrainingOptions, problem: Problem) -> APTSOptions:
    """The options of the solver, with what the problem says of samples that its loss takes together."""
    return replace(options.solver_options(), group_size=problem.group_size, coupled=problem.coupled)


def build_staged_problem(make: Callable[..., Problem], options: TrainingOptions, world: MPI.Intracomm) -> Problem:
    """A problem of whose network this rank has its stage alone in memory, and of whose data what the stage needs.

    Inputs are on the first stage, targets on the last; of the rest there are placeholders of the right number.
    Collective.

    Parameters
    ----------
    make
        Makes the problem; takes ``wanted``, see `apts_mpi.problems.Wanted`.
    options
        Of the run.
    world
        All ranks.

    Raises
    ------
    SharedInvalidInput
        If it is called for more than its outputs, or cannot be cut.
    """

    def parts(problem: Problem) -> tuple[torch.nn.Module, Tree]:
        if problem.forward is not None or problem.metrics:
            raise InvalidInput(
                f"layout: 'staged' needs a network that is called for its outputs alone, and problem {problem.name} "
                "needs more; choose --layout replicated"
            )
        return problem.network, problem.train[0]

    comm = Communicator(world, Events())
    with comm.shared_errors():
        teams = Teams(comm.size, max(comm.size // options.replicas, 1), options.replicas)
        stage = teams.team_of(comm.rank)
        wanted = Wanted(inputs=stage == 0, targets=stage == teams.count - 1)
    make = functools.partial(make, wanted=wanted)
    problem = build_stage(make, comm=world, options=options.solver_options(), parts=parts)
    check_same_problem(problem, read_parts(options.problem, wanted), comm)
    return _without_what_others_have(problem, wanted, comm)


def _without_what_others_have(problem: Problem, wanted: Wanted, comm: Communicator) -> Problem:
    """The problem with the data that are wanted here alone, and the numbers of samples of all. Collective."""
    data = {"train": problem.train} | ({} if problem.test is None else {"test": problem.test})
    found = comm.collect({name: count_samples(inputs) for name, (inputs, _) in data.items()})
    with comm.shared_errors():
        for name in data:
            if found[0][name] != found[-1][name]:
                raise InvalidInput(
                    f"problem: {problem.name} has {found[0][name]} inputs but {found[-1][name]} targets in its {name} "
                    "samples; take both from the same data set"
                )
    own: dict[str, Any] = {name: _of_stage(data[name], wanted, found[0][name]) for name in data}
    return replace(problem, **own)


def _of_stage(data: Data, wanted: Wanted, count: int) -> Data:
    inputs, targets = data
    return (
        inputs if wanted.inputs else placeholder(count, 0),
        targets if wanted.targets else placeholder(count, 0).to(tensors_of(first_sample(targets))[0].dtype),
    )


def staged_method(problem: Problem, options: TrainingOptions, world: MPI.Intracomm) -> Method:
    """The solver of a problem of which this rank has its stage, whose replicas share its tensors. Collective."""
    solver = StagedAPTS(
        problem.network, problem.loss, comm=world, options=with_groups(options, problem), sample=problem.train[0]
    )
    outputs = functools.partial(_staged_outputs, solver)
    held = solver.holding
    arrays = functools.partial(held.arrays, vectors={})
    return Method(solver, outputs, arrays, held.replica.rank, "\n".join(held.processes), held.notes)


def _staged_outputs(solver: StagedAPTS, data: Data, consume: Consume) -> None:
    """See `apts_mpi.train.metrics.Outputs`: the last stage has them."""
    held = solver.options, solver.holding.decomposition.team.rank
    # The stages have one half of the samples each, and the same pieces.
    (size,) = solver.comm.agree([piece_of(data, solver.holding.most)], lambda table: [table.min()])
    edges = edges_of(count_samples(data[0]), held[0].replicas, held[1], held[0].group, int(size))
    ranges = list(itertools.pairwise(edges))
    inputs, targets = data
    entering = [inputs.range(*each) if isinstance(inputs, Half) else take(inputs, slice(*each)) for each in ranges]
    solver.infer(entering, lambda index, outputs: consume(outputs, take(targets, slice(*ranges[index]))))


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
