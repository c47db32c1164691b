"""What the runs of a comparison came to, in a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from apts_mpi.compare.options import METHODS
from apts_mpi.compare.runs import Plan, PlannedRun, Setting
from apts_mpi.records.reading import RunRecords
from apts_mpi.tools.jobs import OUTPUT

# Entries of an epoch's record that say where it was, not how good.
POSITIONS = ("epoch", "iteration", "gradient_evaluations", "seconds", "cpu_seconds")


@dataclass(frozen=True)
class Outcome:
    """The finished runs of one setting, over the seeds.

    Attributes
    ----------
    setting
        The method and its step size.
    finished
        Records of the runs that finished.
    failures
        How many did not.
    """

    setting: Setting
    finished: tuple[RunRecords, ...]
    failures: int

    def final(self, name: str) -> list[float]:
        """A metric at the end of each run."""
        return [run.column("epochs", name)[-1] for run in self.finished]

    def mean(self, name: str) -> list[float]:
        """The mean over the runs, one value an epoch, as far as all runs came."""
        columns = [run.column("epochs", name) for run in self.finished]
        return [statistics.fmean(values) for values in zip(*columns, strict=False)]

    def median(self, name: str) -> list[float]:
        """The median over the runs, likewise."""
        columns = [run.column("epochs", name) for run in self.finished]
        return [statistics.median(values) for values in zip(*columns, strict=False)]

    @property
    def name(self) -> str:
        """Of the method, with its step size where it has one."""
        size = "" if self.setting.learning_rate is None else f" at {self.setting.step_size}"
        return METHODS[self.setting.method] + size

    @property
    def loss(self) -> float:
        """The mean final training loss; infinite if a run failed or diverged."""
        loss = statistics.fmean(self.final("train_loss")) if self.finished and not self.failures else math.nan
        return loss if math.isfinite(loss) else math.inf


class Comparison:
    """What the runs on one problem came to.

    Parameters
    ----------
    plan
        The runs, done.
    failures
        Why some failed.
    """

    # How rich prints the tables, where not by its defaults.
    look: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, plan: Plan, failures: Mapping[PlannedRun, str]) -> None:
        self.plan = plan
        self.failures = failures
        self.rows = self._rows(plan.runs)
        self.sweep = self._rows(plan.sweep)

    def _rows(self, runs: Sequence[PlannedRun]) -> list[Outcome]:
        rows = []
        for setting in dict.fromkeys(run.setting for run in runs):
            own = [run for run in runs if run.setting == setting]
            finished = tuple(run.records() for run in own if run.is_finished())
            rows.append(Outcome(setting, finished, len(own) - len(finished)))
        return rows

    @property
    def metrics(self) -> list[str]:
        """Names of the losses and of the problem's other metrics."""
        records = [run.epochs[-1] for row in self.rows for run in row.finished]
        return [name for name in records[0] if name not in POSITIONS] if records else []

    def rank(self, row: Outcome) -> float:
        """What is least for the best step size, and infinite where a run failed or diverged."""
        return row.loss

    def best(self) -> dict[str, Outcome]:
        """Of each method, the step size of the best `rank`; without methods that never came to an end."""
        best: dict[str, Outcome] = {}
        for row in sorted(self.rows, key=self.rank):
            if self.rank(row) < math.inf:
                best.setdefault(row.setting.method, row)
        return {method: best[method] for method in METHODS if method in best}

    def note(self) -> str:
        """What the numbers of the table mean."""
        options, epochs = self.plan.options, self.plan.epochs
        limit = f", but no more than {number(options.max_seconds)} s" if options.max_seconds is not None else ""
        return (
            f"{epochs} epochs of APTS, {epochs * options.baseline_epochs_factor} of the baselines{limit}; "
            f"{options.ranks} rank(s); mean ± sample standard deviation over {options.seeds} seed(s) of the values at "
            "the end. Gradient evaluations are those on the critical path. A step size is best by its training loss."
        )

    def header(self) -> list[str]:
        """Headings of the table."""
        names = [*self.metrics, "gradient_evaluations", "seconds"]
        return ["method", "step size", *(name.replace("_", " ") for name in names)]

    def table(self) -> list[list[str]]:
        """Cells of the table, a line a setting."""
        best = self.best().values()
        lines = []
        for row in self.rows:
            mark = " (best)" if row in best and row.setting.method != "apts" else ""
            cells = [cell(row, name) for name in [*self.metrics, "gradient_evaluations", "seconds"]]
            lines.append([METHODS[row.setting.method], row.setting.step_size + mark, *cells])
        return lines

    def verdict(self) -> str:
        """When APTS passes what the best baseline comes to."""
        best = self.best()
        apts = best.pop("apts", None)
        if apts is None or not best:
            return "APTS and the baselines cannot be compared: too many runs failed or diverged."
        rival = min(best.values(), key=self.rank)
        evaluations, seconds = (
            number(statistics.fmean(rival.final(name))) for name in ("gradient_evaluations", "seconds")
        )
        end = f"{evaluations} evaluations and {seconds} s"
        target = f"the final training loss of the best baseline ({rival.name}: {number(rival.loss)} after {end})"
        passed = [epoch for epoch, loss in enumerate(apts.mean("train_loss")) if loss < rival.loss]
        if not passed and apts.loss < rival.loss:  # runs of one limit of seconds have different numbers of epochs
            return f"APTS passes {target} at the end, with {number(apts.loss)}."
        if not passed:
            return f"APTS does not pass {target}; its own is {number(apts.loss)}."
        first = passed[0]
        of_all = f" of {self.plan.epochs}" if self.plan.options.max_seconds is None else ""
        return (
            f"APTS first passes {target} in epoch {first + 1}{of_all}, after "
            f"{number(apts.mean('gradient_evaluations')[first])} gradient evaluations and "
            f"{number(apts.mean('seconds')[first])} s."
        )

    def reasons(self) -> list[str]:
        """A line for each run that failed."""
        return [f"{run.path} failed: {reason} (see {OUTPUT} there)" for run, reason in self.failures.items()]

    def tables(self) -> dict[str, list[list[str]]]:
        """The lines of each table that is shown, by its title."""
        return {self.plan.problem: self.table()}

    def markdown(self) -> str:
        """The tables and what belongs to them."""
        rule = ["---"] * 2 + ["---:"] * (len(self.header()) - 2)
        parts = [f"# {self.plan.problem}", self.note()]
        for title, lines in self.tables().items():
            table = ["| " + " | ".join(cells) + " |" for cells in [self.header(), rule, *lines]]
            parts += ["" if title == self.plan.problem else f"## {title}", "\n".join(table)]
        failures = "\n".join(f"- {reason}" for reason in self.reasons())
        parts += [self.verdict(), failures]
        return "\n\n".join(part for part in parts if part) + "\n"


def cell(row: Outcome, name: str) -> str:
    """Mean and standard deviation of a metric at the end, and how many runs have none."""
    values = row.final(name)
    diverged = sum(math.isnan(value) for value in values)
    parts = []
    if values and not diverged:
        parts.append(number(statistics.fmean(values)))
        if len(values) > 1:
            parts[0] += f" ± {number(statistics.stdev(values), 2)}"
    elif diverged:
        parts.append(f"{diverged} diverged")
    if row.failures:
        parts.append(f"{row.failures} failed")
    return ", ".join(parts)


def number(value: float, digits: int = 3) -> str:
    """A number in that many significant digits; in all before the point, if those are not too many."""
    return f"{value:.0f}" if 10**digits <= value < 1e7 else f"{value:.{digits}g}"
