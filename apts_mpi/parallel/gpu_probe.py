"""``python -m apts_mpi.parallel.gpu_probe KIND``: whether MPI works on device memory.

`apts_mpi.parallel.gpu_direct` starts it. A process of its own, as MPI libraries crash on it, or never return. Exit
status 0 if all is right.
"""

from __future__ import annotations

import sys

import torch
from mpi4py import MPI

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import ADMITTED_DTYPES, Bytes, Mirror, choose_device, use_transport
from apts_mpi.tools.events import Events

# Elements of each operation: more than what libraries send with the first packet.
ELEMENTS = 2**20


def works(comm: Communicator, device: torch.device) -> bool:
    """Whether sums, gathers and messages are right, as the package makes them. Collective."""
    rank, size = comm.rank, comm.size
    right = True
    for dtype in ADMITTED_DTYPES:
        own = torch.full((ELEMENTS,), rank + 1, dtype=dtype, device=device)
        summed, received, gathered = own.clone(), torch.zeros_like(own), own.repeat(size)
        pending = comm.pending()
        comm.start_sum(pending, Mirror(own), Mirror(summed), 0, ELEMENTS)
        parts = [(ELEMENTS * other, ELEMENTS * (other + 1)) for other in range(size)]
        comm.start_gather(pending, Mirror(gathered), parts)
        comm.start_receive(pending, Bytes(received), (rank - 1) % size, 0)
        comm.start_send(pending, Bytes(own), (rank + 1) % size, 0)
        pending.wait()
        right = right and bool((summed == size * (size + 1) // 2).all())
        right = right and bool((torch.arange(1, size + 1, device=device) == gathered.view(size, -1).T).all())
        right = right and bool((received == (rank - 1) % size + 1).all())
    return right


def main() -> None:
    """Try on all ranks, of which one alone would show nothing: MPI then moves no message."""
    comm = Communicator(MPI.COMM_WORLD, Events())
    device = choose_device(sys.argv[1], comm.local_rank())
    use_transport(device, "direct")
    sys.exit(0 if comm.size > 1 and works(comm, device) else 1)


if __name__ == "__main__":
    main()
