"""``python -m apts_mpi.plot RUN…``: what training runs did, in a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from apts_mpi.errors import InvalidInput
from apts_mpi.plot.files import files_of
from apts_mpi.records.reading import group, read_run
from apts_mpi.tools.parser import Parser
from apts_mpi.tools.status import USAGE
from apts_mpi.tools.streams import end_with_reader

# Those of `apts_mpi.plot.runs.ROWS`, which needs matplotlib.
ROW_NAMES = ("loss", "accuracy", "error", "rho", "radius")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The runs and where the plot goes; ends the process for ``--help`` and for arguments that are not known."""
    parser = Parser(
        "apts_mpi.plot",
        "Plot loss, accuracy, rho and radius of runs, with rejected steps marked, against iterations, "
        "gradient evaluations and seconds. Runs that differ in their seed alone become one line with a band.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="directory of a run of apts_mpi.train")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("plot"),
        help="file to write, its name ending in .png or .svg; without such an end, both are written (default: plot)",
    )
    parser.add_argument("--rows", nargs="+", choices=ROW_NAMES, help="what to plot (default: all that there is)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Plot; the process ends with a status that says how it went."""
    end_with_reader()
    options = parse(arguments)
    try:
        from apts_mpi.plot.runs import plot_runs

        files = files_of(options.out)
        plot_runs(group(map(read_run, options.runs)), files, options.rows)
    except InvalidInput as error:
        print(f"apts_mpi.plot: error: {error}", file=sys.stderr)
        sys.exit(USAGE)
    for file in files:
        print(file)


if __name__ == "__main__":
    main()
