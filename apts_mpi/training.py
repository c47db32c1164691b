"""One training run: batches by seed, an optimizer, metrics once an epoch, records on rank 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from mpi4py import MPI

from apts_mpi.apts import APTS
from apts_mpi.baselines import DataParallel
from apts_mpi.comm import Communicator
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.iteration import StepResult
from apts_mpi.partition import split
from apts_mpi.problems import Problem
from apts_mpi.training_options import TrainingOptions

Batch = tuple[torch.Tensor, torch.Tensor]

# A rejected batch is tried again in a smaller ball that often, then the next batch has its turn.
RETRIES = 3

# Samples a forward pass when metrics are computed: bounds the memory of the activations.
METRIC_SAMPLES = 2048


class Training:
    """A problem, a solver and their progress.

    Parameters
    ----------
    problem, options
        What to train and how.
    device
        Where.
    comm
        The ranks. Collective.

    Attributes
    ----------
    solver : APTS or DataParallel
        The solver.
    iteration, epoch : int
        How far training has come.
    gradient_evaluations, seconds : float
        Their sums over the iterations; metrics are not counted.
    """

    def __init__(self, problem: Problem, options: TrainingOptions, device: torch.device, comm: MPI.Comm) -> None:
        self.problem = problem
        self.options = options
        self.test: Batch | None
        problem.network.to(device)
        self.train = _to(problem.train, device)
        self.test = None if problem.test is None else _to(problem.test, device)
        self.samples = len(self.train[0])
        self.batch_size = min(options.batch_size or problem.batch_size or self.samples, self.samples)
        self.epochs = options.epochs or problem.epochs
        self.solver: APTS | DataParallel
        if options.optimizer == "apts":
            self.solver = APTS(
                problem.network,
                problem.loss,
                comm=comm,
                options=options.solver_options(),
                forward=problem.forward,
            )
        else:
            self.solver = DataParallel(
                problem.network,
                problem.loss,
                comm=comm,
                optimizer=options.optimizer,
                learning_rate=options.learning_rate,
                seed=options.seed,
                forward=problem.forward,
            )
        self._check_batch()
        self.comm: Communicator = self.solver.comm
        self.iteration = self.epoch = 0
        self.accepted = self.rejected = 0
        self.gradient_evaluations = self.seconds = 0.0

    def _check_batch(self) -> None:
        local_data = self.solver.options.schwarz.local_data if isinstance(self.solver, APTS) else "shard"
        least = self.solver.layout.smallest_batch(local_data)
        if self.batch_size < least:
            raise SharedInvalidInput(
                f"batch_size: {self.batch_size} is too small for {self.solver.layout.ranks} ranks with "
                f"{self.solver.layout.subdomains} subdomains; give at least {least}, or fewer ranks or subdomains"
            )

    @property
    def batches(self) -> int:
        """Batches an epoch; samples that do not fill one are left out, others each epoch."""
        return self.samples // self.batch_size

    def run(self, record: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Train to the end and return the metrics. Collective.

        Parameters
        ----------
        record
            Called on every rank with one dictionary an iteration and one an epoch, the same on every rank up to
            the seconds.
        """
        metrics: dict[str, Any] = {}
        limit = self.options.max_iterations or math.inf
        while self.epoch < self.epochs and self.iteration < limit:
            self.problem.network.train()
            self.epoch += 1
            for rows in self._rows():
                for result in self._steps(rows):
                    record(self._progress(result))
                if self.iteration >= limit:
                    break
            metrics = self.metrics()
            record({"epoch": self.epoch, "iteration": self.iteration, **self._totals(), **metrics})
        return metrics

    def _rows(self) -> Iterator[torch.Tensor | None]:
        """Samples of each batch of this epoch; None is the full batch."""
        if self.batch_size == self.samples:
            yield None
            return
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.samples, generator=generator).to(self.train[0].device)
        for index in range(self.batches):
            yield order[index * self.batch_size : (index + 1) * self.batch_size]

    def _steps(self, rows: torch.Tensor | None) -> Iterator[StepResult | Any]:
        """The iterations on one batch: one, and with APTS more while the step is rejected."""
        if isinstance(self.solver, DataParallel):
            yield self.solver.step(self.train, rows)
            return
        known = rows is None and self.iteration > 0
        result = self.solver.step(None if known else self.train, rows)
        yield result
        for _ in range(RETRIES):
            if result.accepted or self.iteration >= (self.options.max_iterations or math.inf):
                return
            result = self.solver.step()
            yield result

    def _progress(self, result: StepResult | Any) -> dict[str, Any]:
        self.iteration += 1
        self.gradient_evaluations += result.gradient_evaluations
        self.seconds += result.seconds
        values: dict[str, Any] = {"iteration": self.iteration, "epoch": self.epoch}
        if isinstance(result, StepResult):
            self.accepted += result.accepted
            self.rejected += not result.accepted
            values |= asdict(result.schwarz)
            if result.global_step is not None:
                values["global_step"] = asdict(result.global_step)
        else:
            self.accepted += 1
            values |= {"loss": result.loss, "gradient_norm": result.gradient_norm, "accepted": True}
        return values | self._totals()

    def _totals(self) -> dict[str, float]:
        return {"gradient_evaluations": self.gradient_evaluations, "seconds": self.seconds}

    def metrics(self) -> dict[str, Any]:
        """Losses and accuracies on all samples, the network in evaluation mode. Collective."""
        network = self.problem.network
        network.eval()
        values = self._loss_and_accuracy("train", self.train)
        if self.test is not None:
            values |= self._loss_and_accuracy("test", self.test)
        for name, metric in self.problem.metrics.items():
            own = float(metric(network)) if self.comm.rank == 0 else 0.0
            (values[name],) = self.comm.agree([own], lambda table: [table[0, 0]])
        return values

    @torch.no_grad()
    def _loss_and_accuracy(self, name: str, data: Batch) -> dict[str, float]:
        loss = correct = 0.0
        first, last = split(len(data[0]), self.comm.size, self.comm.rank)
        for start in range(first, last, METRIC_SAMPLES):
            inputs, targets = (part[start : min(start + METRIC_SAMPLES, last)] for part in data)
            outputs = self._outputs(inputs)
            loss += float(self.problem.loss(outputs, targets)) * len(inputs)
            if self.problem.accuracy:
                # The last dimension holds the classes; targets may have more dimensions than samples (tokens).
                hits = (outputs.argmax(dim=-1) == targets).sum()
                correct += float(hits) / (targets.numel() / len(targets))
        count = len(data[0])
        mean = self.comm.agree([loss, correct], lambda table: table.sum(axis=0) / count)
        result = {f"{name}_loss": mean[0]}
        return result | ({f"{name}_accuracy": mean[1]} if self.problem.accuracy else {})

    def _outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.problem.forward is not None:
            return self.problem.forward(self.problem.network, inputs)
        return self.problem.network(inputs)

    def summary(self, metrics: dict[str, Any]) -> dict[str, Any]:
        """What the run came to. Collective."""
        waiting = self.solver.events.totals["wait"].seconds
        (communication,) = self.comm.agree([waiting], lambda table: [table[:, 0].max()])
        return {
            "problem": self.problem.name,
            "optimizer": self.options.optimizer,
            "ranks": self.comm.size,
            "parameters": self.solver.vector.values.numel(),
            "epochs": self.epoch,
            "iterations": self.iteration,
            **metrics,
            "accepted_steps": self.accepted,
            "rejected_steps": self.rejected,
            "gradient_evaluations": self.gradient_evaluations,
            "seconds": self.seconds,
            "seconds_in_communication": communication,
        }


def _to(data: Batch, device: torch.device) -> Batch:
    return data[0].to(device), data[1].to(device)
