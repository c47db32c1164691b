"""The run that the options describe: device, transport, problem and solver."""

from __future__ import annotations

import functools

import torch
from mpi4py import MPI

from apts_mpi.errors import InvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.gpu_direct import PROBE_LIMIT, choose_transport
from apts_mpi.parallel.transport import choose_device, use_transport
from apts_mpi.problems import build
from apts_mpi.train.options import STALL_TIMEOUT, TrainingOptions
from apts_mpi.train.staged import StagedTraining, build_staged_problem
from apts_mpi.train.training import Training


def make_training(options: TrainingOptions, comm: Communicator, world: MPI.Intracomm) -> Training:
    """The run that the options describe. Collective."""
    local_rank = comm.local_rank()
    make = functools.partial(
        build,
        options.problem,
        data_dir=options.data_dir,
        train_samples=options.train_samples,
        seed=options.seed,
        dtype=getattr(torch, options.dtype),
    )
    with comm.shared_errors():
        device = choose_device(options.device, local_rank)
        if device.type == "cuda" and MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            # torch calls what a backward pass starts from a thread of its own.
            raise InvalidInput(
                "device: 'cuda' needs an MPI library with MPI_THREAD_SERIALIZED, which this one does not give; "
                "choose --device cpu, or take another library"
            )
    # The other ranks wait for the trial, and their wait has a limit.
    limit = min(PROBE_LIMIT, 0.5 * (options.stall_timeout or STALL_TIMEOUT))
    use_transport(device, choose_transport(comm, device, options.transport, limit))
    with comm.shared_errors():
        problem = make() if options.layout == "replicated" else None
    if problem is None:
        return StagedTraining(build_staged_problem(make, options, world), options, device, world)
    return Training(problem, options, device, world)
