"""The launcher of this job and the MPI library: whether they belong together."""

from __future__ import annotations

import sys

from mpi4py import MPI

from apts_mpi.tools import environment
from apts_mpi.tools.status import USAGE


def mpi_version() -> str:
    """First line of what the MPI library says of itself."""
    return " ".join(MPI.Get_library_version().split("\n")[0].strip("\0").split())


def launcher_mismatch(world: MPI.Intracomm) -> str:
    """What is wrong if more processes were started than MPI knows of, and the remedy; empty if there were not.

    A launcher may say how many it started, and a batch job of ``jobs/`` how many it has.
    """
    launched, job = environment.launcher(), environment.job()
    if launched is not None and launched[0] != world.size:
        return (
            f"the launcher started {launched[0]} processes, but MPI has {world.size}: mpirun belongs to another MPI "
            f"than the library in use ({mpi_version()}); call the mpirun of that library (its full path), or choose "
            "the library of the launcher by MPI4PY_MPIABI=mpich or openmpi"
        )
    if job is not None and job[0] != world.size:
        return (
            f"the job has {job[0]} ranks, but MPI has {world.size}: '{job[1]}' does not start the ranks of the library "
            f"in use ({mpi_version()}) together; write another launcher into choose_launcher of the site's file, such "
            "as the mpirun of that library, or another --mpi for srun (srun --mpi=list names them)"
        )
    return ""


def check_launcher(world: MPI.Intracomm) -> None:
    """End the process with a message if more processes were started than MPI knows of.

    Every process then takes itself for rank 0 of 1, and would train by itself.
    """
    mismatch, launched = launcher_mismatch(world), environment.launcher()
    if mismatch:
        # Where nothing tells its number each process speaks, as none may be the first.
        if launched is None or launched[1] == 0:
            print(f"apts_mpi.train: error: {mismatch}", file=sys.stderr, flush=True)
        sys.exit(USAGE)
