"""The options of a solver as branches of an indented tree, for those who read them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

# Columns of a narrow terminal.
WIDTH = 80


def fold(line: str) -> str:
    """A line in as many as `WIDTH` asks for, those after the first one indented by four more; words stay whole."""
    indent = " " * (len(line) - len(line.lstrip()))
    later = indent + " " * 4
    folded = textwrap.wrap(
        line.lstrip(), WIDTH, initial_indent=indent, subsequent_indent=later, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(folded)


def branch(name: str, options: Any, asked: Any) -> Iterator[str]:
    """The lines of a group of options below its name; groups within it are left out.

    An asterisk marks an option that was asked for other than its default, which is named. Of one that has another value
    than was asked for, as ``auto`` and ``null`` leave it open, that is named, too.

    Parameters
    ----------
    name
        Of the group, or what else to write above it.
    options, asked
        As the solver has them and as they were given: data classes of one kind.
    """
    yield f"  {name}"
    default = type(options)()
    for field in fields(options):
        if not is_dataclass(getattr(options, field.name)):
            yield fold(_line(field.name, *(getattr(each, field.name) for each in (options, asked, default))))


def _line(name: str, value: Any, asked: Any, default: Any) -> str:
    notes = [f"for {_written(asked)}"] * (value != asked) + [f"default: {_written(default)}"] * (asked != default)
    note = f" ({', '.join(notes)})" if notes else ""
    return f"    {'*' if asked != default else ' '} {name:<16} {_written(value)}{note}"


def _written(value: Any) -> str:
    """A value as the command line has it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(_written, value))}]" if isinstance(value, (tuple, list)) else str(value)
