"""What the commands of the package share: ``--version``, how wide a table may be, lines as they are."""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout

from rich.console import Console

from apts_mpi.tools import environment
from apts_mpi.tools.version import __version__

# Columns of a table that goes to a file: enough for its cells to stay on one line.
FILE_WIDTH = 160

VERSION_LINE = f"apts_mpi {__version__}"


def add_version(parser: argparse.ArgumentParser) -> None:
    """Let a parser take ``--version``, which prints the version and ends the process."""
    parser.add_argument("--version", action="version", version=VERSION_LINE, help="Print the version and exit.")


def prints_version(arguments: Sequence[str]) -> bool:
    """Print the version if it is asked for, once for all processes of a job; whether it was.

    For a command whose other options are read under MPI, which the version does without.
    """
    asked = "--version" in arguments
    if asked:
        with said_once():
            print(VERSION_LINE)
    return asked


def say(console: Console, line: str) -> None:
    """Print a line as it is, however long, with no sign in it taken for markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def said_once() -> Iterator[None]:
    """In the block only the first process of a job prints, by what the launcher says: MPI is not needed for it."""
    launched = environment.launcher()
    with ExitStack() as stack:
        if launched is not None and launched[1] > 0:
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield
