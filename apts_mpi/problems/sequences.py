"""Sequences of tasks for one network: the same samples in other orders of pixels, pairs of classes, or given problems.

What is asked of the network stays the same from task to task (domain-incremental learning): the number of a class, or
which one of a pair it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from apts_mpi.errors import InvalidInput, require
from apts_mpi.problems.problem import Problem
from apts_mpi.problems.task import Task

Pair = tuple[Tensor, Tensor]


def permuted(name: str, network: nn.Module, base: Problem, tasks: int) -> Problem:
    """The samples of a problem, of which each task after the first has the inputs in an order of its own."""
    # A part of the problem: not by the seed of the run.
    size = base.train[0].shape[1]
    orders = [torch.randperm(size, generator=torch.Generator().manual_seed(number)) for number in range(1, tasks)]
    orders = [torch.arange(size), *orders]
    found = [Task(f"order {number}", *_mapped(base, order)) for number, order in enumerate(orders)]
    return _sequence(name, network, base, found, batch_size=60, epochs=10)


def in_pairs(name: str, network: nn.Module, base: Problem, classes: int) -> Problem:
    """The samples of a problem in tasks of two classes, of which the first is to be told from the second."""
    pairs = [(first, first + 1) for first in range(0, classes, 2)]
    found = [Task(f"{one} or {other}", _of(base.train, one), _of(base.test, one)) for one, other in pairs]
    return _sequence(name, network, base, found, batch_size=200, epochs=2)


def in_a_row(names: str, build: Callable[[str], Problem]) -> Problem:
    """The problems of a list with commas one after the other, on the network of the first; the shortest counts.

    Raises
    ------
    InvalidInput
        Naming the first problem that does not suit the network, or has no samples in memory, no accuracy or no test.
    """
    problems = [build(name) for name in names.split(",")]
    for problem in problems:
        known = problem.accuracy and problem.test is not None and problem.forward is None
        known = known and all(isinstance(half, Tensor) for half in (*problem.train, *(problem.test or ())))
        remedy = f"{problem.name} has no classes, no held-out samples or none in memory; leave it out"
        require(known, "--problem", names, remedy)
        alike = _shapes(problem) == _shapes(problems[0])
        remedy = f"{problem.name} has another network than {problems[0].name}; give problems of one network"
        require(alike, "--problem", names, remedy)
    least = min(len(problem.train[0]) for problem in problems)
    found = [Task(problem.name, problem.train, problem.test).first(least) for problem in problems]
    return replace(problems[0], name=names, train=found[0].train, test=found[0].test, tasks=tuple(found))


def _shapes(problem: Problem) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(value.shape)) for name, value in problem.network.named_parameters()]


def _sequence(
    name: str, network: nn.Module, base: Problem, tasks: Sequence[Task], batch_size: int, epochs: int
) -> Problem:
    """The problem of a sequence, with the samples of its first task; ``epochs`` are those of a task."""
    first, dtype = tasks[0], base.train[0].dtype
    return replace(
        base,
        name=name,
        network=network.to(dtype),
        train=first.train,
        test=first.test,
        batch_size=batch_size,
        epochs=epochs,
        tasks=tuple(tasks),
    )


def _mapped(base: Problem, order: Tensor) -> tuple[Pair, Pair]:
    (train, labels), (test, test_labels) = base.train, base.test
    return (train[:, order], labels), (test[:, order], test_labels)


def _of(data: Pair, first: int) -> Pair:
    """The samples of a class and the next, as 0 and 1."""
    inputs, labels = data
    rows = ((labels == first) | (labels == first + 1)).nonzero().squeeze(1)
    if len(rows) == 0:
        raise InvalidInput(f"--data-dir: there are no images of classes {first} and {first + 1}; give all of them")
    return inputs[rows], labels[rows] - first
