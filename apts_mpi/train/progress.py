"""How far a run has come."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Progress:
    """How far a run has come.

    Attributes
    ----------
    epoch : int
        The present one, from 1.
    batch : int
        Batches of it that are done with.
    tries : int
        Steps on the next batch that were rejected.
    iteration, accepted, rejected, skipped : int
        Steps so far.
    at_rest : int
        Batches in a row, up to now, that had nothing left to gain.
    gradient_evaluations, seconds : float
        Of the steps; metrics are not counted.
    """

    epoch: int = 1
    batch: int = 0
    tries: int = 0
    iteration: int = 0
    accepted: int = 0
    rejected: int = 0
    skipped: int = 0
    at_rest: int = 0
    gradient_evaluations: float = 0.0
    seconds: float = 0.0

    @property
    def within_epoch(self) -> bool:
        """Whether the present epoch has begun."""
        return self.batch > 0 or self.tries > 0
