"""``python -m apts_mpi.device_probe KIND``: whether MPI sums device memory, for `apts_mpi.doctor` to start.

A process of its own, as MPI libraries crash on it. Exit status 0 if the sums are right.
"""

from __future__ import annotations

import sys

from mpi4py import MPI

from apts_mpi.comm import Communicator
from apts_mpi.events import Events
from apts_mpi.transport import choose_device, sums_directly


def main() -> None:
    """Try on all ranks."""
    comm = Communicator(MPI.COMM_WORLD, Events())
    device = choose_device(sys.argv[1], comm.local_rank())
    sys.exit(0 if sums_directly(comm.mpi, device) else 1)


if __name__ == "__main__":
    main()
