"""The directory of a run's checkpoints, claimed by a lock, and claimed again where it was lost."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from apts_mpi.errors import InvalidInput
from apts_mpi.tools.environment import pause, process, wall_time

LOCK = ".lock"

# Seconds to wait for the lock, in tries of a tenth: the ranks of a run that was killed may take a moment to end.
LOCK_TRIES = 100
LOCK_PAUSE = 0.1

# Numbers of the open files that lock something for this process.
_HELD: set[int] = set()


class Claim:
    """Makes a directory and locks it for this process, until `release` or the end of the process.

    Parameters
    ----------
    path
        Of the directory.

    Raises
    ------
    InvalidInput, OSError
        If another process has locked it, or it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.mkdir(parents=True, exist_ok=True)
        # Stands in the lock, so that a copy of the directory is known for one.
        self._name = f"{process()}, {wall_time()}\n".encode()
        self._take(lock(path, LOCK_TRIES))

    def renew(self) -> None:
        """Claim the directory again where it, or its lock, was taken away.

        Raises
        ------
        InvalidInput, OSError
            If it is another one's by now, or has checkpoints that this run has not saved; or cannot be made.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        if self.holds:
            return
        if any(self._path.glob("step-*")) and not (is_same(self._path, self._directory) or self._is_copy()):
            raise InvalidInput(
                f"directory {str(self._path)!r} was replaced by one with other checkpoints in it; move them away"
            )
        earlier = self._lock
        self._take(lock(self._path, 1))
        unlock(earlier)

    @property
    def holds(self) -> bool:
        """Whether the directory at the path is the one that was claimed."""
        return is_same(self._path / LOCK, os.fstat(self._lock))

    def check(self) -> None:
        """Raise `InvalidInput` where it no longer is: it was taken away or replaced while a checkpoint was written."""
        if not self.holds:
            raise InvalidInput(
                f"directory {str(self._path)!r} was replaced while a checkpoint was written; leave it where it is"
            )

    def _take(self, number: int) -> None:
        self._lock, self._directory = number, os.stat(self._path)
        with suppress(OSError):
            os.ftruncate(number, 0)
            os.pwrite(number, self._name, 0)

    def _is_copy(self) -> bool:
        """Whether the directory came from this run's, such as to another disk."""
        path = self._path / LOCK
        return path.is_file() and path.read_bytes() == self._name

    def release(self) -> None:
        """Let others have it."""
        unlock(self._lock)


def check_unclaimed(directory: Path) -> None:
    """Raise `InvalidInput` if another process has claimed a directory, which may remove what is in it at any moment."""
    unlock(lock(directory, LOCK_TRIES))


def is_same(path: Path, known: os.stat_result) -> bool:
    """Whether a path leads to what is known."""
    try:
        return os.path.samestat(os.stat(path), known)
    except FileNotFoundError:
        return False


def unlock(number: int) -> None:
    """Close the file that `lock` has opened."""
    _HELD.discard(number)
    os.close(number)


def _leave_locks() -> None:
    for number in _HELD:
        os.close(number)
    _HELD.clear()


# A forked process, such as one that reads data ahead, may outlive a run that was killed: it would keep the lock.
os.register_at_fork(after_in_child=_leave_locks)


def lock(directory: Path, tries: int) -> int:
    """Number of the open file that locks the directory for this process, until it is closed or the process ends."""
    number = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    for _ in range(tries):
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pause(LOCK_PAUSE)
            continue
        except OSError:
            pass  # a file system without locks: two runs in one directory stay unnoticed
        _HELD.add(number)
        return number
    os.close(number)
    raise InvalidInput(f"directory {str(directory)!r}: another run saves checkpoints into it; give each run its own")
