"""What a run has to share with one that it goes on with."""

from __future__ import annotations

from typing import Any

from apts_mpi.checkpoint import Checkpoint
from apts_mpi.errors import InvalidInput, shown
from apts_mpi.problems import Problem
from apts_mpi.tools.trees import count_samples
from apts_mpi.train.options import TrainingOptions


def identity(problem: Problem, options: TrainingOptions, batch_size: int) -> dict[str, Any]:
    """What the order of the batches depends on, and what is trained."""
    return {
        "problem": problem.name,
        "optimizer": options.optimizer,
        "dtype": options.dtype,
        "seed": options.seed,
        "train_samples": count_samples(problem.train[0]),
        "batch_size": batch_size,
    }


def check_identity(own: dict[str, Any], saved: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raise `InvalidInput` where a checkpoint is one of another run, naming the first difference."""
    for name, value in own.items():
        if saved[name] != value:
            raise InvalidInput(
                f"{name}: {value!r} differs from the {shown(saved[name])} with which {checkpoint.path} was made; "
                "resume with the same, or start a new run"
            )
