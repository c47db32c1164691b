"""Timers and counters of one rank: seconds, calls, messages, bytes and gradient evaluations."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from apts_mpi.tools.environment import seconds
from apts_mpi.tools.notes import Notes

# A backward pass costs about twice its forward pass; together they are one gradient evaluation.
FORWARD = 1.0 / 3.0
BACKWARD = 2.0 / 3.0

# What the other events of a training run leave over.
OTHER = "other"


@dataclass
class Messages:
    """How many messages this rank sent, or collectives it took part in, and the bytes that it gave to them."""

    messages: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Count one more, of ``size`` bytes."""
        self.messages += 1
        self.bytes += size


@dataclass
class Event(Messages):
    """Totals of one kind of work on this rank.

    Attributes
    ----------
    calls : int
        How often it was done.
    seconds, own_seconds : float
        With and without what other events took within it.
    messages, bytes : int
        Sent in it.
    work : float
        Done in it; unit as in `Events`.
    under_way, waited : float
        Seconds in which non-blocking operations that it started were under way, and those of them that the rank waited.
    memory : float
        Bytes by which the peak of the rank's memory rose in it, without what it rose by in other events within it.
    """

    calls: int = 0
    seconds: float = 0.0
    own_seconds: float = 0.0
    work: float = 0.0
    under_way: float = 0.0
    waited: float = 0.0
    memory: float = 0.0


class Spans:
    """When events began and ended, on the clock of this rank, of the first ones alone so that memory is bounded.

    Parameters
    ----------
    most
        How many are kept, of 18 bytes each.

    Attributes
    ----------
    names : dict of str to int
        Names of events, and their numbers in `kinds`.
    kinds, times : array
        Of each kept event, in the order of their ends, its number, and the seconds when it began and ended.
    dropped : int
        How many were not kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.names: dict[str, int] = {}
        self.kinds = array("H")
        self.times = array("d")
        self.dropped = 0

    def add(self, name: str, start: float, stop: float) -> None:
        """Take in one more."""
        if len(self.kinds) == self._most:
            self.dropped += 1
            return
        self.kinds.append(self.names.setdefault(name, len(self.names)))
        self.times.extend((start, stop))

    @contextmanager
    def block(self, name: str) -> Iterator[None]:
        """Take in the block."""
        start = seconds()
        try:
            yield
        finally:
            self.add(name, start, seconds())


class Events:
    """Totals by name of event, and the work done by this rank.

    Events nest: `Event.own_seconds` of all add up to the seconds of the outermost, so that no second counts twice.

    Attributes
    ----------
    totals : dict of str to Event
        Totals by name of event.
    operations : dict of str to Messages
        The same messages by kind of operation.
    work : float
        Of the present iteration: samples times share of the network times `FORWARD` or `BACKWARD`, summed over
        passes. Divided by the samples of a rank when the batch is spread evenly, it is a number of gradient
        evaluations.
    spans : Spans or None
        Where beginnings and ends are kept as well.
    notes : Notes
        What was done in the place of what could not be.
    peak : callable or None
        Gives the peak of this rank's memory so far, in bytes; None where events take no note of it.
    """

    def __init__(self) -> None:
        self.work = 0.0
        self.spans: Spans | None = None
        self.notes = Notes()
        self.peak: Callable[[], int] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget what was counted; outside of all events."""
        self.totals: dict[str, Event] = defaultdict(Event)
        self.operations: dict[str, Messages] = defaultdict(Messages)
        self._open = [self.totals[OTHER]]
        self._nested = 0.0
        self._highest = 0

    def timed(self, name: str) -> _Timer:
        """Add the seconds of the block to event ``name``."""
        return _Timer(self, name)

    def traced(self, name: str) -> AbstractContextManager[None]:
        """Show the block in a trace, within the event that is being timed, and count nothing."""
        return nullcontext() if self.spans is None else self.spans.block(name)

    @property
    def present(self) -> Event:
        """The innermost event that is being timed."""
        return self._open[-1]

    def message(self, operation: str, size: int) -> None:
        """Count one message of ``size`` bytes sent by this rank in the present event."""
        self.operations[operation].add(size)
        self.present.add(size)

    def note_memory(self, peak: Callable[[], int]) -> None:
        """Count by how much the peak has risen since the last look as the present event's."""
        highest = peak()
        self.present.memory += max(highest - self._highest, 0)
        self._highest = highest

    def count_work(self, samples: int, share: float, cost: float) -> None:
        """Count a pass of ``samples`` samples through ``share`` of the network; ``cost`` is FORWARD or BACKWARD."""
        work = samples * share * cost
        self.work += work
        self.present.work += work


class Stopwatch:
    """Seconds of blocks on this rank, without those in which it waited for others.

    Parameters
    ----------
    events
        Of the rank.

    Attributes
    ----------
    seconds : float
        Of all blocks so far.
    """

    def __init__(self, events: Events) -> None:
        self._events = events
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = seconds() - self._events.totals["wait"].seconds

    def __exit__(self, *_: object) -> None:
        self.seconds += seconds() - self._events.totals["wait"].seconds - self._start


class _Timer:
    """One timed block; a class, as a generator takes twice as long, and small networks have short iterations."""

    __slots__ = ("_event", "_events", "_name", "_nested_before", "_start")

    def __init__(self, events: Events, name: str) -> None:
        self._events = events
        self._name = name

    def __enter__(self) -> None:
        events = self._events
        if events.peak is not None:
            events.note_memory(events.peak)
        self._event = events.totals[self._name]
        events._open.append(self._event)
        self._nested_before, events._nested = events._nested, 0.0
        self._start = seconds()

    def __exit__(self, *_: object) -> None:
        stop = seconds()
        events, event = self._events, self._event
        if events.peak is not None:
            events.note_memory(events.peak)
        elapsed = stop - self._start
        event.calls += 1
        event.seconds += elapsed
        event.own_seconds += elapsed - events._nested
        events._nested = self._nested_before + elapsed
        events._open.pop()
        if events.spans is not None:
            events.spans.add(self._name, self._start, stop)
