"""Jobs to which faults are done: started as users do, resumed, and compared with a run that was never stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apts_mpi.checkpoint import Checkpoint, resolve
from apts_mpi.checkpoint.directory import saved_steps
from apts_mpi.records.reading import read_records
from apts_mpi.tools import environment
from apts_mpi.tools.jobs import launcher_in_path

# Iterations at which runs are compared. A fault comes in the first half of them.
ITERATIONS = 24

# Seconds that a job may take, that its processes may take to go after it, and between looks at it.
LIMIT, SETTLED, INTERVAL = 90.0, 10.0, 0.02

# Of losses, where the ranks are others: sums are rounded otherwise, by 1e-16, and each of the iterations amplifies it,
# which the largest radius below limits. Runs that were never stopped differ by 5e-12 on 1 and 3 ranks.
TOLERANCE = 1e-8

# A network that starts at once, and whose loss does something in one call on one rank. The pause leaves time for it.
PROBLEM = '''"""The problem of a run to which something is done."""

import itertools, os, sys, time

import torch
from mpi4py import MPI
from torch import nn

CALLS = itertools.count(1)


def loss(outputs, targets):
    if next(CALLS) == {call} and MPI.COMM_WORLD.rank == {rank}:
        {action}
    time.sleep({pause})
    return nn.functional.cross_entropy(outputs, targets)


def problem():
    widths = [5, 8, 8, 8, 3]
    layers = [[nn.Linear(*pair), nn.Tanh()] for pair in itertools.pairwise(widths)]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(36, 5, generator=generator)
    return nn.Sequential(*itertools.chain(*layers)), loss, (inputs, inputs[:, :3].argmax(dim=1))
'''

# Seconds of a call of the loss where something is to be done to the run.
PAUSE = 0.01


@dataclass(frozen=True)
class Setting:
    """A run.

    Attributes
    ----------
    ranks, launched
        Of MPI, and whether mpirun starts them; without it there is one.
    layout, replicas, micro_batches, solver, coarse
        Options of the solver.
    """

    ranks: int
    launched: bool
    layout: str
    replicas: int
    micro_batches: int
    solver: str
    coarse: str

    def arguments(self) -> list[str]:
        """Of the training command, but for the places and how often it saves."""
        options = f"""
            --problem=faulty:problem --dtype=float64 --device=cpu --epochs=1000000 --batch-size=12 --subdomains=4
            --layout={self.layout} --replicas={self.replicas}
            --local.solver={self.solver} --coarse={self.coarse}
            --trust-region.initial_radius=0.2 --trust-region.max_radius=0.4
        """
        of_stages = [f"--micro-batches={self.micro_batches}"] if self.layout == "staged" else []
        return options.split() + of_stages

    @property
    def name(self) -> str:
        """For directories and tables."""
        started = f"{self.ranks} ranks" if self.launched else "no mpirun"
        parts = f", {self.replicas} replicas, {self.micro_batches} micro-batches" if self.layout == "staged" else ""
        return f"{started}, {self.layout}{parts}, {self.solver}, coarse {self.coarse}"


class Job:
    """A training job in a directory of its own, and its processes, which an environment variable marks.

    None of them outlives the ``with`` block.

    Parameters
    ----------
    directory
        Where it runs.
    name
        Its output goes to the file of this name there, and ``.txt``.
    setting
        How it is started.
    arguments
        Of the training command.
    """

    def __init__(self, directory: Path, name: str, setting: Setting, arguments: Iterable[str]) -> None:
        self.directory = directory
        self._mark = uuid.uuid4().hex
        self._output = directory / f"{name}.txt"
        launcher = [str(launcher_in_path()), "-n", str(setting.ranks)] if setting.launched else []
        self.command = [*launcher, sys.executable, "-m", "apts_mpi.train", *arguments]
        outside = environment.outside_job()
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join([package, str(directory.absolute()), outside.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "APTS_MPI_FAULTS": self._mark}
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=directory,
                env=outside | own,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    @property
    def checkpoints(self) -> Path:
        """Those of its run."""
        return self.directory / "run" / "checkpoints"

    def newest(self) -> int | None:
        """Iteration of the newest checkpoint that is complete; None without one."""
        with suppress(OSError):
            return max(saved_steps(self.checkpoints), default=None)
        return None

    def wait_for(self, words: str, times: int = 1) -> None:
        """Wait until the job has printed something so many times, has ended, or its time is up."""
        deadline = environment.seconds() + LIMIT
        while self.output.count(words) < times and self.runs() and environment.seconds() < deadline:
            environment.pause(INTERVAL)

    def runs(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def processes(self) -> dict[int, dict[str, str]]:
        """Those that there are, by their numbers, with their environment variables."""
        found = {}
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (place / "environ").read_bytes().decode(errors="replace").split("\0")
                if f"APTS_MPI_FAULTS={self._mark}" in variables:
                    found[int(place.name)] = dict(line.partition("=")[::2] for line in variables)
        return found

    def rank(self, number: int) -> int:
        """The process that is this rank; waits until it is there, at most while the job runs."""
        while self.runs():
            ranks = self.ranks()
            if number in ranks:
                return ranks[number]
            environment.pause(INTERVAL)
        return self.process.pid

    def ranks(self) -> dict[int, int]:
        """The processes by their ranks."""
        found: dict[int, int] = {}
        for process, variables in sorted(self.processes().items()):
            for _, name in environment.LAUNCHER_VARIABLES:
                if variables.get(name, "").isdigit():
                    found.setdefault(int(variables[name]), process)
        return found or {0: self.process.pid}

    def send(self, process: int, number: signal.Signals) -> None:
        """Send a signal to one of its processes, unless that has gone."""
        if self.runs():
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def end(self) -> int | None:
        """Wait for the end; return the status, None where the job had to be ended."""
        try:
            return self.process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            return None

    def left(self) -> int:
        """Number of its processes that are still there some seconds after the end."""
        deadline = environment.seconds() + SETTLED
        while self.processes() and environment.seconds() < deadline:
            environment.pause(INTERVAL)
        return len(self.processes())

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        while members := self.processes():
            for process in members:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            environment.pause(INTERVAL)
        self.process.wait()


def write_problem(directory: Path, action: str = "pass", rank: int = 0, call: int = 0, pause: float = 0.0) -> None:
    """Put the module of the problem into a directory; ``action`` is a statement for one call of the loss."""
    text = PROBLEM.format(action=action, rank=rank, call=call, pause=pause)
    (directory / "faulty.py").write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Finished:
    """What a run came to: its records without times, and the arrays of its last checkpoint."""

    records: list[dict[str, Any]]
    arrays: dict[str, np.ndarray]

    @staticmethod
    def read(run: Path) -> Finished:
        """Of a run directory; raises what reading does where files are damaged or missing."""
        history = read_records(run)
        records = [
            {name: value for name, value in record.items() if name not in ("seconds", "cpu_seconds")}
            for record in (*history.iterations, *history.epochs)
        ]
        with Checkpoint(resolve(run / "checkpoints")) as checkpoint:
            checkpoint.verify()
            names = [name for name in checkpoint.names if name != "training/history"]
            return Finished(records, {name: checkpoint.read(name) for name in names})

    def difference(self, other: Finished, same_ranks: bool) -> str:
        """In words, how ``other``, which was resumed, is not this one; empty if it is."""
        if same_ranks:
            if self.records != other.records:
                return "other records than the run that was never stopped"
            if {name: values.tobytes() for name, values in self.arrays.items()} != {
                name: values.tobytes() for name, values in other.arrays.items()
            }:
                return "another last checkpoint than the run that was never stopped"
            return ""
        own, others = _losses(self.records), _losses(other.records)
        if own.shape != others.shape:
            return f"{len(others)} losses instead of {len(own)}"
        largest = float(np.max(np.abs(own - others) / np.abs(own)))
        return f"losses differ by {largest:.1e}, relatively" if not largest < TOLERANCE else ""


def _losses(records: list[dict[str, Any]]) -> np.ndarray:
    values = [record.get("loss", record.get("train_loss")) for record in records]
    return np.array([np.nan if value is None else value for value in values], float)


class References:
    """The runs that are never stopped, each made once; in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made: dict[Setting, Finished] = {}

    def of(self, setting: Setting) -> Finished:
        """That of a setting.

        Raises
        ------
        RuntimeError
            If it does not come to its end, which is no matter of faults.
        """
        if setting not in self._made:
            place = self._directory / re.sub(r"\W+", "-", setting.name)
            place.mkdir(parents=True, exist_ok=True)
            write_problem(place)
            arguments = [*setting.arguments(), "--run-dir=run", "--overwrite", f"--max-iterations={ITERATIONS}"]
            with Job(place, "output", setting, arguments) as job:
                status = job.end()
            if status != 0:
                raise RuntimeError(f"without a fault a run ended with status {status}: see {place / 'output.txt'}")
            self._made[setting] = Finished.read(place / "run")
        return self._made[setting]
