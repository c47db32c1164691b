"""Functions and classes of the user's, named ``MODULE:NAME`` by an option."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from apts_mpi.errors import InvalidInput


def import_named(option: str, name: str, kind: str, remedy: str = "give one that it has") -> Any:
    """What ``MODULE:NAME`` stands for; the module is looked for in the current directory first.

    Parameters
    ----------
    option
        Which one gave the name.
    name
        ``MODULE:NAME``.
    kind
        What it shall be, in words: function, class.
    remedy
        What the message says where the module has no such thing.

    Raises
    ------
    InvalidInput
        If it cannot be imported.
    """
    module_name, _, own_name = name.partition(":")
    # For the rest of the run: it may import its own modules late.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InvalidInput(
            f"{option} {name}: importing {module_name!r} failed with {type(error).__name__}: {error}; give "
            f"MODULE:{kind.upper()}, a module of the current directory or of the Python path and a {kind} in it"
        ) from error
    found = getattr(module, own_name, None)
    if not callable(found):
        raise InvalidInput(f"{option} {name}: {module_name!r} has no {kind} {own_name!r}; {remedy}")
    return found


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
