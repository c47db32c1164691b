"""``python -m apts_mpi.doctor``: whether this machine, MPI and file system are fit for a run, alone or under mpirun."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from apts_mpi.doctor.shared_memory import SHARED_MEMORY, amount, describe_shortage, is_short, remove, survey
from apts_mpi.tools import environment
from apts_mpi.tools.command import said_once
from apts_mpi.tools.parser import Parser
from apts_mpi.tools.status import FAILED
from apts_mpi.tools.streams import end_with_reader


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; ends the process for ``--help`` and for arguments that are not known."""
    parser = Parser(
        "apts_mpi.doctor",
        "Check MPI, cores, GPUs, reductions, their overlap with computation, and the run directory. Start "
        "it as a run will be started. The exit status is 1 if a check fails, 0 if all are ok or warnings.",
    )
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs"), help="where runs will write (default: runs, as for training)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--clear-shared-memory",
        action="store_true",
        help="make no checks, but remove the segments of yours in /dev/shm of this host that no process uses",
    )
    return parser.parse_args(arguments)


def clear(as_json: bool) -> int:
    """Remove what killed jobs left in the shared memory of this host, and say what; return the exit status.

    One process of each host does so. Without MPI, which cannot start where there is no room.
    """
    if not environment.is_first_on_host():
        return 0
    found = survey()
    removed, failures = remove([segment.name for segment in found.unused])
    total = sum(segment.bytes for segment in removed)
    if as_json:
        report = {"host": found.host, "obstacle": found.obstacle, "bytes": total, "failures": failures}
        print(json.dumps(report | {"removed": [asdict(segment) for segment in removed]}, indent=2), flush=True)
        return FAILED if failures else 0
    lines = [f"{found.host}: removed {SHARED_MEMORY / segment.name}, {amount(segment.bytes)}" for segment in removed]
    lines += [f"{found.host}: cannot remove {SHARED_MEMORY / name}: {why}" for name, why in failures.items()]
    if found.obstacle:
        lines.append(f"{found.host}: removed nothing: {found.obstacle}")
    else:
        lines.append(f"{found.host}: segments of jobs that ended: {len(removed)} removed, {amount(total)}")
    print("\n".join(lines), flush=True)
    return FAILED if failures else 0


def warn_of_shortage() -> None:
    """Say on each host that MPI may lack the room to start, before it is tried: it dies without a word."""
    launched = environment.launcher()
    if not is_short(launched[0] if launched is not None else 1):
        return
    if environment.is_first_on_host():
        print(f"apts_mpi.doctor: {describe_shortage(survey())}", file=sys.stderr, flush=True)
    # All processes: when the first of them dies, mpirun drops what it has not read.
    environment.pause(1.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check and report; the process ends with a status that says how it went."""
    end_with_reader()
    # --help and errors print and exit, in every process.
    with said_once():
        options = parse(arguments)
    if options.clear_shared_memory:
        sys.exit(clear(options.json))
    warn_of_shortage()
    # Not above: it needs MPI, which --help and --version do without.
    from apts_mpi.doctor.examination import carry_out

    sys.exit(carry_out(options.run_dir, options.json))


if __name__ == "__main__":
    main()
