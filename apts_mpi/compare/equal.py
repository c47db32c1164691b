"""What the runs of a comparison at equal processor seconds came to: on samples that they have not seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any, ClassVar

from rich.box import SIMPLE_HEAD

from apts_mpi.compare.options import METHODS
from apts_mpi.compare.runs import Plan, PlannedRun
from apts_mpi.compare.table import Comparison, Outcome, number

# By which a step size is best, the first that a problem has, and which of its values over a run is the best one.
ERROR = "relative_l2_error"
MEASURES = {ERROR: min, "test_accuracy": max, "test_loss": min, "train_loss": min}

TUNING = (
    "Errors are relative L2 errors of the solution, of which the worst is that of all seeds; tuned is the damping of "
    "SPRING, the first damping of Levenberg-Marquardt in its largest diagonal element, or a learning rate (step size)."
)


def comparison_of(plan: Plan, failures: Mapping[PlannedRun, str]) -> Comparison:
    """What the runs of a plan came to, at equal seconds where it is one of these."""
    if plan.options.equal_seconds is None:
        return Comparison(plan, failures)
    comparison = EqualSeconds(plan, failures)
    return ErrorsOfSolutions(plan, failures) if comparison.measure == ERROR else comparison


class EqualSeconds(Comparison):
    """See `Comparison`; in its tables are medians over the seeds."""

    # Within 80 columns.
    look: ClassVar[Mapping[str, Any]] = {
        "width": 80,
        "box": SIMPLE_HEAD,
        "padding": (0, 0, 0, 1),
        "show_edge": False,
    }

    @property
    def measure(self) -> str:
        """What a step size is chosen by."""
        return next((name for name in MEASURES if name in self.metrics), "train_loss")

    def rank(self, row: Outcome) -> float:
        """See `Comparison.rank`."""
        values = row.final(self.measure)
        if row.failures or not values or not all(map(math.isfinite, values)):
            return math.inf
        value = statistics.median(values)
        return -value if MEASURES[self.measure] is max else value

    def note(self) -> str:
        """What the numbers of the tables mean."""
        options, seconds = self.plan.options, self.plan.seconds
        limit = "" if seconds is None else f"{number(seconds)} processor seconds of iterations a run"
        if options.reference is not None:
            limit += f", as {METHODS[options.reference]} takes for {self.plan.epochs} epochs"
        return (
            f"{limit}; {options.ranks} rank(s); medians over {options.seeds} seed(s). A step size is best by the "
            f"{self.measure.replace('_', ' ')} at the end; its best is that of all epochs."
        )

    def header(self) -> list[str]:
        """See `Comparison.header`."""
        others = [] if self.measure == "train_loss" else ["train loss"]
        return ["method", "step size", self.measure.replace("_", " "), "its best", *others, "CPU seconds", "epochs"]

    def table(self) -> list[list[str]]:
        """Cells of the table of all step sizes."""
        best = self.best().values()
        return [self._line(row, " (best)" if row in best and row.setting.learning_rate else "") for row in self.rows]

    def tables(self) -> dict[str, list[list[str]]]:
        """See `Comparison.tables`: each method at its best, the best first; and all step sizes."""
        best = [self._line(row) for row in sorted(self.best().values(), key=self.rank)]
        return {self.plan.problem: best, f"{self.plan.problem}, all step sizes": self.table()}

    def _line(self, row: Outcome, mark: str = "") -> list[str]:
        cells = [METHODS[row.setting.method], row.setting.step_size + mark]
        if not row.finished:
            return [*cells, f"{row.failures} failed", *[""] * (len(self.header()) - 3)]
        columns = [run.column("epochs", self.measure) for run in row.finished]
        peaks = [MEASURES[self.measure](filter(math.isfinite, column), default=math.nan) for column in columns]
        cells += [median(column, 4) for column in (row.final(self.measure), peaks)]
        others = ("cpu_seconds", "epoch") if self.measure == "train_loss" else ("train_loss", "cpu_seconds", "epoch")
        cells += [median(row.final(name), 3) for name in others]
        if row.failures:
            cells[2] += f", {row.failures} failed"
        return cells

    def verdict(self) -> str:
        """How APTS ends beside the best of the others."""
        best = self.best()
        apts = best.pop("apts", None)
        if apts is None or not best:
            return "There is nothing to set beside APTS, or APTS itself is missing."
        rival = min(best.values(), key=self.rank)
        place = 1 + sum(self.rank(row) < self.rank(apts) for row in best.values())
        own, other = (median(row.final(self.measure), 4) for row in (apts, rival))
        measure = self.measure.replace("_", " ")
        return f"APTS has place {place} of {len(best) + 1} by {measure}: {own}; {rival.name}: {other}."


class ErrorsOfSolutions(EqualSeconds):
    """See `EqualSeconds`; of problems whose solution is known, with a full batch an epoch."""

    # Small numbers have long words.
    look: ClassVar[Mapping[str, Any]] = {**EqualSeconds.look, "width": 100}

    def note(self) -> str:
        """See `EqualSeconds.note`."""
        return f"{super().note()} {TUNING}"

    def header(self) -> list[str]:
        """See `Comparison.header`."""
        return ["method", "tuned", "error", "worst", "loss", "iterations", "CPU seconds"]

    def _line(self, row: Outcome, mark: str = "") -> list[str]:
        cells = [METHODS[row.setting.method], row.setting.tuned + mark]
        if not row.finished:
            return [*cells, f"{row.failures} failed", *[""] * (len(self.header()) - 3)]
        errors = row.final(ERROR)
        worst = max(errors) if all(map(math.isfinite, errors)) else math.nan
        cells += [median(errors, 3), number(worst) if math.isfinite(worst) else "-"]
        cells += [median(row.final(name), 3) for name in ("train_loss", "iteration", "cpu_seconds")]
        if row.failures:
            cells[2] += f", {row.failures} failed"
        return cells


def median(values: list[float], digits: int) -> str:
    """The median in words, over those that are numbers, and how many are none."""
    finite = [value for value in values if math.isfinite(value)]
    lost = len(values) - len(finite)
    parts = [number(statistics.median(finite), digits)] if finite else []
    return ", ".join([*parts, *([f"{lost} diverged"] if lost else [])])
