"""The parser of the commands, whose refusals are one line in words: the option, its value, and what to give."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from apts_mpi.errors import LARGEST, nearest, shortened, shown
from apts_mpi.tools.command import add_version
from apts_mpi.tools.status import USAGE

HELP = "--help lists the options and their values"

# Characters of what a parser says.
LONGEST_MESSAGE = 600


class Parser(argparse.ArgumentParser):
    """A parser of a command, or of a part of it, that ends the process with one line for what it does not take.

    Parameters
    ----------
    prog, description
        Name of the command and what it is for.
    version
        Whether it takes ``--version``; the parts of a command do not.
    """

    def __init__(self, prog: str, description: str, version: bool = True) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)
        self._parts: list[Parser] = []
        if version:
            add_version(self)

    def add_commands(self, descriptions: dict[str, str]) -> dict[str, Parser]:
        """Let it take a command with options of its own, in ``command``; return the parser of each by its name."""
        commands = self.add_subparsers(required=True, metavar="COMMAND", dest="command")
        made = {
            name: commands.add_parser(name, help=words, description=words, prog=f"{self.prog} {name}", version=False)
            for name, words in descriptions.items()
        }
        self._parts += made.values()
        return made

    def names(self) -> list[str]:
        """Of its options and those of its commands."""
        return [*self._option_string_actions, *(name for part in self._parts for name in part.names())]

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """As argparse asks for each value, whose words would name no other one."""
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, refused_choice(value, [*action.choices]))

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> object:
        """As argparse reads the values of an option, of which it would drop a bare ``--``."""
        if action.option_strings and "--" in arg_strings:
            raise argparse.ArgumentError(action, f"a value is missing; {HELP}")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Say on a line what is wrong, and end the process."""
        self.exit(USAGE, f"{self.prog}: error: {refusal(message, self.names())}\n")


def refused_choice(value: object, choices: Sequence[str]) -> str:
    """What to say of a value that is none of the choices."""
    return f"{shown(value)} is not allowed; choose one of {', '.join(choices)}{nearest(value, choices)}"


def refusal(message: str, names: Iterable[str]) -> str:
    """What a parser says, on one line, with the beginnings of long values, and with what to do.

    Parameters
    ----------
    message
        As argparse has it.
    names
        Of the options that there are.
    """
    line = short_message(message)
    if unknown := re.match(r"unrecognized arguments: (--[\w.-]+)", line):
        return f"{line}{nearest(unknown[1].replace('_', '-'), names)}; {HELP}"
    if missing := re.match(r"argument (\S+): expected .*argument", line):
        return f"{missing[1]}: a value is missing; {HELP}"
    if unasked := re.match(r"argument (\S+): ignored explicit argument (.*)", line):
        return f"{unasked[1]}: {unasked[2]} is not allowed; it takes no value, leave that out"
    if missing := re.match(r"the following arguments are required: (.*)", line):
        return f"{missing[1]}: it is needed; {HELP}"
    told = line.removeprefix("argument ")
    return told if "; " in told else f"{told}; {HELP}"


def short_message(message: str) -> str:
    """A message on one line, with the beginnings of long values."""
    words = (shortened(word) if word.isprintable() else shown(word) for word in message.split())
    return shortened(" ".join(words), LONGEST_MESSAGE)


def whole(least: int) -> Callable[[str], int]:
    """What reads a whole number from ``least`` on, for the ``type`` of an option."""

    def read(text: str) -> int:
        remedy = f"give a whole number of {least} or more"
        try:
            number = int(text)
        except ValueError:  # also of thousands of digits
            raise refused(text, remedy) from None
        if number < least:
            raise refused(text, remedy)
        if number > LARGEST:
            raise refused(text, "give a number of 64 bits")
        return number

    return read


def above_zero(text: str) -> float:
    """A number above 0, for the ``type`` of an option."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < math.inf:
        raise refused(text, "give a number above 0")
    return number


def names_of(choices: Sequence[str], nothing: str = "") -> Callable[[str], tuple[str, ...]]:
    """What reads names with commas between them, each one of the choices; ``nothing`` is the word for none."""

    def read(text: str) -> tuple[str, ...]:
        names = () if nothing and text == nothing else tuple(text.split(","))
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(refused_choice(name, [*choices, nothing] if nothing else choices))
        return names

    return read


def directory(text: str) -> Path:
    """A directory that is there or can be made, for the ``type`` of an option."""
    if remedy := remedy_for_directory(text):
        raise refused(text, remedy)
    return Path(text)


def remedy_for_directory(text: str) -> str:
    """What to do about a directory that is not there and cannot be made, or not be written; else nothing."""
    place = Path(text).absolute()
    try:
        there = next(path for path in (place, *place.parents) if path.exists())
    except OSError as error:  # such as a name that is too long
        return f"give another directory ({error.strerror})"
    writable = text and there.is_dir() and os.access(there, os.W_OK)
    return "" if writable else "give a directory that can be written"


def refused(text: str, remedy: str) -> argparse.ArgumentTypeError:
    """The error to raise for the text of a value, with what to do."""
    return argparse.ArgumentTypeError(f"{shown(text)} is not allowed; {remedy}")
