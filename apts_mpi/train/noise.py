"""Whether the batches of a run are noisy ones, where the options leave that open."""

from __future__ import annotations

from dataclasses import replace

from apts_mpi.problems import Problem
from apts_mpi.train.options import TrainingOptions

# Steps from which on it is worth while that the next batch judges the radius: with fewer of them the best step for each
# batch leads lower. See docs/results.md.
MANY_STEPS = 250


def with_noise(options: TrainingOptions, problem: Problem) -> TrainingOptions:
    """The options of a run on a problem, with ``noise auto`` replaced by what it stands for."""
    if options.noise != "auto":
        return options
    return replace(options, noise="batches" if _has_noisy_batches(options, problem) else "none")


def _has_noisy_batches(options: TrainingOptions, problem: Problem) -> bool:
    samples = len(problem.train[0])
    batch_size = min(options.batch_size or problem.batch_size or samples, samples)
    steps = (options.epochs or problem.epochs) * (samples // batch_size)
    return batch_size < samples and steps >= MANY_STEPS and _may_have_kfac(options, problem)


def _may_have_kfac(options: TrainingOptions, problem: Problem) -> bool:
    """Whether nothing that was asked for speaks against the parts that noisy batches need."""
    local, schwarz = options.local, options.schwarz
    return (
        problem.forward is None
        and local.solver in ("auto", "kfac")
        and local.iterations == 1
        and schwarz.decomposition == "parameters"
        and schwarz.partition != "index"
        and options.coarse.model == "auto"
        and options.global_step.model == "none"
    )
