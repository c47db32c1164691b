"""``python -m apts_mpi.compare.full_batch``: a run of a comparison."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import jsonargparse

from apts_mpi.compare.full_batch.options import FullBatchOptions
from apts_mpi.compare.full_batch.run import run
from apts_mpi.errors import InvalidInput
from apts_mpi.tools.status import USAGE

PROGRAM = "apts_mpi.compare.full_batch"


def main() -> None:
    """Do the run that the arguments say; an error is one line."""
    parser = jsonargparse.ArgumentParser(prog=PROGRAM, exit_on_error=False)
    parser.add_class_arguments(FullBatchOptions, as_group=False)
    parser.add_argument("--run_dir", required=True, help="Directory of the run; records in it are replaced.")
    try:
        values = dict(vars(parser.parse_args()))
        path = Path(values.pop("run_dir"))
        print(run(FullBatchOptions(**values), path))
    except (InvalidInput, argparse.ArgumentError, TypeError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(USAGE)


if __name__ == "__main__":
    main()
