"""Numbers of all ranks put together in one reduction: sums as exact as one rank could form them, largest, norms."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

# Of a number in a message: its value, what its sum has lost to rounding, and how it is put together.
WIDTH = 3
SUM, LARGEST, NORM = range(3)


@dataclass(frozen=True)
class Parts:
    """What a rank has of some numbers, or all ranks together.

    Attributes
    ----------
    sums
        Summed up, compensated, so that the order of the ranks changes the result only where it is a tie to the last
        bit of twice the precision.
    largest
        The largest counts; one that is not a number is the largest.
    norms
        Norms of parts of vectors, 0 or more, from which those of the whole come.
    """

    sums: Sequence[float] = ()
    largest: Sequence[float] = ()
    norms: Sequence[float] = ()

    def message(self) -> np.ndarray:
        """As a message has it, float64 of shape (numbers, 3)."""
        values = np.array([*self.sums, *self.largest, *self.norms], dtype=np.float64)
        kinds = np.repeat([SUM, LARGEST, NORM], [len(self.sums), len(self.largest), len(self.norms)])
        return np.stack([values, np.zeros_like(values), kinds], axis=1)

    def of(self, message: np.ndarray) -> Parts:
        """What a message of as many numbers of each kind says."""
        values, lost, _ = message.T
        found = np.where(np.isfinite(values), values + lost, values).tolist()
        behind = len(self.sums) + len(self.largest)
        return Parts(found[: len(self.sums)], found[len(self.sums) : behind], found[behind:])


def put_together(own: np.ndarray, into: np.ndarray) -> None:
    """Put the numbers of a message into those of another one, in place.

    Of sums the error of each addition is known (Knuth's two-sum), and goes along: a number of twice the precision.
    """
    left, right = own[:, 0], into[:, 0].copy()
    sums, kinds = own[:, 2] == SUM, own[:, 2]
    with np.errstate(all="ignore"):
        total = left + right
        added = total - left
        lost = (left - (total - added)) + (right - added) + own[:, 1] + into[:, 1]
        high = total + lost
        exact = sums & np.isfinite(high)
        into[:, 1] = np.where(exact, lost - (high - total), 0.0)
        sums_or_norms = np.where(sums, np.where(exact, high, total), np.hypot(left, right))
        into[:, 0] = np.where(kinds == LARGEST, np.maximum(left, right), sums_or_norms)


def _in_messages(own: Any, into: Any, datatype: MPI.Datatype) -> None:
    put_together(np.frombuffer(own).reshape(-1, WIDTH), np.frombuffer(into).reshape(-1, WIDTH))


@functools.cache
def operation() -> MPI.Op:
    """What MPI calls to put two messages together."""
    return MPI.Op.Create(_in_messages, commute=True)


@functools.cache
def number() -> MPI.Datatype:
    """One number of a message, which MPI does not take apart."""
    return MPI.DOUBLE.Create_contiguous(WIDTH).Commit()
