"""A file of records that a run does not depend on: what cannot be written waits, what is gone is made again."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from apts_mpi.tools.environment import seconds

# Bytes of records that are written together, and seconds between two tries to write where it has failed.
BLOCK, PAUSE = 8192, 1.0


class LastingFile:
    """Takes records one after the other; what the file has is not kept in memory.

    Once it is made it raises nothing: trouble is told when it begins and when it is over.

    Parameters
    ----------
    path
        Of the file; replaced if it exists.
    tell
        Shows a message.
    begin
        What the file begins with.

    Raises
    ------
    OSError
        If it cannot be made.
    """

    def __init__(self, path: Path, tell: Callable[[str], None], begin: bytes = b"") -> None:
        self._name = str(path)
        # Wherever the process is later.
        self._path = path.absolute()
        self._tell = tell
        # Stays open: of a file that was deleted it is what still reads its contents.
        self._file = make_file(self._path, begin)
        self._made = os.fstat(self._file)
        self._size = len(begin)
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._trouble = ""
        self._next_try = 0.0

    def write(self, record: bytes) -> None:
        """Take a record; it is in the file after the next `flush`, or when a block is full."""
        self._waiting.append(record)
        self._waiting_bytes += len(record)
        if self._waiting_bytes >= BLOCK:
            self.flush()

    def flush(self) -> bool:
        """Bring what waits into the file; return whether all is there."""
        if self._trouble and seconds() < self._next_try:
            return False
        try:
            if not self.is_in_place():
                self._make_again()
            self._write_waiting()
        except OSError as error:
            self._next_try = seconds() + PAUSE
            if not self._trouble:
                self._tell(
                    f"warning: {self._name!r} cannot be written ({error.strerror}); the run goes on, and keeps in "
                    "memory what is missing there until it can"
                )
            self._trouble = str(error.strerror)
            return False
        if self._trouble:
            self._tell(f"note: {self._name!r} can be written again, and has all that was kept in memory")
            self._trouble = ""
        return True

    def is_in_place(self) -> bool:
        """Whether the file is where it was made; raises `OSError` where that cannot be seen."""
        try:
            return os.path.samestat(os.stat(self._path), self._made)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def contents(self) -> bytes:
        """All records so far, wherever they are."""
        self.flush()
        written = b""
        try:
            written = self._read()
        except OSError as error:
            self._tell(f"warning: {self._name!r} cannot be read back ({error.strerror})")
        return written + b"".join(self._waiting)

    def close(self) -> None:
        """Try a last time to write what waits, and tell if it cannot be."""
        if self._file < 0:
            return
        self._next_try = 0.0
        if not self.flush():
            self._tell(f"warning: {self._name!r} lacks its last {len(self._waiting)} records ({self._trouble})")
        with suppress(OSError):
            os.close(self._file)
        self._file = -1

    def _read(self) -> bytes:
        return read_at(self._file, self._size)

    def _make_again(self) -> None:
        """Put all that the file had in its place, where it is gone or a copy of it is.

        What somebody else has put there is left as it is.
        """
        kept = self._read()
        if os.path.lexists(self._path) and not begins_with(self._path, kept[: kept.find(b"\n") + 1]):
            raise FileExistsError(errno.EEXIST, "something else is in its place")
        file = make_file(self._path, kept)
        os.close(self._file)
        self._file, self._made = file, os.fstat(file)
        self._tell(f"warning: {self._name!r} was gone or replaced, and has been written anew")

    def _write_waiting(self) -> None:
        """Append block after block; of one that fails no part of a record stays behind."""
        self._agree_with_the_file()
        while self._waiting:
            block = b"".join(self._next_records())
            try:
                write_at(self._file, block, self._size)
            except OSError:
                # A reader is to find whole records only, also if the run is killed now.
                with suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
            self._size += len(block)
            self._waiting_bytes -= len(block)
            written = 0
            while written < len(block):
                written += len(self._waiting.popleft())

    def _next_records(self) -> list[bytes]:
        """The first that wait, a block of them or one."""
        records, size = [], 0
        for record in self._waiting:
            records.append(record)
            size += len(record)
            if size >= BLOCK:
                break
        return records

    def _agree_with_the_file(self) -> None:
        """See that the file ends where it was left."""
        size = os.fstat(self._file).st_size
        if size < self._size:
            self._size = read_at(self._file, size).rfind(b"\n") + 1
            self._tell(f"warning: {self._name!r} was cut short by something else; what it has lost stays lost")
        if size > self._size:
            os.ftruncate(self._file, self._size)


def make_file(path: Path, contents: bytes) -> int:
    """Make a file at once with its contents, and the directories above it; return its number, open for more.

    Raises
    ------
    OSError
        If it cannot be made; what was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        write_at(file, contents, 0)
        os.replace(temporary, path)
    except OSError:
        os.close(file)
        with suppress(OSError):
            temporary.unlink()
        raise
    return file


def begins_with(path: Path, line: bytes) -> bool:
    """Whether a file begins with a line, or is empty: nothing is lost with it then."""
    if not path.is_file():
        return False
    with path.open("rb") as there:
        return there.read(len(line) or 1) in (line, b"")


def write_at(file: int, contents: bytes, position: int) -> None:
    """Write all of ``contents``."""
    left = memoryview(contents)
    while left:
        written = os.pwrite(file, left, position)
        position += written
        left = left[written:]


def read_at(file: int, size: int) -> bytes:
    """The first ``size`` bytes of a file, or all if it has fewer."""
    parts, position = [], 0
    while position < size and (part := os.pread(file, size - position, position)):
        parts.append(part)
        position += len(part)
    return b"".join(parts)
