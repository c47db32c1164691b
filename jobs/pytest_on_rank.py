"""Run pytest on one rank of an MPI job: rank 0 prints to the terminal, every other rank to a file.

Usage: mpirun -n N python jobs/pytest_on_rank.py DIRECTORY [arguments of pytest]

Rank R writes its JUnit report to DIRECTORY/rank_R.xml and, if not rank 0, its output to DIRECTORY/rank_R.txt.
The output is removed where the rank passes: what is left is of ranks that failed or never came to an end.

Every test marked `mpi` runs on 2 and 4 ranks. On other numbers, one among them, it is those that are marked `all_sizes`
too, or all of them where the environment variable FULL is 1.
"""

import os
import sys

import pytest
from mpi4py import MPI

SIZES_OF_ALL = (2, 4)


class Selection:
    """A plugin that leaves out files without tests for this number of ranks, unread, and other tests.

    The marker `all_sizes` may be for some rows of a table alone: ``all_sizes(solver="adam", iterations=3)``.
    """

    def __init__(self, every_test):
        self.every_test = every_test

    def pytest_ignore_collect(self, collection_path):
        # What each rank imports for nothing takes it seconds.
        marker = "mark.mpi" if self.every_test else "mark.all_sizes"
        foreign = collection_path.suffix == ".py" and marker not in collection_path.read_text(encoding="utf-8")
        return True if foreign else None

    def pytest_collection_modifyitems(self, config, items):
        chosen = [item for item in items if self.every_test or is_for_all_sizes(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def is_for_all_sizes(item):
    for marker in item.iter_markers("all_sizes"):
        row = item.callspec.params if hasattr(item, "callspec") else {}
        if not marker.kwargs.keys() <= row.keys():
            raise pytest.UsageError(f"{item.nodeid}: all_sizes has names that are no parameters: {marker.kwargs}")
        if all(row[name] == value for name, value in marker.kwargs.items()):
            return True
    return False


def main():
    directory, *arguments = sys.argv[1:]
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    every_test = size in SIZES_OF_ALL or os.environ.get("FULL") == "1"
    os.makedirs(directory, exist_ok=True)
    prefix = os.path.join(directory, f"rank_{rank}")
    output = f"{prefix}.txt"
    if rank != 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, sys.stdout.fileno())
        os.dup2(file, sys.stderr.fileno())
    # Ranks must not share a temporary directory or a cache: each clears up after itself.
    own = ["--verbose", "--color=no", f"--junit-xml={prefix}.xml", f"--basetemp={prefix}_tmp", "-p", "no:cacheprovider"]
    status = pytest.main(["--with-mpi", "-m", "mpi", *own, *arguments], [Selection(every_test)])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:  # arguments may select no test that needs MPI
        status = pytest.ExitCode.OK
    if rank != 0 and status == pytest.ExitCode.OK:
        os.remove(output)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
