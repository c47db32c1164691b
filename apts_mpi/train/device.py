"""The device of a rank, and how its tensors come to MPI."""

from __future__ import annotations

import torch
from mpi4py import MPI

from apts_mpi.errors import WAIT_LIMIT, InvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.gpu_direct import PROBE_LIMIT, choose_transport
from apts_mpi.parallel.transport import choose_device, use_transport
from apts_mpi.train.options import TrainingOptions


def take_device(options: TrainingOptions, comm: Communicator) -> torch.device:
    """Choose the device that the options ask for, and how its tensors come to MPI from now on. Collective.

    Raises
    ------
    SharedInvalidInput
        If there is no such device, or MPI and torch do not go together on it.
    """
    local_rank = comm.local_rank()
    with comm.shared_errors():
        device = choose_device(options.device, local_rank)
        if device.type == "cuda" and MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            # torch calls what a backward pass starts from a thread of its own.
            raise InvalidInput(
                "device: 'cuda' needs an MPI library with MPI_THREAD_SERIALIZED, which this one does not give; "
                "choose --device cpu, or take another library"
            )
    # The other ranks wait for the trial, and their wait has a limit.
    limit = min(PROBE_LIMIT, 0.5 * (options.stall_timeout or WAIT_LIMIT))
    use_transport(device, choose_transport(comm, device, options.transport, limit))
    return device
