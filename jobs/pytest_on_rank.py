"""Run pytest on one rank of an MPI job: rank 0 prints to the terminal, every other rank to a file.

Usage: mpirun -n N python jobs/pytest_on_rank.py DIRECTORY [arguments of pytest]

Rank R writes its JUnit report to DIRECTORY/rank_R.xml and, if not rank 0, its output to DIRECTORY/rank_R.txt.
The output is removed where the rank passes: what is left is of ranks that failed or never came to an end.
"""

import os
import sys

import pytest
from mpi4py import MPI


def main():
    directory, *arguments = sys.argv[1:]
    rank = MPI.COMM_WORLD.rank
    prefix = os.path.join(directory, f"rank_{rank}")
    output = f"{prefix}.txt"
    if rank != 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, sys.stdout.fileno())
        os.dup2(file, sys.stderr.fileno())
    # Ranks must not share a temporary directory or a cache: each clears up after itself.
    own = ["--verbose", "--color=no", f"--junit-xml={prefix}.xml", f"--basetemp={prefix}_tmp", "-p", "no:cacheprovider"]
    status = pytest.main(["--with-mpi", "-m", "mpi", *own, *arguments])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:  # arguments may select no test that needs MPI
        status = pytest.ExitCode.OK
    if rank != 0 and status == pytest.ExitCode.OK:
        os.remove(output)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
