"""Training problems by name: a network, its data and its loss.

It may import errors, options and tools, and no MPI: a problem knows nothing of ranks. Read ``problem`` first, what a
solver needs to know of one, then any of the files that build some.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping

import torch

from apts_mpi.data import Half
from apts_mpi.errors import InvalidInput, nearest, require
from apts_mpi.problems import (
    allen_cahn,
    burgers,
    cavity,
    gray_scott,
    hdf5,
    helmholtz,
    images,
    inverse,
    operators,
    poisson,
    sequences,
    text,
    transport,
    user,
)
from apts_mpi.problems.deepxde_data import from_deepxde
from apts_mpi.problems.finite import check_finite
from apts_mpi.problems.hdf5 import Parts
from apts_mpi.problems.problem import ALL, Problem, Wanted
from apts_mpi.problems.redraw import Redraw
from apts_mpi.problems.task import Task
from apts_mpi.tools import environment
from apts_mpi.tools.trees import count_samples, map_tensors, take
from apts_mpi.tools.user_code import arguments_for

__all__ = [
    "ALL",
    "Parts",
    "Problem",
    "Redraw",
    "Task",
    "Wanted",
    "arguments_of",
    "build",
    "from_deepxde",
    "names",
    "read_parts",
]

NONE: Mapping[str, str] = {}
NO_PARTS = Parts()

# Functions of (dtype) and of arguments that the user may give, by keyword.
_SELF_CONTAINED = {
    "digits": images.digits,
    "digits-cnn": images.digits_cnn,
    "permuted-digits": images.permuted_digits,
    "poisson-1d": poisson.poisson_1d,
    "poisson-2d": poisson.poisson_2d,
    "poisson-3d": poisson.poisson_3d,
    "burgers": burgers.burgers,
    "allen-cahn": allen_cahn.allen_cahn,
    "helmholtz-2d": helmholtz.helmholtz_2d,
    "wave": transport.wave,
    "advection": transport.advection,
    "gray-scott": gray_scott.gray_scott,
    "lid-driven-cavity": cavity.lid_driven_cavity,
    "inverse-diffusion": inverse.inverse_diffusion,
    "deeponet-sine": operators.deeponet_sine,
}

# Functions of (data_dir, dtype), likewise.
_READ_FROM_FILES = {"text": text.text, "split-fashion-mnist": images.split_fashion_mnist}

# Functions of (data_dir, dtype, wanted), likewise.
_READ_IN_PARTS = {
    "fashion-mnist": images.fashion_mnist,
    "fashion-mnist-cnn": images.fashion_mnist_cnn,
    "fashion-mnist-resnet": images.fashion_mnist_resnet,
}

_OF_PACKAGE: dict[str, Callable[..., Problem]] = _SELF_CONTAINED | _READ_FROM_FILES | _READ_IN_PARTS


def names() -> tuple[str, ...]:
    """Names that `build` knows, besides ``MODULE:FUNCTION``."""
    return tuple(sorted(_OF_PACKAGE))


def arguments_of(name: str) -> dict[str, float]:
    """Arguments of one of `names`, with their default values."""
    parameters = inspect.signature(_OF_PACKAGE[name]).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is each.KEYWORD_ONLY}


def read_parts(name: str, wanted: Wanted) -> Wanted:
    """Which data `build` gives of what is ``wanted``: all where it does not read them from files of their own."""
    return wanted if name in _READ_IN_PARTS else ALL


def build(
    name: str,
    *,
    data_dir: str | None = None,
    train_samples: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    wanted: Wanted = ALL,
    arguments: Mapping[str, str] = NONE,
    parts: Parts = NO_PARTS,
) -> Problem:
    """Build a problem. Equal arguments give equal networks and data; torch's random state is left as it was.

    Parameters
    ----------
    name : str
        One of `names`; ``MODULE:FUNCTION`` for a problem of the user's (see `apts_mpi.problems.user.load`); or
        ``hdf5:FILE`` (see ``apts_mpi.problems.hdf5.load``). Several with commas are a sequence of tasks.
    data_dir : str, optional
        Where the files of ``fashion-mnist*`` and ``text`` are.
    train_samples : int, optional
        Train on the first that many samples only.
    seed : int
        Seed of the network's initial parameters.
    dtype : torch.dtype
        float32 or float64, of the network and its floating-point data.
    wanted : Wanted
        Where not all, the numbers of samples are only right of what is wanted.
    arguments : mapping of str to str
        Of the function that makes the problem; those of the package's are given by ``arguments_of``.
    parts : Parts
        Network and loss of a problem that is a file.

    Returns
    -------
    Problem
        On the CPU.

    Raises
    ------
    InvalidInput
        When the name is unknown, the data cannot be read or an argument does not suit the problem, and for nan or inf
        among the data.
    """
    cpu = torch.device("cpu")
    with environment.preserved_random_state(cpu):
        environment.seed_stream(cpu, seed)
        problem = _find(name, data_dir, dtype, wanted, arguments, parts)()
    if train_samples is not None:
        problem = _take_first(problem, train_samples, wanted)
    check_finite(problem, read_parts(name, wanted))
    return problem


def _find(
    name: str, data_dir: str | None, dtype: torch.dtype, wanted: Wanted, arguments: Mapping[str, str], parts: Parts
) -> Callable[[], Problem]:
    is_file = name.startswith(hdf5.PREFIX)
    if "," in name and not is_file:
        return lambda: sequences.in_a_row(name, lambda one: _find(one, data_dir, dtype, wanted, arguments, parts)())
    for option, given in (("network", parts.network), ("network.args", parts.network_args), ("loss", parts.loss)):
        require(is_file or not given, f"--{option}", given, f"leave it out: it is for hdf5:FILE, not for {name}")
    if name in _READ_IN_PARTS:
        return _with_arguments(name, (data_dir, dtype, wanted), arguments)
    if name in _READ_FROM_FILES:
        return _with_arguments(name, (data_dir, dtype), arguments)
    require(data_dir is None, "--data-dir", data_dir, f"leave it out: {name} reads no files")
    if name in _SELF_CONTAINED:
        return _with_arguments(name, (dtype,), arguments)
    if is_file:
        arguments_for("--problem.args", lambda: None, arguments, name)
        return functools.partial(hdf5.load, name.removeprefix(hdf5.PREFIX), dtype=dtype, parts=parts)
    if ":" in name:
        return functools.partial(user.load, name, dtype=dtype, arguments=arguments)
    raise InvalidInput(
        f"--problem: {name!r} is not known; choose one of {', '.join(names())}, hdf5:FILE, or MODULE:FUNCTION"
        + nearest(name, names())
    )


def _with_arguments(name: str, fixed: tuple[object, ...], given: Mapping[str, str]) -> Callable[[], Problem]:
    """One of the package's problems with the user's arguments; whole numbers are counts."""
    # What is bound by place is none of its arguments any more.
    make = functools.partial(_OF_PACKAGE[name], *fixed)
    arguments = arguments_for("--problem.args", make, given, name)
    for argument, value in arguments.items():
        counts = isinstance(value, int)
        require(not counts or value >= 1, f"--problem.args.{argument}", value, "give 1 or more")
    return functools.partial(make, **arguments)


def _take_first(problem: Problem, train_samples: int, wanted: Wanted) -> Problem:
    if not (wanted.inputs or wanted.targets):
        return problem
    inputs, targets = problem.train
    count = count_samples(inputs)
    require(
        1 <= train_samples <= count,
        "--train-samples",
        train_samples,
        f"{problem.name} has {count} training samples; give 1 to {count}",
    )
    if problem.order is not None and problem.order.drawn:
        raise InvalidInput(
            f"--train-samples: {train_samples} is not for problem {problem.name}, whose sampler chooses; leave it out"
        )
    halves = [part.range(0, train_samples) if isinstance(part, Half) else None for part in (inputs, targets)]
    if None not in halves:
        return dataclasses.replace(problem, train=tuple(halves))
    if problem.tasks:
        tasks = tuple(task.first(train_samples) for task in problem.tasks)
        return dataclasses.replace(problem, tasks=tasks, train=tasks[0].train)
    inputs, targets = (take(part, slice(train_samples)) for part in problem.train)
    # Copies, so that the rest can be freed.
    copies = (
        map_tensors(torch.Tensor.clone, inputs) if wanted.inputs else inputs,
        map_tensors(torch.Tensor.clone, targets) if wanted.targets else targets,
    )
    return dataclasses.replace(problem, train=copies)
