"""What the command lines of comparisons share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, TypeVar, get_type_hints

import jsonargparse

from apts_mpi.errors import require
from apts_mpi.tools.command import add_version
from apts_mpi.tools.parser import remedy_for_directory
from apts_mpi.train.refusals import refuse

Options = TypeVar("Options")


# Of comparisons, in their descriptions.
KEPT = "Runs that have ended are kept: the same command goes on where it stopped."


def make_parser(program: str, description: str) -> jsonargparse.ArgumentParser:
    """A parser without options, for `read_values`."""
    parser = jsonargparse.ArgumentParser(prog=program, description=description, exit_on_error=False, allow_abbrev=False)
    add_version(parser)
    return parser


def read_values(parser: jsonargparse.ArgumentParser, arguments: Sequence[str], kind: type) -> dict[str, Any]:
    """Values of the options by their names, of which most are fields of a dataclass.

    Raises
    ------
    InvalidInput
        For an option or a value that is not known.
    """
    try:
        return dict(vars(parser.parse_args(arguments)))
    except (argparse.ArgumentError, TypeError) as error:
        raise refuse(error, kind, get_type_hints(kind)) from error


def read_options(parser: jsonargparse.ArgumentParser, arguments: Sequence[str], kind: type[Options]) -> Options:
    """Options of a dataclass with ``problems``, which the parser has as its positional arguments, and ``out``.

    Raises
    ------
    InvalidInput
        For an option or a value that is not known.
    """
    values = read_values(parser, arguments, kind)
    remedy = remedy_for_directory(values["out"])
    require(not remedy, "out", values["out"], remedy)
    return kind(**values | {"problems": tuple(values["problems"])})
