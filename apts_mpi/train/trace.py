"""What each rank did when, in one file in the Trace Event Format, which ui.perfetto.dev opens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from apts_mpi.errors import InvalidInput
from apts_mpi.parallel.clocks import clock_offset
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.environment import host, seconds
from apts_mpi.tools.events import OTHER, Events, Spans

# Events of a rank that are kept, from the first on: some thousands of iterations, 2 MB of memory and 10 MB of the file.
# Perfetto in a browser opens files up to about a gigabyte.
MOST = 100_000

# The outermost event has in it all that no other claims.
SHOWN = {OTHER: "training"}

NANOSECONDS = 1_000_000_000


@dataclass(frozen=True)
class _OfRank:
    """What a rank gives: its spans, and where and by which clock they were."""

    host: str
    offset: float
    uncertainty: float
    spans: Spans


class Trace:
    """Keeps the events of all ranks from now on. Making one is collective.

    Parameters
    ----------
    events
        Those of this rank.
    comm
        The ranks.
    """

    def __init__(self, events: Events, comm: Communicator) -> None:
        self._comm = comm
        self._origin = comm.decide(lambda: [seconds()])[0]
        self._events = events
        self._spans = events.spans = Spans(MOST)
        self._clock = clock_offset(comm)

    def end(self) -> None:
        """Keep no more events."""
        self._events.spans = None

    def write(self, path: Path) -> int:
        """Write the file, on rank 0; return how many events were left out on all ranks together. Collective.

        Raises
        ------
        InvalidInput
            On rank 0 alone, if it cannot be written.
        """
        dropped = self._comm.total(self._spans.dropped)
        parts = self._comm.in_turn(_OfRank(host(), *self._clock, self._spans))
        if self._comm.rank > 0:
            for _ in parts:
                pass
            return dropped
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                self._write(file, parts)
            os.replace(temporary, path)
        except OSError as error:
            for _ in parts:
                pass  # the other ranks wait until theirs is taken
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise InvalidInput(
                f"trace: {str(path)!r} cannot be written ({error.strerror}); give another run_dir"
            ) from error
        return dropped

    def _write(self, file: IO[str], parts: Iterator[_OfRank]) -> None:
        clocks = []
        file.write('{"traceEvents": [\n')
        for rank, part in enumerate(parts):
            file.write(",\n" if rank else "")
            file.write(",\n".join(_lines(rank, part, self._origin)))
            clocks.append({"ahead": part.offset, "uncertainty": part.uncertainty, "dropped": part.spans.dropped})
        file.write(f'\n], "displayTimeUnit": "ms", "otherData": {json.dumps({"clocks in seconds": clocks})}}}\n')


def _lines(rank: int, part: _OfRank, origin: float) -> Iterator[str]:
    """The events of a rank, one object a line."""
    yield _metadata("process_name", rank, {"name": f"rank {rank} on {part.host}"})
    yield _metadata("process_sort_index", rank, {"sort_index": rank})
    yield _metadata("thread_name", rank, {"name": "events"})
    spans, names = part.spans, [json.dumps(SHOWN.get(name, name)) for name in part.spans.names]
    zero = origin + part.offset
    for number, kind in enumerate(spans.kinds):
        # Whole nanoseconds: rounded apart, begin and duration could lead out of the event around.
        start, stop = (round((time - zero) * NANOSECONDS) for time in spans.times[2 * number : 2 * number + 2])
        yield (
            f'{{"name": {names[kind]}, "ph": "X", "ts": {start / 1000:.3f}, "dur": {(stop - start) / 1000:.3f}, '
            f'"pid": {rank}, "tid": 0}}'
        )


def _metadata(name: str, rank: int, values: dict[str, Any]) -> str:
    return json.dumps({"name": name, "ph": "M", "pid": rank, "tid": 0, "args": values})
