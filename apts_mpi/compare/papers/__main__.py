"""``python -m apts_mpi.compare papers``: the claims of the papers, tried."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from apts_mpi.compare.command import KEPT, make_parser, read_options
from apts_mpi.compare.papers.claims import claims
from apts_mpi.compare.papers.runs import OPTIMIZERS, PapersOptions, Variant, all_runs, variants
from apts_mpi.compare.runs import PlannedRun, execute, missing
from apts_mpi.errors import InvalidInput
from apts_mpi.tools.jobs import check_can_start
from apts_mpi.tools.status import INTERRUPTED, USAGE
from apts_mpi.train.parser import spell

PROGRAM = "apts_mpi.compare papers"

COLUMNS = {
    "train_loss": "train loss",
    "test_accuracy": "test accuracy",
    "test_loss": "test loss",
    "rejected_steps": "rejected",
    "gradient_evaluations": "evaluations",
    "cpu_seconds": "CPU s",
}


def parse(arguments: Sequence[str]) -> PapersOptions:
    """The options.

    Raises
    ------
    InvalidInput
        For an option or a value that is not known.
    """
    about = "Try the methods of the papers, over numbers of subdomains, beside tuned Adam and SGD."
    parser = make_parser(PROGRAM, f"{about} {KEPT}")
    parser.add_argument(
        "problems",
        nargs="*",
        default=["digits"],
        metavar="PROBLEM",
        help="Problem, as for apts_mpi.train; else digits.",
    )
    parser.add_class_arguments(PapersOptions, as_group=False, skip={"problems"})
    return read_options(parser, spell(arguments), PapersOptions)


def compare(options: PapersOptions) -> list[str]:
    """Run what is missing; a table and the claims of each problem, as Markdown, also beside the runs."""
    pages = []
    for problem in options.problems:
        rows = variants(problem, options)
        to_do = missing(all_runs(rows))
        if to_do:
            check_can_start(1, PROGRAM)
        failures = execute(to_do, options.jobs, _say)
        page = page_of(problem, rows, [f"{run.path} failed: {reason}" for run, reason in failures.items()])
        directory = Path(options.out) / problem.replace(":", ".")
        (directory / "table.md").write_text(page, encoding="utf-8")
        pages.append(page)
    return pages


def _say(run: PlannedRun, failure: str | None) -> None:
    print(f"{run.path}  {failure or f'loss {run.final_loss():.4g}'}", flush=True)


def page_of(problem: str, rows: Sequence[Variant], failures: Sequence[str]) -> str:
    """The table, medians over the seeds, and a line for each claim and each run that failed."""
    lines = [
        f"| method | subdomains or step size | {' | '.join(COLUMNS.values())} |",
        f"|---|---|{'---:|' * len(COLUMNS)}",
    ]
    for row in rows:
        choice = f"{row.choice:g}" if row.name in OPTIMIZERS else f"{row.choice:g} subdomains"
        lines.append(f"| {row.name} | {choice} | {' | '.join(f'{row.end(name):.4g}' for name in COLUMNS)} |")
    lists = ["\n".join(f"- {line}" for line in own) for own in (claims(rows), failures)]
    parts = [f"# {problem}", "\n".join(lines), *lists]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare; the process ends with a status that says how it went."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        for page in compare(options):
            print(page, flush=True)
    except InvalidInput as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
