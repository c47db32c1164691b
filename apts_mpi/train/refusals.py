"""What the parser says of options and values that it does not take, in words that name what to give."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from apts_mpi.errors import InvalidInput, require, require_choice
from apts_mpi.tools.parser import HELP, refusal

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


def refuse(error: Exception, options: type, names: Iterable[str]) -> InvalidInput:
    """The error to raise for one of the parser's.

    Parameters
    ----------
    error
        Of the parser.
    options
        The dataclass of the options, whose fields may be dataclasses of groups.
    names
        Of all options, with dots for groups.

    Raises
    ------
    InvalidInput
        For a value of an option whose choices are known.
    """
    _refuse_value(str(error), options)
    return InvalidInput(refusal(str(error), [f"--{name}".replace("_", "-") for name in names]))


def _refuse_value(message: str, options: type) -> None:
    """Raise `InvalidInput` for the parser's message, if it is on a value."""
    found = re.match(r'Parser key "([\w.]+)":(?:.*(?:Got|Given) value: (.*))?', message, re.DOTALL)
    if found is None:
        return
    option, value = found.groups()
    kind: Any = options
    for name in option.split("."):
        kind = get_type_hints(kind).get(name, object) if is_dataclass(kind) else object
    remedy = _remedy(option, kind)
    if value is None:
        # Not even its text could be read.
        raise InvalidInput(f"{option}: this value cannot be read; {remedy}")
    if get_origin(kind) is Literal:
        require_choice(option, value, get_args(kind))
    require(False, option, value, remedy)


def _remedy(option: str, kind: Any) -> str:
    """What to give for an option of a type."""
    if option == "micro_batch_size":
        return "give a whole number of 1 or more, or auto"
    if option in ("problem_args", "network_args"):
        return "give a list of NAME=VALUE, such as [width=20]"
    if get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is Literal:
        names = get_args(get_args(kind)[0])
        return f"give a list of {', '.join(names)}, such as [{','.join(names[:2])}]"
    words = in_words(kind)
    return f"give {words}" if words else HELP


def in_words(kind: Any) -> str:
    """What a value of a type is; nothing for types that are not of numbers, texts, choices and their lists."""
    if get_origin(kind) in (Union, UnionType):
        parts = [in_words(part) for part in get_args(kind)]
        return ", or ".join(parts) if all(parts) else ""
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple):
        item = in_words(get_args(kind)[0])
        return f"a list, such as [1,2], of which each is {item}" if item in ("a whole number", "a number") else ""
    return WORDS.get(kind, "")
