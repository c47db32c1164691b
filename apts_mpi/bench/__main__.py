"""``python -m apts_mpi.bench iteration|balance|checkpoint|…``: what a part costs, and stands.

An iteration is set beside its bare passes and, on a GPU, the time of its kernels, the local solves of the slowest
rank beside those of all, a checkpoint beside a raw write of the same bytes, the timers of the events beside the
iteration that they time; and a run to which faults are done beside one that was never stopped.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from apts_mpi.tools.command import said_once
from apts_mpi.tools.parser import Parser, directory, names_of, whole
from apts_mpi.tools.status import FAILED
from apts_mpi.tools.streams import end_with_reader

# Networks with the numbers of samples of their batches, which `apts_mpi.bench.cases` has.
PROBLEMS = ("mlp-256", "mlp-2000", "cnn-250", "resnet-500", "text-64", "wide-1024")

COMMANDS = {
    "iteration": "an iteration beside its bare passes, beside AdamW, and of all ranks beside one",
    "balance": "local solves of the slowest rank beside those of all; for mpirun -n 2 or 4",
    "checkpoint": "saving at 1, 2 and 4 ranks beside a raw write; for mpirun -n 4",
    "memory": "a rank's memory in both layouts; for mpirun -n 8",
    "pipeline": "a pipeline beside one rank and torch's own; for mpirun -n 2",
    "events": "the timers of --log-view and --trace beside an iteration",
    "faults": "random faults done to training jobs, which are resumed; starts mpirun",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and its options; ends the process for ``--help`` and for arguments that are not known."""
    parser = Parser("apts_mpi.bench", "Timings as ratios within one run, and faults.")
    made = parser.add_commands(COMMANDS)
    iteration, checkpoint, faults = made["iteration"], made["checkpoint"], made["faults"]
    _add_count(iteration, "--repetitions", 30, "timed calls of each kind, beside passes")
    _add_count(iteration, "--rounds", 5, "of twenty iterations, beside AdamW")
    iteration.add_argument(
        "--problems",
        type=names_of(PROBLEMS, nothing="none"),
        default=PROBLEMS,
        help=f"beside AdamW, with commas between: {', '.join(PROBLEMS)}; or none (default: all of them)",
    )
    iteration.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="of network and batch (default: auto)"
    )
    iteration.add_argument("--json", type=Path, metavar="FILE", help="also write what is beside passes to FILE")
    _add_count(made["balance"], "--rounds", 5, "of five iterations that are timed")
    _add_count(checkpoint, "--repetitions", 10, "timed calls of each kind")
    _add_count(checkpoint, "--megabytes", 200, "size of the parameters")
    checkpoint.add_argument(
        "--directory",
        type=directory,
        default=Path.cwd(),
        help="on the disk to measure (default: the current directory)",
    )
    _add_count(made["memory"], "--layers", 8, "equal layers, one stage each at 8 ranks")
    _add_count(made["memory"], "--width", 512, "their width")
    _add_count(made["pipeline"], "--layers", 8, "equal layers")
    _add_count(made["pipeline"], "--width", 1024, "their width")
    _add_count(made["pipeline"], "--samples", 1024, "samples of the batch")
    _add_count(made["pipeline"], "--micro-batches", 8, "parts of it")
    _add_count(made["pipeline"], "--repetitions", 10, "timed calls of each kind")
    _add_count(made["events"], "--repetitions", 100, "timed iterations of each kind")
    _add_count(faults, "--seconds", 600, "after which no other one begins")
    faults.add_argument("--seed", type=whole(0), default=0, help="of what is drawn (default: 0)")
    _add_count(faults, "--ranks", 4, "at most, of a job")
    faults.add_argument(
        "--directory", type=directory, default=Path("runs"), help="for the record, in faults-SEED (default: runs)"
    )
    return parser.parse_args(arguments)


def _add_count(parser: Parser, name: str, default: int, words: str) -> None:
    """An option that is a number of 1 or more."""
    parser.add_argument(name, type=whole(1), default=default, help=f"{words} (default: {default})")


def measurements() -> dict[str, Callable[..., int | None]]:
    """By their names on the command line; imported here, as they need MPI. They may return an exit status."""
    from apts_mpi.bench.balance import balance
    from apts_mpi.bench.checkpoint import checkpoint
    from apts_mpi.bench.events import events
    from apts_mpi.bench.faults import faults
    from apts_mpi.bench.iteration import iteration
    from apts_mpi.bench.memory import memory
    from apts_mpi.bench.pipeline import pipeline

    return {
        "iteration": iteration,
        "balance": balance,
        "checkpoint": checkpoint,
        "memory": memory,
        "pipeline": pipeline,
        "events": events,
        "faults": faults,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, on all ranks of ``MPI.COMM_WORLD``."""
    end_with_reader()
    with said_once():
        options = vars(parse(arguments))
    # Not above: it is there with MPI, which --help and --version do without.
    from mpi4py import MPI

    try:
        status = measurements()[options.pop("command")](**options)
    except Exception:
        # The other ranks wait for this one.
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(FAILED)
    else:
        sys.exit(status)


if __name__ == "__main__":
    main()
