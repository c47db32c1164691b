"""What this process waits for, and since when: for `apts_mpi.parallel.watchdog`, which looks from another thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from apts_mpi.tools.environment import seconds

# The rank of which is known that it has left, if any.
Departed = Callable[[], int | None]


def nobody() -> None:
    """No rank has left."""


class Waiting:
    """The wait for other ranks without a limit in which this process is, and when it last had to do with them."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._what = ""
        self._departed: Departed = nobody
        self._last = seconds()

    @contextmanager
    def noted(self, what: str, departed: Departed = nobody) -> Iterator[None]:
        """The block waits for ``what``, in vain if a rank has ``departed``; of nested blocks the outermost counts."""
        if self._since is not None:
            yield
            return
        self._what, self._departed, self._since = what, departed, seconds()
        try:
            yield
        finally:
            self._since = None
            self.sign()

    def sign(self) -> None:
        """This process has had to do with others."""
        self._last = seconds()

    def longest(self) -> tuple[float, str]:
        """Seconds of the present wait, 0 if there is none, and what for."""
        since = self._since
        return (0.0 if since is None else seconds() - since), self._what

    def departed(self) -> int | None:
        """A rank that was to take part in what is waited for, and has left."""
        return self._departed()

    def silence(self) -> float:
        """Seconds since this process last had to do with others; 0 while it waits for them."""
        return 0.0 if self._since is not None else seconds() - self._last


WAITING = Waiting()
