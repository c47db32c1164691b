"""Operations under way between ranks: how they start in their order, and the wait for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mpi4py import MPI

from apts_mpi.parallel.stall import NAP, Patience
from apts_mpi.parallel.transport import DeviceEvent
from apts_mpi.parallel.waiting import WAITING, Departed, nobody
from apts_mpi.tools.environment import pause, seconds
from apts_mpi.tools.events import Events


class Starts:
    """Operations to be started in their order, each when its data are where MPI reads them.

    MPI matches operations by their order, on all ranks the same: none may overtake another one.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[DeviceEvent, Callable[[], None]]] = deque()

    def add(self, ready: DeviceEvent, start: Callable[[], None]) -> None:
        """Call ``start`` after ``ready``, at once or in a later call of `advance` or `finish`."""
        self._waiting.append((ready, start))
        self.advance()

    def advance(self) -> None:
        """Start what is ready."""
        while self._waiting and self._waiting[0][0].query():
            self._waiting.popleft()[1]()

    def all_started(self) -> bool:
        """Start what is ready; whether nothing is left that waits for the device."""
        self.advance()
        return not self._waiting

    def finish(self) -> None:
        """Start everything, and wait until it is ready."""
        while self._waiting:
            ready, start = self._waiting.popleft()
            ready.synchronize()
            start()


class Pending:
    """Operations under way; `wait` returns when their results are in the tensors."""

    def __init__(
        self, events: Events, starts: Starts, patience: Patience | None = None, departed: Departed = nobody
    ) -> None:
        self._events = events
        self._departed = departed
        self._starts = starts
        self._patience = patience
        self._operations = 0
        self._requests: list[MPI.Request] = []
        self._finish: list[Callable[[], None]] = []
        self._event = events.present
        self._since: float | None = None

    def add(self, ready: DeviceEvent, start: Callable[[], MPI.Request], finish: Callable[[], None]) -> None:
        """Take in one more operation: after what, how it starts, and what remains to do once it has completed."""
        if self._since is None:
            self._since = seconds()
        self._operations += 1
        self._finish.append(finish)
        self._starts.add(ready, lambda: self._requests.append(start()))

    def progress(self) -> bool:
        """Start what is ready, and give the MPI library time to move data; whether all is done.

        Most libraries move nothing outside of a call.
        """
        done = self._all_done()
        if done:
            self._note_completion(seconds())
        return done

    def _all_done(self) -> bool:
        self._starts.advance()
        return MPI.Request.Testall(self._requests) and len(self._requests) == self._operations

    def wait(self, what: str = "a reduction") -> None:
        """Complete all operations; ``what`` they are, for the message when they do not complete in time."""
        self._wait_for_device()
        began = seconds()
        with self._events.timed("wait"):
            if self._patience is None:
                with WAITING.noted(what, self._departed):
                    MPI.Request.Waitall(self._requests)
            else:
                self._patience.wait(self._all_done, what)
        self._note_completion(began)
        for finish in self._finish:
            finish()
        self._operations = 0
        self._requests.clear()
        self._finish.clear()

    def _wait_for_device(self) -> None:
        """Start all operations, as soon as this rank has computed what they send: no wait for other ranks.

        The others' patience ends while a device hangs, as this rank gives no sign, and they name it.
        """
        if self._patience is None:
            self._starts.finish()
        while not self._starts.all_started():
            # What others have begun moves on meanwhile.
            MPI.Request.Testall(self._requests)
            pause(NAP)

    def _note_completion(self, waiting_since: float) -> None:
        """Add the time that the operations were under way to the event that began them."""
        if self._since is not None:
            now = seconds()
            self._event.under_way += now - self._since
            self._event.waited += now - waiting_since
            self._since = None
