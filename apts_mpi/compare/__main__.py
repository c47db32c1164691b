"""``python -m apts_mpi.compare``: APTS beside tuned optimizers, in tables and plots."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from apts_mpi.compare.command import KEPT, make_parser, read_options
from apts_mpi.compare.equal import comparison_of
from apts_mpi.compare.options import GRIDS, ComparisonOptions, Grids
from apts_mpi.compare.runs import Plan, PlannedRun, execute, missing
from apts_mpi.compare.table import Comparison
from apts_mpi.errors import InvalidInput
from apts_mpi.tools.command import FILE_WIDTH, say
from apts_mpi.tools.jobs import check_can_start
from apts_mpi.tools.status import INTERRUPTED, USAGE
from apts_mpi.tools.streams import end_with_reader
from apts_mpi.train.parser import gather, spell
from apts_mpi.train.peers import check_installed

PROGRAM = "apts_mpi.compare"

# Comparisons with options of their own, by the word in the place of the problem.
OTHER_COMPARISONS = {name: f"apts_mpi.compare.{name}.__main__" for name in ("continual", "papers")}


def parse(arguments: Sequence[str]) -> ComparisonOptions:
    """The options.

    Raises
    ------
    InvalidInput
        For an option or a value that is not known.
    """
    about = "Compare APTS, in its one default configuration, with other optimizers over grids of step sizes."
    parser = make_parser(PROGRAM, f"{about} {KEPT}")
    parser.add_argument("problems", nargs="+", metavar="PROBLEM", help="Problem, as for apts_mpi.train.")
    parser.add_argument("--robustness", action="store_true", help="Also sweep radii and learning rates, one seed.")
    parser.add_class_arguments(ComparisonOptions, as_group=False, skip={"problems", "robustness"})
    return read_options(parser, complete(gather(spell(arguments))), ComparisonOptions)


def complete(arguments: Sequence[str]) -> list[str]:
    """Arguments with the seconds of APTS for ``--equal_seconds`` without a value."""
    pairs = itertools.pairwise([*arguments, "-"])
    bare = [argument == "--equal_seconds" and following.startswith("-") for argument, following in pairs]
    return [f"{argument}=apts" if is_bare else argument for argument, is_bare in zip(arguments, bare, strict=True)]


def compare(options: ComparisonOptions, console: Console, grids: Grids = GRIDS) -> list[Comparison]:
    """Run what is missing, and write tables and plots of each problem.

    Raises
    ------
    InvalidInput
        Before work starts, for options that cannot be used or if a package is not installed that they need.
    """
    from apts_mpi.compare.plots import plot_equal_seconds, plot_losses, plot_robustness

    check_can_start(1, PROGRAM)
    comparisons = []
    for plan in [Plan(problem, options, grids) for problem in dict.fromkeys(options.problems)]:
        failures = run_all([*plan.runs, *plan.sweep], plan, console)
        failures |= run_all(plan.add_others(), plan, console)
        failures |= run_all(plan.add_radii(), plan, console)
        comparison = comparison_of(plan, failures)
        plan.path.mkdir(parents=True, exist_ok=True)
        (plan.path / "table.md").write_text(comparison.markdown(), encoding="utf-8")
        plot_losses(comparison, plan.path)
        if options.equal_seconds is not None:
            plot_equal_seconds(comparison, plan.path)
        if options.robustness:
            plot_robustness(comparison, plan.path)
        show(comparison, console)
        comparisons.append(comparison)
    return comparisons


def run_all(runs: Iterable[PlannedRun], plan: Plan, console: Console) -> dict[PlannedRun, str]:
    """Do runs, with a line for each that ends and, on a terminal, a bar; those that are finished need no MPI."""
    to_do, options = missing(runs), plan.options
    if to_do:
        check_can_start(options.ranks, PROGRAM)
        # Also of methods whose runs come later.
        for method in plan.methods:
            check_installed(method)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("runs", total=len(to_do))

        def report(run: PlannedRun, failure: str | None) -> None:
            outcome = f"failed: {failure}" if failure else f"loss {run.final_loss():.4g}"
            say(console, f"{run.path}  {outcome}")
            progress.advance(task)

        return execute(to_do, options.jobs, report)


def show(comparison: Comparison, console: Console) -> None:
    """Print the tables and what belongs to them."""
    for title, lines in comparison.tables().items():
        table = Table(title=title, **comparison.look)
        for index, heading in enumerate(comparison.header()):
            table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=index < 2)
        for cells in lines:
            table.add_row(*cells, style="bold" if "best" in cells[1] else None)
        console.print(table)
    for line in [
        comparison.note(),
        comparison.verdict(),
        *comparison.reasons(),
        f"table and plots: {comparison.plan.path}",
    ]:
        say(console, line)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare; the process ends with a status that says how it went."""
    end_with_reader()
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] and arguments[0] in OTHER_COMPARISONS:
        return import_module(OTHER_COMPARISONS[arguments[0]]).main(arguments[1:])
    try:
        options = parse(arguments)
        compare(options, Console(width=None if sys.stdout.isatty() else FILE_WIDTH))
    except InvalidInput as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(USAGE)
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
