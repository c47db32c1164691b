"""A warning where no step is accepted for long."""

from __future__ import annotations

from apts_mpi.result import StepResult
from apts_mpi.train.baselines import BaselineResult

# Steps in a row that are no longer the search for a ball: a rejected batch has four, so on the third one.
MANY = 10


class Rejections:
    """Counts steps that were not accepted one after another."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def note(self, result: StepResult | BaselineResult, iteration: int) -> str:
        """A warning with its reason at the last of ``MANY`` in a row, once until a step is accepted; else empty."""
        if result.accepted:
            self._in_a_row = 0
        elif not result.at_rest:  # then there is nothing left to gain
            self._in_a_row += 1
            if isinstance(result, StepResult) and self._in_a_row == MANY:
                return (
                    f"warning: the last {MANY} steps, up to iteration {iteration}, were not accepted: {result.reason}"
                )
        return ""
