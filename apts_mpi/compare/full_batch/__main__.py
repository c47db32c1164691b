"""``python -m apts_mpi.compare.full_batch``: a run of a comparison."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from apts_mpi.compare.command import make_parser, read_values
from apts_mpi.compare.full_batch.options import FullBatchOptions
from apts_mpi.compare.full_batch.run import run
from apts_mpi.errors import InvalidInput
from apts_mpi.tools.status import USAGE
from apts_mpi.train.parser import spell

PROGRAM = "apts_mpi.compare.full_batch"


def parse(arguments: Sequence[str]) -> tuple[FullBatchOptions, Path]:
    """The options, and the directory of the run.

    Raises
    ------
    InvalidInput
        For an option or a value that is not known.
    """
    parser = make_parser(PROGRAM, "A run of a method of full batches, as apts_mpi.compare starts it.")
    parser.add_class_arguments(FullBatchOptions, as_group=False)
    parser.add_argument("--run_dir", type=str, required=True, help="Directory of the run; records in it are replaced.")
    values = read_values(parser, spell(arguments), FullBatchOptions)
    path = Path(values.pop("run_dir"))
    return FullBatchOptions(**values), path


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the run that the arguments say; an error is one line."""
    try:
        print(run(*parse(sys.argv[1:] if arguments is None else arguments)))
    except InvalidInput as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(USAGE)


if __name__ == "__main__":
    main()
