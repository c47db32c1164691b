"""Timers and counters of one rank: seconds, calls, messages, bytes and gradient evaluations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from apts_mpi.environment import seconds

# A backward pass costs about twice its forward pass; together they are one gradient evaluation.
FORWARD = 1.0 / 3.0
BACKWARD = 2.0 / 3.0


@dataclass
class Event:
    """Totals of one kind of work on this rank."""

    calls: int = 0
    seconds: float = 0.0
    messages: int = 0
    bytes: int = 0


class Events:
    """Totals by name of event, and the work done by this rank.

    Attributes
    ----------
    totals : dict of str to Event
        Totals by name of event.
    work : float
        Of the present iteration: samples times share of the network times `FORWARD` or `BACKWARD`, summed over
        passes. Divided by the samples of a rank when the batch is spread evenly, it is a number of gradient
        evaluations.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Event] = defaultdict(Event)
        self.work = 0.0

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to event ``name``."""
        start = seconds()
        try:
            yield
        finally:
            event = self.totals[name]
            event.calls += 1
            event.seconds += seconds() - start

    def message(self, name: str, size: int) -> None:
        """Count one message of ``size`` bytes sent by this rank in event ``name``."""
        event = self.totals[name]
        event.messages += 1
        event.bytes += size

    def count_work(self, samples: int, share: float, cost: float) -> None:
        """Count a pass of ``samples`` samples through ``share`` of the network; ``cost`` is FORWARD or BACKWARD."""
        self.work += samples * share * cost
