"""What the events of a training run came to over all ranks, as a table and for ``summary.json``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, fields
from typing import Any

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import OTHER, Event, Events

# In the order in which an iteration comes to them. A rank's time is in one of them only.
NAMES = (
    *("data", "global evaluation", "local solves", "assembly", "coarse", "judge", "global step"),
    *("optimizer", "metrics", "checkpoint", "wait", OTHER),
)

# Headings of the table; of each the name of its numbers in `event_table`, and how they are written.
COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("calls", "calls", str),
    ("seconds", "seconds_max", "{:.4g}".format),
    ("inclusive", "seconds_inclusive", "{:.4g}".format),
    ("share", "share", "{:.1%}".format),
    ("ratio", "ratio", "{:.2f}".format),
    ("overlap", "overlap", "{:.0%}".format),
    ("messages", "messages", str),
    ("bytes", "bytes", decimal),
    ("evaluations", "gradient_evaluations", "{:.2f}".format),
    ("memory", "memory", decimal),
)

EXPLANATION = (
    "Of the rank with most. seconds: without, inclusive: with what other events took within it; share: of all time; "
    "ratio: most to least seconds of a rank; overlap: of the time that messages were under way, what was not spent "
    "waiting; memory: by how much its peak rose, in other with what was there before."
)


def event_table(events: Events, batch_size: int, comm: Communicator) -> dict[str, dict[str, Any]]:
    """The events of all ranks, by name, those that occurred on none left out. Collective.

    Parameters
    ----------
    events
        Of this rank; no event is open.
    batch_size
        Samples of a batch, over all ranks.
    comm
        The ranks.

    Returns
    -------
    dict
        Of each event ``calls``, ``messages``, ``bytes``, ``gradient_evaluations`` and ``memory`` (bytes; None where it
        was not looked at) of the rank with most of them; ``seconds_inclusive`` likewise, with what is in other events;
        ``seconds_max`` and ``seconds_min`` over the ranks, without what is in other events, and their ``ratio``, None
        where a rank had none; ``share``, of the time of all ranks together; ``overlap``, of the time in which
        non-blocking operations that it started were under way the share that the ranks did not wait, None without any.
    """
    own = [float(value) for name in NAMES for value in astuple(events.totals.get(name, Event()))]
    places = {field.name: place for place, field in enumerate(fields(Event))}

    def decide(gathered: np.ndarray) -> list[float]:
        table = gathered.reshape(comm.size, len(NAMES), len(places))
        of = {name: table[:, :, place] for name, place in places.items()}
        under_way, waited = (of[name].sum(axis=0) for name in ("under_way", "waited"))
        # All operations are waited for in one event, whichever began them.
        under_way[NAMES.index("wait")], waited[NAMES.index("wait")] = under_way.sum(), waited.sum()
        columns = [of["calls"].max(axis=0), of["own_seconds"].max(axis=0), of["own_seconds"].min(axis=0)]
        columns += [of[name].max(axis=0) for name in ("seconds", "messages", "bytes", "work", "memory")]
        columns += [of["own_seconds"].sum(axis=0) / of["own_seconds"].sum(), under_way, waited]
        return np.stack(columns, axis=1).ravel().tolist()

    rows = np.array(comm.agree(own, decide)).reshape(len(NAMES), -1).tolist()
    return {
        name: {
            "calls": int(calls),
            "seconds_max": largest,
            "seconds_min": least,
            "seconds_inclusive": inclusive,
            "ratio": largest / least if least > 0.0 else None,
            "messages": int(messages),
            "bytes": int(size),
            "gradient_evaluations": work * comm.size / batch_size,
            "memory": int(memory) if events.peak is not None else None,
            "share": share,
            "overlap": 1.0 - waited / under_way if under_way > 0.0 else None,
        }
        for name, (calls, largest, least, inclusive, messages, size, work, memory, share, under_way, waited) in zip(
            NAMES, rows, strict=True
        )
        if calls > 0
    }


def print_events(events: Mapping[str, Mapping[str, Any]], ranks: int, console: Console) -> None:
    """Print what `event_table` returned, in as many tables as the width of the console asks for."""
    title = f"events of {ranks} rank(s)"
    for columns in _fitting(_cells(events), events, console.width):
        table = Table(title=title)
        table.add_column("event", no_wrap=True)
        for heading in columns:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in zip(events, *columns.values(), strict=True):
            table.add_row(*row)
        # A cut number is worse than a line that a very narrow terminal breaks.
        Console(file=console.file, quiet=console.quiet, width=max(console.width, _width(events, columns))).print(table)
        title = ""
    console.print(EXPLANATION, highlight=False)


def _cells(events: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """What stands under each heading, a cell an event; a column without anything is left out."""
    columns = {
        heading: ["" if event[name] is None else written(event[name]) for event in events.values()]
        for heading, name, written in COLUMNS
    }
    return {heading: cells for heading, cells in columns.items() if any(cells)}


def _width(names: Iterable[str], columns: Mapping[str, Sequence[str]]) -> int:
    """Characters of a table: three beside each cell, and the last border."""
    widest = [max(map(len, ("event", *names)))] + [max(map(len, (name, *cells))) for name, cells in columns.items()]
    return sum(size + 3 for size in widest) + 1


def _fitting(columns: Mapping[str, list[str]], names: Iterable[str], width: int) -> Iterator[dict[str, list[str]]]:
    """The columns of each table: as many as fit beside the names, at least one."""
    taken: dict[str, list[str]] = {}
    for heading, cells in columns.items():
        if taken and _width(names, taken | {heading: cells}) > width:
            yield taken
            taken = {}
        taken[heading] = cells
    yield taken
