"""A training run of which each rank holds a stage of the network, and reads the data that its stage needs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from mpi4py import MPI

from apts_mpi.comm import Communicator
from apts_mpi.drift import fingerprint
from apts_mpi.errors import InvalidInput
from apts_mpi.micro_batches import placeholder
from apts_mpi.partition import split
from apts_mpi.problems import Problem
from apts_mpi.staged import StagedAPTS, build_stage
from apts_mpi.training import METRIC_SAMPLES, Batch, Training
from apts_mpi.training_options import TrainingOptions


def build_staged_problem(make: Callable[[], Problem], options: TrainingOptions, world: MPI.Comm) -> Problem:
    """A problem of whose network this rank has its stage alone in memory. Collective.

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

    return build_stage(make, comm=world, options=options.solver_options(), parts=parts)


class StagedTraining(Training):
    """`Training` with a `StagedAPTS`: the same records, the same checkpoints."""

    solver: StagedAPTS

    def _make_solver(self, comm: MPI.Comm) -> StagedAPTS:
        # A stage in the middle has no use for the data on its device.
        solver = StagedAPTS(
            self.problem.network,
            self.problem.loss,
            comm=comm,
            options=self.options.solver_options(),
            sample=self.problem.train[0],
        )
        self.train = _of_stage(self.train, solver.replica)
        self.test = None if self.test is None else _of_stage(self.test, solver.replica)
        return solver

    def fingerprint(self) -> tuple[int, int, int]:
        """See `Training`: the replicas of a stage share its tensors."""
        return fingerprint(*self.solver.shared(), part=self.solver.replica.rank)

    def _loss_and_accuracy(self, name: str, data: Batch) -> dict[str, float]:
        replicas = self.solver.options.replicas
        first, last = split(len(data[0]), replicas, self.solver.schwarz.comm.rank)
        edges = [*range(first, last, METRIC_SAMPLES), last]
        inputs, targets = ([part[start:stop] for start, stop in itertools.pairwise(edges)] for part in data)
        loss = correct = 0.0

        def consume(index: int, outputs: torch.Tensor) -> None:
            nonlocal loss, correct
            of_part = self._sums(outputs, targets[index])
            loss, correct = loss + of_part[0], correct + of_part[1]

        self.solver.infer(inputs, consume)
        return self._means(name, [loss, correct], len(data[0]))


def _of_stage(data: Batch, stages: Communicator) -> Batch:
    """Inputs on the first stage, targets on the last, and for the rest what takes no memory."""
    inputs, targets = data
    return (
        inputs if stages.rank == 0 else placeholder(len(inputs), 0),
        targets if stages.rank == stages.size - 1 else placeholder(len(targets), 0),
    )
