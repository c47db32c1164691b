"""All checks of this machine, made and reported."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mpi4py import MPI
from rich.console import Console
from rich.table import Table
from rich.text import Text

from apts_mpi.checkpoint import hdf5_versions
from apts_mpi.doctor import probes
from apts_mpi.doctor.diagnosis import (
    ASYNCHRONOUS_PROGRESS,
    Finding,
    judge_cores,
    judge_devices,
    judge_direct,
    judge_hdf5,
    judge_launcher,
    judge_locks,
    judge_overlap,
    judge_storage,
    judge_sums,
    judge_versions,
    worst,
)
from apts_mpi.doctor.shared_memory import judge_shared_memory
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.gpu_direct import try_direct
from apts_mpi.parallel.launcher import launcher_mismatch, mpi_version
from apts_mpi.parallel.transport import TRANSPORTS, choose_device
from apts_mpi.tools import environment
from apts_mpi.tools.events import Events
from apts_mpi.tools.jobs import find_launcher
from apts_mpi.tools.status import FAILED

# Columns in which the table is read with ease; on fewer there is a list.
TABLE_WIDTH = 120

STATUS_COLORS = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def examine(comm: Communicator, run_directory: Path, mismatch: str) -> list[Finding]:
    """Make all checks. Collective.

    Parameters
    ----------
    comm
        All ranks.
    run_directory
        Where runs will write; nothing is left there.
    mismatch
        What is wrong with the launcher, empty if nothing.
    """
    library = mpi_version()
    local_rank = comm.local_rank()
    device = choose_device("auto", local_rank)
    ranks = probes.gather_facts(comm, device)
    launcher = find_launcher() if comm.rank == 0 else ("", "")
    has_device = any(rank.device_identity for rank in ranks)
    direct = try_direct(comm, "cuda") if has_device else None
    transport = TRANSPORTS["staged" if direct else "direct"].words
    with probes.scratch(comm, run_directory) as (scratch, failure):
        unseen, stale = ([], []) if failure else probes.see_renames(comm, scratch)
        usable = not failure and not unseen
        locks = probes.try_locks(comm, scratch) if usable else None
        checkpoint = probes.try_checkpoint(comm, scratch) if usable else f"{scratch} cannot be used"
    hdf5, mpio = hdf5_versions()
    overlap = probes.measure_overlap(comm)
    switched_on = environment.switched_on(ASYNCHRONOUS_PROGRESS.values())
    return [
        judge_launcher(mismatch, library, *launcher, comm.size),
        judge_cores(ranks),
        judge_devices(ranks),
        *judge_sums(probes.sum_everywhere(comm, device)),
        judge_direct(direct, transport),
        judge_overlap(overlap, library, switched_on),
        judge_shared_memory(probes.survey_hosts(comm, local_rank)),
        judge_storage(str(scratch.parent if not failure else scratch), failure, unseen, stale),
        *([judge_locks(*locks, comm.size)] if locks is not None else []),
        judge_hdf5(hdf5, mpio, checkpoint, comm.size),
        judge_versions(ranks, library),
    ]


def show(rows: Sequence[Finding], console: Console) -> None:
    """Print a table, or on narrow terminals a list: status and name of a check, what was found, and the remedy."""
    if console.width >= TABLE_WIDTH:
        table = Table(title="apts_mpi.doctor", show_lines=True)
        for heading in ("check", "status", "found", "remedy"):
            table.add_column(heading)
        for row in rows:
            table.add_row(row.check, _status(row), Text(row.found), Text(row.remedy))
    else:
        table = Table("status", "check", "found → remedy", box=None, title="apts_mpi.doctor", pad_edge=False)
        for row in rows:
            table.add_row(_status(row), row.check, Text(row.found + (f"\n→ {row.remedy}" if row.remedy else "")))
    console.print(table)


def _status(row: Finding) -> Text:
    return Text(row.status, style=STATUS_COLORS[row.status])


def carry_out(run_directory: Path, as_json: bool) -> int:
    """Check and report; return the exit status. Collective."""
    world = MPI.COMM_WORLD
    mismatch = launcher_mismatch(world)
    launched = environment.launcher()
    # Where the launcher is of another MPI every process is rank 0; the first of them speaks.
    speaks = world.rank == 0 and not (mismatch and launched is not None and launched[1])
    try:
        rows = examine(Communicator(world, Events()), run_directory, mismatch)
    except Exception:
        print(f"apts_mpi.doctor: rank {world.rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # mpirun drops what it has not read when it ends the job.
        environment.pause(0.5)
        world.Abort(FAILED)
    status = worst(rows)
    if speaks and as_json:
        report = {"status": status, "ranks": world.size, "checks": [asdict(row) for row in rows]}
        print(json.dumps(report, indent=2), flush=True)
    elif speaks:
        show(rows, Console(highlight=False))
    return FAILED if status == "fail" else 0
