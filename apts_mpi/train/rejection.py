"""A warning where steps keep being rejected."""

from __future__ import annotations

from apts_mpi.result import StepResult
from apts_mpi.train.baselines import BaselineResult

# Rejections in a row that are no longer the search for a ball: on the third batch, with a millionth of the radius.
MANY = 10


class Rejections:
    """Counts steps that were rejected one after another."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def note(self, result: StepResult | BaselineResult, iteration: int) -> str:
        """A warning with its reason at the last of ``MANY`` in a row, once until a step is accepted; else empty."""
        self._in_a_row = 0 if result.accepted else self._in_a_row + 1
        if isinstance(result, BaselineResult) or self._in_a_row != MANY:
            return ""
        return f"warning: the last {MANY} steps, up to iteration {iteration}, were rejected: {result.reason}"
