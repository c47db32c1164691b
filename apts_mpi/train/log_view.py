"""What the events of a training run came to over all ranks, as a table and for ``summary.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, fields
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import OTHER, Event, Events

# In the order in which an iteration comes to them. A rank's time is in one of them only.
NAMES = (
    *("data", "global evaluation", "local solves", "assembly", "coarse", "judge", "global step"),
    *("optimizer", "metrics", "checkpoint", "wait", OTHER),
)

# Columns that the table needs.
WIDTH = 108


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
        Of each event ``calls``, ``messages``, ``bytes`` and ``gradient_evaluations`` of the rank with most of them;
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
        columns += [of[name].max(axis=0) for name in ("messages", "bytes", "work")]
        columns += [of["own_seconds"].sum(axis=0) / of["own_seconds"].sum(), under_way, waited]
        return np.stack(columns, axis=1).ravel().tolist()

    rows = np.array(comm.agree(own, decide)).reshape(len(NAMES), -1).tolist()
    return {
        name: {
            "calls": int(calls),
            "seconds_max": largest,
            "seconds_min": least,
            "ratio": largest / least if least > 0.0 else None,
            "messages": int(messages),
            "bytes": int(size),
            "gradient_evaluations": work * comm.size / batch_size,
            "share": share,
            "overlap": 1.0 - waited / under_way if under_way > 0.0 else None,
        }
        for name, (calls, largest, least, messages, size, work, share, under_way, waited) in zip(
            NAMES, rows, strict=True
        )
        if calls > 0
    }


def print_events(events: Mapping[str, Mapping[str, Any]], ranks: int, console: Console) -> None:
    """Print what `event_table` returned."""
    table = Table(
        title=f"events of {ranks} rank(s)",
        caption="Time, messages, bytes and evaluations of the rank with most; ratio: most to least time of a rank; "
        "share of all time; overlap: of the time that messages were under way, what was not spent waiting.",
    )
    table.add_column("event", no_wrap=True)
    for column in ("calls", "seconds", "ratio", "messages", "bytes", "evaluations", "share", "overlap"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, event in events.items():
        table.add_row(
            name,
            str(event["calls"]),
            f"{event['seconds_max']:.4g}",
            "" if event["ratio"] is None else f"{event['ratio']:.2f}",
            str(event["messages"]),
            f"{event['bytes']:.3g}" if event["bytes"] >= 1e6 else str(event["bytes"]),
            f"{event['gradient_evaluations']:.2f}",
            f"{event['share']:.1%}",
            "" if event["overlap"] is None else f"{event['overlap']:.0%}",
        )
    # A cut number is worse than a line that a narrow terminal breaks.
    Console(file=console.file, quiet=console.quiet, width=max(console.width, WIDTH)).print(table)
