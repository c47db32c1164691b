"""Signals that ask a run to stop at the end of its iteration."""

from __future__ import annotations

import signal
from types import FrameType

# What batch systems send before a job's time is up or when they want its machines.
STOPPING = (signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Notes the signals in a ``with`` block instead of ending the process; the main thread makes it.

    Attributes
    ----------
    received : int
        Number of the last signal, 0 without one.
    """

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> StopSignals:
        self._earlier = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number


def name_of(number: int) -> str:
    """Name of a signal, such as SIGTERM."""
    return signal.Signals(number).name
