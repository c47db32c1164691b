"""``python -m apts_mpi.doctor``: whether this machine, MPI and file system are fit for a run, alone or under mpirun."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from apts_mpi.tools.command import add_version, said_once
from apts_mpi.tools.streams import end_with_reader


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; ends the process for ``--help`` and for arguments that are not known."""
    parser = argparse.ArgumentParser(
        prog="apts_mpi.doctor",
        description="Check MPI, cores, GPUs, reductions, their overlap with computation, and the run directory. Start "
        "it as a run will be started. The exit status is 1 if a check fails, 0 if all are ok or warnings.",
    )
    add_version(parser)
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs"), help="where runs will write (default: runs, as for training)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check and report; the process ends with a status that says how it went."""
    end_with_reader()
    # --help and errors print and exit, in every process.
    with said_once():
        options = parse(arguments)
    # Not above: it needs MPI, which --help and --version do without.
    from apts_mpi.doctor.examination import carry_out

    sys.exit(carry_out(options.run_dir, options.json))


if __name__ == "__main__":
    main()
