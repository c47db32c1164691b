"""A training run of which each rank holds a stage of the network, and reads the data that its stage needs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from mpi4py import MPI

from apts_mpi.errors import InvalidInput
from apts_mpi.network.partition import split
from apts_mpi.network.teams import Teams
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems import Problem, Wanted
from apts_mpi.staged.build import build_stage
from apts_mpi.staged.micro_batches import placeholder
from apts_mpi.staged.solver import StagedAPTS
from apts_mpi.tools.events import Events
from apts_mpi.train.consistency import fingerprint
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.training import METRIC_SAMPLES, Batch, Training, added


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

    def parts(problem: Problem) -> tuple[torch.nn.Module, torch.Tensor]:
        if problem.forward is not None or problem.metrics:
            raise InvalidInput(
                f"layout: 'staged' needs a network that is called for its outputs alone, and problem {problem.name} "
                "needs more; choose --layout replicated"
            )
        return problem.network, problem.train[0]

    comm = Communicator(world, Events())
    with comm.shared_errors():
        layout = Teams(comm.size, max(comm.size // options.replicas, 1), options.replicas)
        stage = layout.team_of(comm.rank)
        wanted = Wanted(inputs=stage == 0, targets=stage == layout.count - 1)
    make = functools.partial(make, wanted=wanted)
    problem = build_stage(make, comm=world, options=options.solver_options(), parts=parts)
    return _without_what_others_have(problem, wanted, comm)


def _without_what_others_have(problem: Problem, wanted: Wanted, comm: Communicator) -> Problem:
    """The problem with the data that are wanted here alone, and the numbers of samples of all. Collective."""
    data = {"train": problem.train} | ({} if problem.test is None else {"test": problem.test})
    found = comm.collect({name: len(inputs) for name, (inputs, _) in data.items()})
    with comm.shared_errors():
        for name in data:
            if found[0][name] != found[-1][name]:
                raise InvalidInput(
                    f"problem: {problem.name} has {found[0][name]} inputs but {found[-1][name]} targets in its {name} "
                    "samples; take both from the same data set"
                )
    own: dict[str, Any] = {name: _of_stage(data[name], wanted, found[0][name]) for name in data}
    return replace(problem, **own)


def _of_stage(data: Batch, wanted: Wanted, count: int) -> Batch:
    inputs, targets = data
    return (
        inputs if wanted.inputs else placeholder(count, 0),
        targets if wanted.targets else placeholder(count, 0).to(targets.dtype),
    )


class StagedTraining(Training):
    """`Training` with a `StagedAPTS`: the same records, the same checkpoints."""

    solver: StagedAPTS

    def _make_solver(self, comm: MPI.Intracomm) -> StagedAPTS:
        return StagedAPTS(
            self.problem.network,
            self.problem.loss,
            comm=comm,
            options=self.options.solver_options(),
            sample=self.problem.train[0],
        )

    def fingerprint(self) -> tuple[int, int, int]:
        """See `Training`: the replicas of a stage share its tensors."""
        return fingerprint(*self.solver.shared(), part=self.solver.holding.replica.rank)

    def _loss_and_accuracy(self, name: str, data: Batch) -> dict[str, float]:
        replicas = self.solver.options.replicas
        first, last = split(len(data[0]), replicas, self.solver.holding.decomposition.team.rank)
        edges = [*range(first, last, METRIC_SAMPLES), last]
        inputs, targets = ([part[start:stop] for start, stop in itertools.pairwise(edges)] for part in data)
        sums = [0.0, 0.0, 0.0]

        def consume(index: int, outputs: torch.Tensor) -> None:
            nonlocal sums
            sums = added(sums, self._sums(outputs, targets[index]))

        self.solver.infer(inputs, consume)
        return self._means(name, sums, len(data[0]))
