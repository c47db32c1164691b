"""Whether the batches of a run are noisy ones, and how strong the pull is, where the options leave that open."""

from __future__ import annotations

import math
from dataclasses import replace

from apts_mpi.problems import Problem
from apts_mpi.tools.trees import count_samples
from apts_mpi.train.options import TrainingOptions

# Steps from which on it is worth while that the next batch judges the radius: with fewer of them the best step for each
# batch leads lower. See docs/results.md.
MANY_STEPS = 100

# Batches an epoch from which on one of them says little about the others. With fewer, many steps are many passes over
# few samples, which are there to be fitted: on 512 sequences with random labels, batch 32, the loss was 0.004 after 20
# epochs of noisy batches, and 0.0005 with each batch minimised for itself.
MANY_BATCHES = 20

# Of a run that its time ends, which makes up to three times the steps in it: with 16 batches a residual network had a
# test accuracy of 0.83 for 0.72 after the same seconds.
MANY_BATCHES_IN_TIME = 12

# The more passes over the samples, the more has to be done against fitting them: see docs/results.md.
PULL_OF_ONE_PASS, LARGEST_PULL = 0.1, 0.3


def with_noise(options: TrainingOptions, problem: Problem) -> TrainingOptions:
    """The options of a run on a problem, with ``noise auto`` and the pull replaced by what they stand for."""
    if options.noise == "auto":
        options = replace(options, noise="batches" if _has_noisy_batches(options, problem) else "none")
    if options.noise == "none" or options.trust_region.pull is not None or _is_timed(options):
        return options  # how many passes there will be is not known of a run that its time ends
    pull = min(PULL_OF_ONE_PASS * math.sqrt(options.epochs or problem.epochs), LARGEST_PULL)
    return replace(options, trust_region=replace(options.trust_region, pull=pull))


def _has_noisy_batches(options: TrainingOptions, problem: Problem) -> bool:
    samples = count_samples(problem.train[0])
    batch_size = min(options.batch_size or problem.batch_size or samples, samples)
    batches = samples // batch_size
    steps = (options.epochs or problem.epochs) * batches
    many = MANY_BATCHES_IN_TIME if _is_timed(options) else MANY_BATCHES
    return batches >= many and steps >= MANY_STEPS and _may_average(options, problem)


def _is_timed(options: TrainingOptions) -> bool:
    return options.max_seconds is not None or options.max_cpu_seconds is not None


def _may_average(options: TrainingOptions, problem: Problem) -> bool:
    """Whether nothing that was asked for speaks against the parts that noisy batches need."""
    local, schwarz = options.local, options.schwarz
    return (
        problem.forward is None
        and options.method == "two-level"
        and local.solver in ("auto", "kfac", "muon")
        and local.iterations == 1
        and schwarz.decomposition == "parameters"
        and schwarz.partition != "index"
        and options.coarse.model == "auto"
        and options.global_step.model in ("auto", "none")
    )
