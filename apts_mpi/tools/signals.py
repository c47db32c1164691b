"""Signals that ask a run to stop at the end of its iteration, and the one that ends it at once.

Imported before everything else, so that a signal during the imports, which take seconds, counts as well.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

from apts_mpi.tools.status import INTERRUPTED

# What batch systems send before a job's time is up or when they want its machines, Ctrl-C, and a closed terminal.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)

# One Ctrl-C may reach a process twice, from the terminal and from a launcher; of two within this time one counts.
SAME_PRESS = 0.2

# Seconds that other ranks leave the message to rank 0, to print it, and for MPI to end all ranks: below 2 together.
HEAD_START, PRINTING, ENDING = 0.3, 0.2, 1.0

# Written by `StopSignals` itself, where the system writes numbers of signals.
LEFT = 0


class StopSignals:
    """Notes the signals in a ``with`` block instead of ending the process; a second Ctrl-C there ends all ranks.

    A handler in Python runs when the main thread comes back from MPI or torch, which may be never. What counts is
    therefore the system's own handler: it writes the number of the signal into a pipe, which a thread reads at once.
    The main thread makes it; processes that are forked in the block have the default handlers.

    Attributes
    ----------
    received : int
        Number of the last signal, 0 without one.
    """

    def __init__(self) -> None:
        self.received = 0
        self._interrupted: float | None = None

    def __enter__(self) -> StopSignals:
        self._ends = os.pipe()
        os.set_blocking(self._ends[1], False)
        self._earlier_descriptor = signal.set_wakeup_fd(self._ends[1], warn_on_full_buffer=False)
        self._earlier = {number: signal.getsignal(number) for number in STOPPING}
        self.renew()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        _ACTIVE.append(self)
        return self

    def __exit__(self, *exception: object) -> None:
        _ACTIVE.remove(self)
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._earlier_descriptor)
        os.write(self._ends[1], bytes([LEFT]))
        self._thread.join()
        for end in self._ends:
            os.close(end)

    def renew(self) -> None:
        """Take the signals again, from a library that has taken them: some MPIs do so when they are initialised."""
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Also the handler in Python, without which the system's would not write."""
        self.received = number

    def _listen(self) -> None:
        while (number := os.read(self._ends[0], 1)[0]) != LEFT:
            if number not in STOPPING:
                continue
            self.received = number
            if number == signal.SIGINT:
                self._interrupt(time.monotonic())

    def _interrupt(self, now: float) -> None:
        if self._interrupted is None:
            self._interrupted = now
        elif now - self._interrupted > SAME_PRESS:
            end_at_once()


# Those whose block this process is in.
_ACTIVE: list[StopSignals] = []


def _hold_back() -> None:
    """Before a fork: a signal to the child before it has its own handlers would be written into the parent's pipe."""
    if _ACTIVE:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)


def _go_on() -> None:
    if _ACTIVE:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


def _go_on_as_child() -> None:
    """In a child: it would swallow the signal that is to end it, as `multiprocessing.Pool.terminate` sends."""
    if _ACTIVE:
        signal.set_wakeup_fd(-1)
        for number in STOPPING:
            # SIGINT, too: a KeyboardInterrupt would be lost where it comes within this function.
            signal.signal(number, signal.SIG_DFL)
        _ACTIVE.clear()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)


os.register_at_fork(before=_hold_back, after_in_parent=_go_on, after_in_child=_go_on_as_child)


def end_at_once() -> None:
    """End all ranks within two seconds, whatever they do. Does not return."""
    module = sys.modules.get("mpi4py.MPI")
    world = module.COMM_WORLD if module is not None and module.Is_initialized() else None
    if world is not None and world.rank > 0:
        # One message is enough, of rank 0 where the signal went to all.
        time.sleep(HEAD_START)
    message = "interrupted a second time: ended at once; what was saved before is whole: go on from it with --resume"
    print(f"apts_mpi.train: error: {message}", file=sys.stderr, flush=True)
    time.sleep(PRINTING)
    if world is not None:
        # The system ends this process where MPI does not.
        signal.setitimer(signal.ITIMER_REAL, ENDING)
        world.Abort(INTERRUPTED)
        time.sleep(2 * ENDING)
    os.kill(os.getpid(), signal.SIGKILL)


def name_of(number: int) -> str:
    """Name of a signal, such as SIGTERM."""
    return signal.Signals(number).name
