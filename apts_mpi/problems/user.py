"""A problem that a function of the user's returns, named ``MODULE:FUNCTION``."""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from apts_mpi.data.taking import is_array, is_tree
from apts_mpi.errors import InvalidInput
from apts_mpi.problems.problem import Problem, dtype_of
from apts_mpi.tools.tensors import default_dtype
from apts_mpi.tools.user_code import arguments_for, import_named

_EXPECTED = (
    "the function returns a Problem or a tuple (network, loss, data), with data "
    "(inputs, targets) or ((inputs, targets), (test_inputs, test_targets))"
)


def load(name: str, dtype: torch.dtype, arguments: Mapping[str, str]) -> Problem:
    """Call the user's function and make a `apts_mpi.problems.Problem` of what it returns.

    The module is looked for in the current directory first. It is imported, and the function called, with ``dtype`` as
    torch's default dtype; what they give an explicit dtype keeps it. Of a tuple, int64 targets are taken for class
    indices, whose accuracy is reported.

    Parameters
    ----------
    name : str
        ``MODULE:FUNCTION`` or ``FILE.py:FUNCTION``.
    dtype : torch.dtype
    arguments
        Of the function, as texts.

    Raises
    ------
    InvalidInput
        When an argument is not one of the function's; when the module or the function is missing or fails, or returns
        something else.
    """
    with default_dtype(dtype):
        function = import_named("--problem", name, "function", _EXPECTED)
        returned = call("--problem", name, function, arguments, _EXPECTED)
    return returned if isinstance(returned, Problem) else _from_tuple(name, returned)


def call(option: str, name: str, function: Callable[..., object], given: Mapping[str, str], expected: str) -> object:
    """What a function of the user's returns, called with arguments that are given as texts.

    Raises
    ------
    InvalidInput
        For arguments that it does not take, and for what it raises; the message ends with what is ``expected`` of it.
    """
    arguments = arguments_for(f"{option}.args", function, given)
    try:
        return function(**arguments)
    except Exception as error:
        raise InvalidInput(f"{option} {name}: the function raised {_quote(error)}; {expected}") from error


def _quote(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _from_tuple(name: str, returned: object) -> Problem:
    if not isinstance(returned, tuple) or len(returned) != 3:
        raise InvalidInput(f"--problem {name}: the function returned {_describe(returned)}; {_EXPECTED}")
    network, loss, data = returned
    # Of arrays and trees a pair is inputs and targets, of tuples and data sets training and test samples.
    is_split = isinstance(data, tuple) and len(data) == 2 and not any(is_array(part) or is_tree(part) for part in data)
    train, test = data if is_split else (data, None)
    try:
        problem = Problem(name=name, network=network, loss=loss, train=train, test=test)
        return dataclasses.replace(problem, accuracy=dtype_of(problem.train[1]) == torch.int64)
    except InvalidInput as error:
        raise InvalidInput(f"--problem {name}: the function returned a wrong tuple: {error}; {_EXPECTED}") from error


def _describe(value: object) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else f"{type(value).__name__} {value!r:.60}"
