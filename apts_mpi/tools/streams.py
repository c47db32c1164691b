"""Standard output and error that a program may lose: a pipe whose reader has left, a log on a full disk."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from apts_mpi.tools.status import FAILED

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# What shells give for a program that ended as nobody reads it any more.
UNREAD = 128 + signal.SIGPIPE

# What is to be done at the first write that fails.
Lost = Callable[[OSError], None]


class _Descriptor(io.FileIO):
    """Takes all that is written to it, and drops what the file does not take."""

    def __init__(self, number: int, lost: Lost) -> None:
        super().__init__(number, "w", closefd=False)
        self._lost: Lost | None = lost

    def write(self, content: ReadableBuffer) -> int:
        try:
            written = super().write(content)
        except OSError as error:
            # Once: what waits in buffers comes again, at the latest when the interpreter ends.
            lost, self._lost = self._lost, None
            if lost is not None:
                lost(error)
            written = None
        return memoryview(content).nbytes if written is None else written


def outlive_streams() -> None:
    """From now on this process goes on without what its standard output and error do not take.

    For work that is worth more than what is said about it. Streams that were replaced before are left as they are.
    """
    _replace_streams(_ignore, _ignore)


def end_with_reader() -> None:
    """From now on this process ends quietly when nobody reads its standard output any more, as commands of a shell do.

    A disk that is full is told on standard error.
    """
    _replace_streams(_end, _ignore)


def _replace_streams(output_lost: Lost, error_lost: Lost) -> None:
    _occupy_descriptors()
    if sys.stdout is sys.__stdout__:
        sys.stdout = _over(sys.stdout, output_lost)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _over(sys.stderr, error_lost)


def _occupy_descriptors() -> None:
    """Have something open as 0, 1 and 2: else the next file has the number, and takes what MPI or HDF5 print there."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _over(stream: TextIO | None, lost: Lost) -> TextIO:
    """A stream for the file of another; one that leads nowhere for none, which Python has where it began closed."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")
    stream.flush()
    buffer = io.BufferedWriter(_Descriptor(stream.fileno(), lost))
    # A line is written when it is complete, so that what fails does so where it can be dealt with.
    return io.TextIOWrapper(buffer, stream.encoding, stream.errors, line_buffering=True)


def _ignore(error: OSError) -> None:
    pass


def _end(error: OSError) -> None:
    if isinstance(error, BrokenPipeError):
        sys.exit(UNREAD)
    print(f"error: standard output cannot be written ({error.strerror}); free some space", file=sys.stderr)
    sys.exit(FAILED)
