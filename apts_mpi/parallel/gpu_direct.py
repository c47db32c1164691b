"""Whether MPI gets the memory of GPUs or copies in host memory: tried in processes of their own, which may crash."""

from __future__ import annotations

import sys
from typing import Literal

import torch

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.jobs import launcher_in_path, run_apart

# Seconds for a process that tries what may hang.
PROBE_LIMIT = 60.0


def try_direct(comm: Communicator, kind: str, limit: float = PROBE_LIMIT) -> str:
    """Iallreduce on the memory of devices, by two ranks on rank 0's host in processes of their own.

    Parameters
    ----------
    kind
        Of devices, as for `apts_mpi.parallel.transport.choose_device`.
    limit
        Seconds that it may take, in which the other ranks wait.

    Returns
    -------
    str
        What went wrong, empty if it works.
    """
    failure = ""
    if comm.rank == 0:
        launcher = launcher_in_path()
        failure = "no mpirun in PATH, which would try it"
        if launcher is not None:
            command = [launcher, "-n", "2", sys.executable, "-m", "apts_mpi.parallel.gpu_probe", kind]
            failure, _ = run_apart(command, limit)
    return comm.agree_on_text(failure)


def choose_transport(
    comm: Communicator, device: torch.device, kind: Literal["auto", "staged", "direct"], limit: float = PROBE_LIMIT
) -> Literal["staged", "direct"]:
    """How tensors of the ranks' devices come to MPI, the same on all ranks. Collective.

    Parameters
    ----------
    kind
        ``auto``: direct on CPUs, and on GPUs where `try_direct`, within ``limit`` seconds, says that it works.
    """
    if kind != "auto":
        return kind
    on_gpus = "cuda" in comm.collect(device.type)
    return "staged" if on_gpus and try_direct(comm, "cuda", limit) else "direct"
