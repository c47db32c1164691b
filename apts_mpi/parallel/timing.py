"""Timings of calls in turn, for the benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mpi4py import MPI

from apts_mpi.parallel.transport import wait_for_device
from apts_mpi.tools.environment import pause, seconds


@dataclass
class Timing:
    """Median seconds of a call, and its quartiles."""

    median: float
    low: float
    high: float


def time_in_turn(
    calls: Sequence[Callable[[], None]],
    repetitions: int,
    warm_up: int = 3,
    between: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = seconds,
) -> list[Timing]:
    """Time calls in turn, so that all meet the same state of a machine that is shared.

    ``between`` is called before each of them and is not timed, nor are the first ``warm_up`` calls of each. ``clock``
    gives the seconds.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(warm_up + repetitions):
        for call, times in zip(calls, taken, strict=True):
            between()
            start = clock()
            call()
            times.append(clock() - start)
    kept = [times[warm_up:] for times in taken]
    # One time is its own quartiles; before Python 3.13 there have to be two.
    quartiles = [statistics.quantiles(times if len(times) > 1 else 2 * times, n=4) for times in kept]
    return [Timing(middle, low, high) for low, middle, high in quartiles]


def clock_of(device: torch.device) -> Callable[[], float]:
    """A clock that is read when a device has done all that it was given."""

    def clock() -> float:
        wait_for_device(device)
        return seconds()

    return clock


def wait_for_all(comm: MPI.Intracomm, interval: float) -> None:
    """Wait until all ranks are here, looking every ``interval`` seconds. Collective.

    A blocking barrier spins, and would take a core from the ranks that are timed.
    """
    arrived = comm.Ibarrier()
    while not arrived.Test():
        pause(interval)
