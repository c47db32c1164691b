"""Whether MPI gets the memory of GPUs or copies in host memory: tried in processes of their own, which may crash."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Literal

import torch

from apts_mpi import environment
from apts_mpi.comm import Communicator

# Seconds for a process that tries what may hang, and for a launcher to say its version.
PROBE_LIMIT, VERSION_LIMIT = 60.0, 10.0


def find_launcher() -> tuple[str, str]:
    """Path of the ``mpirun`` in PATH and what it says of itself; both empty without one. Not collective."""
    path = shutil.which("mpirun") or shutil.which("mpiexec")
    if path is None:
        return "", ""
    return path, run_apart([path, "--version"], VERSION_LIMIT)[1]


def run_apart(command: Sequence[str], limit: float) -> tuple[str, str]:
    """Run a command that may crash or hang, as if no launcher had started this process. Not collective.

    Returns
    -------
    failure, output
        What went wrong, empty if nothing; and what was printed.
    """
    process = subprocess.Popen(
        command,
        env=environment.outside_job(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        # The whole group: a launcher that is killed alone leaves its ranks.
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"no end after {limit:g} s", ""
    status = process.returncode
    if status < 0:
        return f"killed by {signal.Signals(-status).name}", output
    return f"exit status {status}" if status else "", output


def try_direct(comm: Communicator, kind: str, limit: float = PROBE_LIMIT) -> str:
    """Iallreduce on the memory of devices, by two ranks on rank 0's host in processes of their own.

    Parameters
    ----------
    kind
        Of devices, as for `apts_mpi.transport.choose_device`.
    limit
        Seconds that it may take, in which the other ranks wait.

    Returns
    -------
    str
        What went wrong, empty if it works.
    """
    failure = ""
    if comm.rank == 0:
        launcher = shutil.which("mpirun") or shutil.which("mpiexec")
        failure = "no mpirun in PATH, which would try it"
        if launcher is not None:
            command = [launcher, "-n", "2", sys.executable, "-m", "apts_mpi.device_probe", kind]
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
