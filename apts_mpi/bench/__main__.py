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

from apts_mpi.tools.command import add_version, said_once
from apts_mpi.tools.status import FAILED
from apts_mpi.tools.streams import end_with_reader

# Networks with the numbers of samples of their batches, which `apts_mpi.bench.beside_adamw` has.
PROBLEMS = ("mlp-256", "mlp-2000", "cnn-250", "resnet-500", "text-64", "wide-1024")


def positive(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def problems(text: str) -> tuple[str, ...]:
    """Names in `PROBLEMS`, with commas between, or none."""
    names = () if text == "none" else tuple(text.split(","))
    for name in names:
        if name not in PROBLEMS:
            raise argparse.ArgumentTypeError(f"{name!r} is not known; choose of {', '.join(PROBLEMS)}, or none")
    return names


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command and its options; ends the process for ``--help`` and for arguments that are not known."""
    parser = argparse.ArgumentParser(prog="apts_mpi.bench", description="Timings as ratios within one run, and faults.")
    add_version(parser)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    iteration = subparsers.add_parser("iteration", help="an iteration beside its bare passes, and beside AdamW")
    _add_repetitions(iteration, 30, "timed calls of each kind, beside passes")
    iteration.add_argument("--rounds", type=positive, default=5, help="of twenty iterations, beside AdamW (default: 5)")
    iteration.add_argument(
        "--problems",
        type=problems,
        default=PROBLEMS,
        help=f"beside AdamW, with commas between: {', '.join(PROBLEMS)}; or none (default: all of them)",
    )
    iteration.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="of network and batch (default: auto)"
    )
    iteration.add_argument("--json", type=Path, metavar="FILE", help="also write what is beside passes to FILE")
    balance = subparsers.add_parser("balance", help="local solves of the slowest rank; for mpirun -n 2 or 4")
    balance.add_argument("--rounds", type=positive, default=5, help="of five iterations that are timed (default: 5)")
    saving = "saving at 1, 2 and 4 ranks beside a raw write; for mpirun -n 4"
    checkpoint = subparsers.add_parser("checkpoint", help=saving)
    _add_repetitions(checkpoint, 10, "timed calls of each kind")
    checkpoint.add_argument("--megabytes", type=int, default=200, help="size of the parameters (default: 200)")
    checkpoint.add_argument(
        "--directory",
        type=Path,
        default=Path.cwd(),
        help="on the disk to measure (default: the current directory)",
    )
    memory = subparsers.add_parser("memory", help="a rank's memory in both layouts; for mpirun -n 8")
    memory.add_argument("--layers", type=int, default=8, help="equal layers, one stage each at 8 ranks (default: 8)")
    memory.add_argument("--width", type=int, default=512, help="their width (default: 512)")
    pipeline = subparsers.add_parser("pipeline", help="a pipeline beside one rank and torch's own; for mpirun -n 2")
    pipeline.add_argument("--layers", type=int, default=8, help="equal layers (default: 8)")
    pipeline.add_argument("--width", type=int, default=1024, help="their width (default: 1024)")
    pipeline.add_argument("--samples", type=int, default=1024, help="samples of the batch (default: 1024)")
    pipeline.add_argument("--micro-batches", type=int, default=8, help="parts of it (default: 8)")
    _add_repetitions(pipeline, 10, "timed calls of each kind")
    events = subparsers.add_parser("events", help="the timers of --log-view and --trace beside an iteration")
    _add_repetitions(events, 100, "timed iterations of each kind")
    faults = subparsers.add_parser(
        "faults", help="random faults done to training jobs, which are resumed; starts mpirun"
    )
    faults.add_argument("--seconds", type=positive, default=600, help="after which no other one begins (default: 600)")
    faults.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    faults.add_argument("--ranks", type=positive, default=4, help="at most, of a job (default: 4)")
    faults.add_argument(
        "--directory", type=Path, default=Path("runs"), help="for the record, in faults-SEED (default: runs)"
    )
    return parser.parse_args(arguments)


def _add_repetitions(parser: argparse.ArgumentParser, default: int, words: str) -> None:
    parser.add_argument("--repetitions", type=positive, default=default, help=f"{words} (default: {default})")


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
