"""Functions and classes of the user's, named ``MODULE:NAME`` by an option."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import yaml

from apts_mpi.errors import InvalidInput, shown


def import_named(option: str, name: str, kind: str, remedy: str = "give one that it has") -> Any:
    """What ``MODULE:NAME`` or ``FILE.py:NAME`` stands for; a module is looked for in the current directory first.

    Parameters
    ----------
    option
        Which one gave the name.
    name
        ``MODULE:NAME`` or ``FILE.py:NAME``.
    kind
        What it shall be, in words: function, class.
    remedy
        What the message says where the module has no such thing.

    Raises
    ------
    InvalidInput
        If it cannot be imported.
    """
    module_name, _, own_name = name.rpartition(":")
    # For the rest of the run: it may import its own modules late.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = import_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except Exception as error:
        raise InvalidInput(
            f"{option} {name}: importing {module_name!r} failed with {type(error).__name__}: {error}; give "
            f"MODULE:{kind.upper()}, a module of the current directory or of the Python path, or FILE.py, and a {kind} "
            "in it"
        ) from error
    found = getattr(module, own_name, None)
    if not callable(found):
        raise InvalidInput(f"{option} {name}: {module_name!r} has no {kind} {own_name!r}; {remedy}")
    return found


def import_file(path: str) -> ModuleType:
    """The module in a file, which is imported once."""
    place = Path(path)
    found = sys.modules.get(place.stem)
    if found is not None and getattr(found, "__file__", None) == str(place.absolute()):
        return found
    if not place.is_file():
        raise FileNotFoundError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(place.stem, place.absolute())
    if spec is None or spec.loader is None:
        raise ImportError(f"{path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # By its name its classes are found again, as a worker of a data set does.
    sys.modules[place.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[place.stem]
        raise
    return module


def arguments_for(
    option: str, function: Callable[..., Any], given: Mapping[str, str], called: str | None = None
) -> dict[str, Any]:
    """Arguments of a function of the user's, of the types that it names or that its defaults have.

    Parameters
    ----------
    option
        Such as ``--problem.args``, for messages.
    function
        What is to be called.
    given
        Names and the texts of their values.
    called
        What messages call the function; None: by its name.

    Raises
    ------
    InvalidInput
        For a name that it does not take, and for a value of another type; with what there is.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
    }
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    names = [name for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD]
    called = called or getattr(function, "__name__", "the function")
    for name in given:
        if name not in names and not takes_any:
            near = difflib.get_close_matches(name, names, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            there = f"it takes {', '.join(names)}" if names else "it takes no arguments"
            raise InvalidInput(f"{option}.{name}: {called} has no such argument; {meant}{there}")
    missing = [name for name in names if parameters[name].default is inspect.Parameter.empty and name not in given]
    if missing:
        raise InvalidInput(f"{option}: {called} needs {', '.join(missing)}; give {option}.{missing[0]} VALUE")
    try:
        hints = get_type_hints(function)
    except Exception:  # of names that are there for type checkers alone
        hints = {}
    return {
        name: _value(f"{option}.{name}", text, hints.get(name), parameters.get(name)) for name, text in given.items()
    }


def _value(option: str, text: str, hint: Any, parameter: inspect.Parameter | None) -> Any:
    """What a text stands for, as the type that is asked for."""
    default = inspect.Parameter.empty if parameter is None else parameter.default
    kinds = get_args(hint) or ((hint,) if hint is not None else ())
    if not kinds and default not in (inspect.Parameter.empty, None):
        kinds = (type(default),)
    if str in kinds and not set(kinds) & {int, float, bool}:
        return None if text == "null" and type(None) in kinds else text
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # also for numbers of thousands of digits
        value = text
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return value if int in kinds and isinstance(value, int) else float(value)
        except ValueError:
            pass
    plain = [kind for kind in kinds if kind in (int, float, bool, str, list, tuple, dict, type(None))]
    # A bool is an int to Python, and not to those who give one.
    if plain and len(plain) == len(kinds) and type(value) not in plain:
        words = " or ".join("null" if kind is type(None) else kind.__name__ for kind in plain)
        raise InvalidInput(f"{option}: {shown(text)} is not allowed; give a value of type {words}")
    return value


def class_of(option: str, name: str, base: type) -> Any:
    """The class ``MODULE:CLASS`` of the user's, which is derived from ``base``.

    Raises
    ------
    InvalidInput
        If it cannot be imported, or is not derived from it.
    """
    found = import_named(option, name, "class")
    if not (isinstance(found, type) and issubclass(found, base)):
        raise InvalidInput(
            f"{option} {name}: it is not a class derived from {base.__module__.rpartition('.')[0]}.{base.__name__}; "
            "derive it from that"
        )
    return found
