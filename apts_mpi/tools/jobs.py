"""Jobs and commands that are started from this process."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from apts_mpi.errors import InvalidInput, require
from apts_mpi.tools import environment

# What a run that a command started printed, in its directory.
OUTPUT = "output.txt"

# Seconds for a launcher to say its version.
VERSION_LIMIT = 10.0


def launcher_in_path() -> str | None:
    """Path of the ``mpirun`` that a command would start."""
    return shutil.which("mpirun") or shutil.which("mpiexec")


def find_launcher() -> tuple[str, str]:
    """Path of the ``mpirun`` in PATH and what it says of itself; both empty without one. Not collective."""
    path = launcher_in_path()
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


def check_can_start(ranks: int, program: str) -> None:
    """Raise `InvalidInput` if ``program`` cannot start runs with that many ranks from this process."""
    launched = environment.launcher()
    if launched is not None and launched[0] > 1:
        raise InvalidInput(f"{program} starts mpirun itself; start it as one process, and give --ranks")
    can_start = ranks == 1 or shutil.which("mpirun") is not None
    require(can_start, "ranks", ranks, "mpirun is not in PATH; add it, or give 1")


def failure_in(output: Path) -> str:
    """The last words about an error in what a run printed."""
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines() if output.exists() else []
    errors = [line.strip() for line in lines if re.search(r"error\b", line, re.IGNORECASE)]
    return (errors or lines or ["it printed nothing"])[-1]
