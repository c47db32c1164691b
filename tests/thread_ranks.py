"""Ranks that are threads of one process, for what is to be tested without mpirun."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
from mpi4py import MPI

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import Events


class ThreadRank(MPI.Intracomm):
    """What `Communicator` needs of an MPI communicator to exchange small objects."""

    rank = 0

    def __new__(cls, *_):
        return super().__new__(cls, MPI.COMM_SELF)

    def __init__(self, rank, slots, barrier):
        self.rank, self.slots, self.barrier = rank, slots, barrier

    def Get_attr(self, key):
        return SimpleNamespace(comm=self, groups={}, departures=SimpleNamespace(departed=lambda: None))

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return len(self.slots)

    def allgather(self, value):
        self.slots[self.rank] = value
        self.barrier.wait()
        values = list(self.slots)
        self.barrier.wait()
        return values

    def Allreduce(self, own, numbers, op):
        assert own is MPI.IN_PLACE and op == MPI.MAX
        numbers[...] = np.max(self.allgather(numbers.copy()), axis=0)


def on_ranks(size, function):
    """What ``function`` returns on each of ``size`` ranks, called with the rank's communicator."""
    slots, barrier = [None] * size, threading.Barrier(size, timeout=60)  # a rank that failed does not come
    comms = [Communicator(ThreadRank(rank, slots, barrier), Events()) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(function, comms))
