"""A warning where no step is accepted for long."""

from __future__ import annotations

from typing import Protocol

# Steps in a row that are no longer the search for a ball: a rejected batch has four, so on the third one.
MANY = 10


class Result(Protocol):
    """What an iteration came to."""

    @property
    def accepted(self) -> bool:
        """Whether the parameters changed."""

    @property
    def at_rest(self) -> bool:
        """Whether there was nothing to gain."""

    @property
    def reason(self) -> str:
        """Why they did not change, in words."""


class Rejections:
    """Counts steps that were not accepted one after another."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def note(self, result: Result, iteration: int) -> str:
        """A warning with its reason at the last of ``MANY`` in a row, once until a step is accepted; else empty."""
        if result.accepted:
            self._in_a_row = 0
        elif not result.at_rest:
            self._in_a_row += 1
            if self._in_a_row == MANY:
                return (
                    f"warning: the last {MANY} steps, up to iteration {iteration}, were not accepted: {result.reason}"
                )
        return ""
