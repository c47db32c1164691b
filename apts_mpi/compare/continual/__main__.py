"""``python -m apts_mpi.compare continual``: methods of continual learning beside each other, in a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence as Items
from pathlib import Path
from statistics import mean

from apts_mpi.compare.continual.methods import METHODS, Score, Sequence, learnt
from apts_mpi.errors import InvalidInput
from apts_mpi.tools.parser import Parser, directory, names_of, whole
from apts_mpi.tools.status import USAGE

PROGRAM = "apts_mpi.compare continual"

HEADER = "| method | tuned | mean accuracy | forgetting | iterations to 95 % |\n|---|---|---|---|---|"


def parse(arguments: Items[str]) -> argparse.Namespace:
    """The options; ends the process for ``--help`` and for arguments that are not known."""
    parser = Parser(
        PROGRAM,
        "Learn a sequence of tasks by several methods. What is tuned of one is chosen on the first seed; what is "
        "finished is kept.",
    )
    parser.add_argument("problems", nargs="*", default=["permuted-digits"], help="Sequences, as for apts_mpi.train.")
    parser.add_argument("--methods", type=names_of([*METHODS]), default=tuple(METHODS), help="With commas between.")
    parser.add_argument("--seeds", type=whole(1), default=3, help="Number of seeds.")
    parser.add_argument("--replay", type=whole(1), default=50, help="Stored samples of each earlier task.")
    parser.add_argument("--epochs", type=whole(1), help="Of each task; else the problem's own.")
    parser.add_argument("--train-samples", type=whole(1), help="Of each task; else all.")
    parser.add_argument("--out", type=directory, default=Path("continual"), help="Directory of runs and tables.")
    return parser.parse_args(arguments)


def rows_of(problem: str, options: argparse.Namespace) -> list[str]:
    """A line of the table for each method: means over the seeds, with the least and the greatest."""
    directory, rows = options.out / problem.replace(":", "-"), []
    for name in options.methods:

        def learn(value: float, seed: int, name: str = name) -> Score:
            sequence = Sequence(problem, seed, options.replay, options.epochs, options.train_samples)
            return learnt(name, sequence, value, directory)

        method = METHODS[name]
        best = max(method.grid, key=lambda value: learn(value, 0).accuracy)
        scores = [learn(best, seed) for seed in range(options.seeds)]
        cells = [
            _range([score.accuracy for score in scores], ".3f"),
            _range([score.forgetting for score in scores], ".3f"),
            _range([score.recovery for score in scores], ".1f"),
        ]
        tuned = f"{method.tuned} {best:g}" if method.tuned else "-"
        rows.append(f"| {method.label} | {tuned} | {' | '.join(cells)} |")
    return rows


def _range(values: Items[float], form: str) -> str:
    return f"{mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main(arguments: Items[str] | None = None) -> None:
    """Compare; the process ends with a status that says how it went."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        for problem in options.problems:
            table = "\n".join([HEADER, *rows_of(problem, options)]) + "\n"
            (options.out / problem.replace(":", "-") / "table.md").write_text(table, encoding="utf-8")
            print(f"{problem}, {options.seeds} seeds\n{table}", flush=True)
    except InvalidInput as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(USAGE)


if __name__ == "__main__":
    main()
