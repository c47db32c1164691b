"""Events: where time, messages and work go, on one rank and over all."""

import math
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy, make_solver, options
from staged_networks import NETWORKS, built, staged

from apts_mpi.parallel import clocks
from apts_mpi.parallel import nonblocking as pending_module
from apts_mpi.parallel.clocks import clock_offset
from apts_mpi.parallel.communicator import SHORT, Communicator
from apts_mpi.parallel.transport import HostStreams
from apts_mpi.staged.solver import StagedAPTS
from apts_mpi.tools import events as events_module
from apts_mpi.tools import memory
from apts_mpi.tools.events import FORWARD, OTHER, Events, Spans
from apts_mpi.train.baselines import DataParallel
from apts_mpi.train.log_view import event_table
from apts_mpi.train.options import BaselineOptions

KEYS = {
    "calls", "seconds_max", "seconds_min", "seconds_inclusive", "ratio", "messages", "bytes", "gradient_evaluations",
    "memory", "share", "overlap",
}  # fmt: skip


class Clock:
    """A clock that the test sets."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (events_module, pending_module):
        monkeypatch.setattr(module, "seconds", clock)
    return clock


def test_no_second_counts_twice(clock):
    events = Events()
    with pytest.raises(KeyError), events.timed("outer"):
        clock.time += 1.0
        for _ in range(2):
            with events.timed("inner"):
                clock.time += 2.0
                with events.timed("wait"):
                    clock.time += 4.0
        clock.time += 8.0
        raise KeyError
    found = {name: (e.calls, e.seconds, e.own_seconds) for name, e in events.totals.items() if name != OTHER}
    assert found == {"outer": (1, 21.0, 9.0), "inner": (2, 12.0, 4.0), "wait": (2, 8.0, 8.0)}


def test_rises_of_the_peak_of_memory_belong_to_the_innermost_event():
    """What was there before belongs to the outermost, and all together they are the peak."""
    events, peak = Events(), [1000]
    events.peak = lambda: peak[0]
    with events.timed(OTHER):
        peak[0] += 1
        with events.timed("outer"):
            peak[0] += 2
            with events.timed("inner"):
                peak[0] += 4
            peak[0] -= 7  # a peak that something else has reset
            with events.timed("inner"):
                peak[0] += 8
            peak[0] += 16
        peak[0] += 32
    assert {name: event.memory for name, event in events.totals.items()} == {OTHER: 1033, "outer": 18, "inner": 12}


def test_peak_of_this_process():
    """At least what it has now; of a process that a larger one has started it is not known."""
    peak = memory.peak_of(torch.device("cpu"))
    if peak is None:
        pytest.skip("a larger process has started this one")
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    assert 2**26 < resident <= peak() + memory.INACCURACY


def test_peak_of_a_larger_process(monkeypatch):
    monkeypatch.setattr(memory, "_peak_of_host", lambda: 2**50)
    assert memory.peak_of(torch.device("cpu")) is None


def test_messages_and_work_belong_to_the_innermost_event():
    events = Events()
    events.message("sum", 1)
    with events.timed("outer"):
        events.message("sum", 2)
        with events.timed("inner"):
            events.message("gather", 4)
            events.count_work(10, 0.5, FORWARD)
        events.message("sum", 8)
    assert {name: (e.messages, e.bytes) for name, e in events.totals.items()} == {
        OTHER: (1, 1),
        "outer": (2, 10),
        "inner": (1, 4),
    }
    assert {name: (o.messages, o.bytes) for name, o in events.operations.items()} == {"sum": (3, 11), "gather": (1, 4)}
    assert events.totals["inner"].work == events.work == pytest.approx(5.0 / 3.0)


def test_time_under_way(clock):
    """Begun at 100, looked at in vain, waited for from 103 to 104; begun again, and found done after 5 seconds."""

    class Slow:
        """Patience that takes a second."""

        def wait(self, done, what):
            clock.time += 1.0
            while not done():
                pass

    events = Events()
    comm = Communicator(MPI.COMM_SELF, events, Slow())
    with events.timed("assembly"):
        pending = comm.pending()
    buffer = np.empty(1)
    pending.add(HostStreams.Event(), lambda: comm.mpi.Irecv(buffer, 0, 5), lambda: None)
    clock.time += 3.0
    assert not pending.progress()
    comm.mpi.Send(np.ones(1), 0, 5)
    pending.wait()
    event = events.totals["assembly"]
    assert (event.under_way, event.waited) == (4.0, 1.0)
    pending.add(HostStreams.Event(), lambda: MPI.REQUEST_NULL, lambda: None)
    clock.time += 5.0
    assert pending.progress() and pending.progress()
    clock.time += 7.0
    pending.wait()
    assert (event.under_way, event.waited) == (9.0, 1.0)


# Bytes of a record of rank 0's.
RECORD = 8 * (1 + SHORT)


@pytest.mark.parametrize("patient", [False, True])
def test_own_device_is_not_waited_for_as_others_are(clock, patient):
    """Ten seconds of the device, in which this rank can start nothing, then a second for others."""

    class Late:
        """An event of a device that is ten seconds behind."""

        def record(self, stream): ...

        def query(self):
            clock.time += 1.0
            return clock.time >= 110.0

        def synchronize(self):
            clock.time = 110.0

    class Impatient:
        def wait(self, done, what):
            assert clock.time >= 110.0 and done()
            clock.time += 1.0

    events = Events()
    pending = Communicator(MPI.COMM_SELF, events, Impatient() if patient else None).pending()
    pending.add(Late(), lambda: MPI.REQUEST_NULL, lambda: None)
    pending.wait()
    assert events.totals["wait"].seconds == (1.0 if patient else 0.0)


def test_spans_are_bounded():
    spans = Spans(3)
    for number in range(5):
        spans.add(f"event {number % 2}", float(number), number + 0.5)
    assert spans.names == {"event 0": 0, "event 1": 1}
    assert (list(spans.kinds), list(spans.times)) == ([0, 1, 0], [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    assert spans.dropped == 2


def table_of_step(solver, batch, batch_size):
    """The table of one iteration."""
    solver.events.clear()
    with solver.events.timed(OTHER):
        result = solver.step(batch)
    return result, event_table(solver.events, batch_size, solver.comm)


def check(table, world):
    """What holds of every table."""
    for name, event in table.items():
        assert set(event) == KEYS
        assert 0.0 <= event["seconds_min"] <= event["seconds_max"] <= event["seconds_inclusive"]
        assert event["memory"] is None  # nothing takes note of it
        assert event["ratio"] is None or event["ratio"] >= 1.0, name
        assert event["overlap"] is None or -1e-12 <= event["overlap"] <= 1.0
    assert math.fsum(event["share"] for event in table.values()) == pytest.approx(1.0, rel=1e-12)
    assert set(world.allgather(str(table))) == {str(table)}
    if world.size == 1:
        assert all(event["ratio"] in (None, 1.0) for event in table.values())


@pytest.mark.mpi
def test_an_iteration_by_hand(world):
    """One subdomain a rank, one local iteration, which needs no gradient of its own."""
    network = classifier()
    count = sum(parameter.numel() for parameter in network.parameters())
    solver = make_solver(world, options(subdomains=world.size, partition="index", initial_radius=0.05), network)
    samples = 24 * world.size
    result, table = table_of_step(solver, classified(samples), samples)
    check(table, world)
    found = {name: (event["messages"], event["bytes"]) for name, event in table.items()}
    own = world.allgather(solver.events.totals["assembly"].bytes)
    assert sum(own) == 8 * count  # of all corrections each rank hands out its own
    several = world.size > 1
    assert found == {
        # Whether all ranks can use the batch (a number), have the same one (four), and of how many targets it is (two
        # numbers that are put together). In the first step twenty in all: whether the loss can be used, twice, its kind
        # (two numbers), whether it is the same again (a number) and on all ranks (three numbers), and on the memory
        # (three numbers). Each of the five times rank 0 decides.
        "data": (19 + several, 8 * (3 + 4 * several) + 24 * 2 + 8 * (2 + 1 + 3 + 3) + 5 * RECORD),
        "global evaluation": (1, 8 * count),
        "local solves": (1, 8),  # in the first step whether all local solvers can do theirs
        "assembly": (1, max(own)),
        # Nineteen numbers of each rank, which are put together, and what rank 0 decides.
        "judge": (2, 24 * 19 + RECORD),
        "wait": (0, 0),
        OTHER: (1, 8 * 4),  # whether the network is as it was
    }
    work = {name: event["gradient_evaluations"] for name, event in table.items() if event["gradient_evaluations"]}
    assert work == pytest.approx({"global evaluation": 1.0, "judge": FORWARD}, rel=1e-12)
    assert sum(work.values()) == pytest.approx(result.gradient_evaluations, rel=1e-12)
    assert {name for name, event in table.items() if event["overlap"] is not None} == {
        *("global evaluation", "assembly", "wait")
    }
    # Reduction and assembly are completed, the twenty of the batch, those of network and local solves, and the two
    # of the verdict block.
    assert table["wait"]["calls"] == 25 + several and table["judge"]["calls"] == 1


@pytest.mark.mpi
@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_baselines(world, optimizer):
    network = classifier()
    count = sum(parameter.numel() for parameter in network.parameters())
    solver = DataParallel(
        network, cross_entropy, comm=world, options=BaselineOptions(optimizer=optimizer, learning_rate=1e-3)
    )
    samples = 24 * world.size
    result, table = table_of_step(solver, classified(samples), samples)
    check(table, world)
    evaluations = table["global evaluation"]["calls"]
    assert evaluations == 1 if optimizer == "adam" else evaluations > 1
    assert table["optimizer"]["calls"] == 1 and table["optimizer"]["messages"] == 0
    moved = 16 * (world.size > 1)
    assert table["global evaluation"]["bytes"] == evaluations * (8 * count + 24 * 3 + RECORD) + moved
    assert table["global evaluation"]["messages"] == 3 * evaluations + (world.size > 1)  # which buffers moved
    work = table["global evaluation"]["gradient_evaluations"]
    assert work == pytest.approx(evaluations) and work == pytest.approx(result.gradient_evaluations)


SENDS = (
    "Isend",
    "isend",
    "Iallreduce",
    "Iallgatherv",
    "Gather",
    "Allgather",
    "Allreduce",
    "Bcast",
    "Reduce",
    "Ibarrier",
    "bcast",
    "allgather",
    "allreduce",
)


class Counting:
    """An MPI communicator that counts what is asked of it."""

    def __init__(self, comm, counts):
        self._comm = comm
        self._counts = counts

    def __getattr__(self, name):
        if name in SENDS:
            self._counts[name] = self._counts.get(name, 0) + 1
        return getattr(self._comm, name)


def replicated(world):
    chosen = options(subdomains=None, solver="tr", iterations=2, overlap=1, global_step="first-order")
    return make_solver(world, chosen), classified()


def in_stages(world):
    chosen = staged(options(subdomains=None), micro_batches=3, coarse="gauss-newton")
    return StagedAPTS(built(NETWORKS["mlp"][0]), cross_entropy, comm=world, options=chosen), NETWORKS["mlp"][1][0]


@pytest.mark.mpi
@pytest.mark.all_sizes(make=replicated)
@pytest.mark.parametrize("make", [replicated, in_stages])
def test_every_message_is_in_an_event(world, make):
    """Against the calls that reach the MPI library."""
    solver, batch = make(world)
    counts = {}
    found = [solver.comm, solver.holding.decomposition.team, *([solver.holding.replica] if make is in_stages else [])]
    for communicator in found:
        communicator._mpi = Counting(communicator._mpi, counts)
    for _ in range(2):
        counts.clear()
        solver.events.clear()
        with solver.events.timed(OTHER):
            solver.step(batch)
        assert sum(event.messages for event in solver.events.totals.values()) == sum(counts.values()) > 0
        assert sum(kind.messages for kind in solver.events.operations.values()) == sum(counts.values())
        check(event_table(solver.events, len(batch[0]), solver.comm), world)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_clocks_are_compared(world, monkeypatch):
    """Of ranks on one host, whose clocks are one, and are put apart here."""
    ahead = 1000.0 * world.rank
    original = clocks.seconds
    monkeypatch.setattr(clocks, "seconds", lambda: original() + ahead)
    offset, uncertainty = clock_offset(Communicator(world, Events()))
    assert abs(offset - ahead) <= uncertainty + 1e-9
    assert uncertainty == 0.0 if world.rank == 0 else 0.0 < uncertainty < 1.0


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_parts_come_in_turn(world):
    parts = list(Communicator(world, Events()).in_turn({"rank": world.rank}))
    assert parts == ([{"rank": rank} for rank in range(world.size)] if world.rank == 0 else [])
