"""Jobs as users start them: ``python -m apts_mpi.train`` and other commands, alone and with mpirun."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from apts_mpi.tools.environment import outside_job

TESTS = Path(__file__).parent
LIMIT = 100  # seconds; a run takes a few, most of them to import torch

# A program of the tests, which a run that goes on has to name again.
PROBLEM = "--problem=networks:problem"

SMALL = (
    f"{PROBLEM} --dtype=float64 --device=cpu --epochs=1 --batch-size=30 --subdomains=3 "
    "--local.solver=sgd --schwarz.variant=exact --schwarz.local_data=shard --coarse=none "
    "--trust-region.initial_radius=0.2"
).split()


def find_mpirun():
    """Beside the Python that runs the tests, or on the path."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("mpirun", path=places)


needs_mpirun = pytest.mark.skipif(find_mpirun() is None, reason="needs mpirun")


def command(ranks, arguments, module="apts_mpi.train"):
    """The command line of a job; ``ranks`` None is without mpirun."""
    launcher = [] if ranks is None else [find_mpirun(), "-n", str(ranks)]
    return [*launcher, sys.executable, "-m", module, *arguments]


def surroundings(directory, **variables):
    """Environment variables of a job in ``directory``."""
    environment = outside_job()
    paths = [str(TESTS.parent), str(TESTS), str(directory), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | variables


def start(directory, ranks, arguments, module="apts_mpi.train", **variables):
    """Run a job to its end. Return status, output and errors."""
    return subprocess.run(
        command(ranks, arguments, module),
        cwd=directory,
        env=surroundings(directory, **variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


class Job:
    """A training job under way; its output goes to the file ``output`` in the directory."""

    def __init__(self, directory, ranks, arguments, **keywords):
        self.path = directory / "output"
        with self.path.open("w") as output:
            self.process = subprocess.Popen(
                command(ranks, arguments),
                cwd=directory,
                env=surroundings(directory),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                **keywords,
            )

    def wait_for(self, words):
        """Wait until the job has printed something."""
        deadline = time.monotonic() + LIMIT
        while words not in self.path.read_text():
            assert self.process.poll() is None and time.monotonic() < deadline, self.path.read_text()
            time.sleep(0.05)

    def wait_for_more(self, words, times):
        """Wait until the job has printed something so many times more."""
        deadline, before = time.monotonic() + LIMIT, self.path.read_text().count(words)
        while self.path.read_text().count(words) < before + times:
            assert self.process.poll() is None and time.monotonic() < deadline, self.path.read_text()
            time.sleep(0.05)

    def ranks(self):
        """Numbers of the processes that are ranks, in the order in which they were started."""
        return sorted(number for number in descendants(self.process.pid) if not descendants(number))

    def end(self):
        """Wait for the end; return status and output."""
        try:
            return self.process.wait(LIMIT), self.path.read_text()
        finally:
            self.process.kill()


def descendants(number):
    """Numbers of the processes below a process."""
    below = []
    for task in Path(f"/proc/{number}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            below += [child, *descendants(child)]
    return below
