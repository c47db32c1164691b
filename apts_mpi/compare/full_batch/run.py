"""One run of a method of full batches, with the records that a run of apts_mpi.train has."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch

from apts_mpi.compare.full_batch.options import FullBatchOptions
from apts_mpi.compare.full_batch.registry import MAKERS
from apts_mpi.compare.full_batch.squares import Squares, mean
from apts_mpi.problems import Problem, build
from apts_mpi.records.directory import RunDirectory
from apts_mpi.tools.environment import cpu_seconds, seconds
from apts_mpi.tools.tensors import default_dtype
from apts_mpi.train.options import named_values

# Records of a run that its seconds end: as often as metrics take little beside it.
RECORDS = 400


def run(options: FullBatchOptions, path: Path) -> dict[str, Any]:
    """Do a run, write its directory, and return its summary.

    Seconds and processor seconds are those of the iterations, without metrics and records.

    Raises
    ------
    InvalidInput
        For a problem that the method cannot take, or a directory that cannot be written.
    """
    problem = build(
        options.problem,
        data_dir=options.data_dir,
        train_samples=options.train_samples,
        seed=options.seed,
        dtype=getattr(torch, options.dtype),
        arguments=named_values("problem_args", options.problem_args),
    )
    squares = Squares(problem)
    method = MAKERS[options.optimizer](squares, options.setting)
    tell = lambda message: print(message, file=sys.stderr)  # noqa: E731
    totals = {"gradient_evaluations": 0.0, "seconds": 0.0, "cpu_seconds": 0.0}
    recorded, iteration, share = 0.0, 0, 0.0
    with RunDirectory(path, options.config(), tell, overwrite=True) as directory:
        while share < 1.0:
            before = squares.evaluations, seconds(), cpu_seconds()
            method.step(share)
            after = squares.evaluations, seconds(), cpu_seconds()
            for name, start, end in zip(totals, before, after, strict=True):
                totals[name] += end - start
            iteration += 1
            share = share_of(options, iteration, totals)
            if share >= min(1.0, recorded + 1.0 / RECORDS) or options.max_cpu_seconds is None:
                recorded = math.floor(share * RECORDS) / RECORDS
                squares.put(method.point)
                place = {"epoch": iteration, "iteration": iteration}
                metrics = measure(problem)
                directory.record(place | {"loss": metrics["train_loss"], "accepted": True} | totals)
                directory.record(place | totals | metrics)
        summary = {"problem": problem.name, "optimizer": options.optimizer, "ranks": 1, "iterations": iteration}
        summary |= totals | metrics
        directory.flush()
        if reason := directory.write_summary(summary):
            tell(f"warning: {reason}")
    return summary


def share_of(options: FullBatchOptions, iteration: int, totals: dict[str, float]) -> float:
    """How much of the run is behind it, 1 or more at its end."""
    limits = ((options.max_seconds, "seconds"), (options.max_cpu_seconds, "cpu_seconds"))
    return max(iteration / options.epochs, *(totals[name] / limit for limit, name in limits if limit is not None), 0.0)


@torch.no_grad()
def measure(problem: Problem) -> dict[str, float]:
    """Losses and metrics of the problem's network as it is."""
    forward = problem.forward or (lambda network, inputs: network(inputs))
    halves = {"train_loss": problem.train, "test_loss": problem.test}
    losses = {
        name: float(mean(problem.loss(forward(problem.network, half[0]), half[1])))
        for name, half in halves.items()
        if half is not None
    }
    with default_dtype(problem.dtype):
        return losses | {name: float(metric(problem.network)) for name, metric in problem.metrics.items()}
