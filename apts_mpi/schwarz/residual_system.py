"""The damped Gauss-Newton equations of all parameters, whose rows are spread over ranks by samples or by parameters."""

from __future__ import annotations

import itertools
from typing import Literal, Protocol

import numpy as np
import torch

from apts_mpi.curvature.dense import gram
from apts_mpi.network.partition import split
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror
from apts_mpi.schwarz.shared_cholesky import SharedCholesky
from apts_mpi.trust_region.norms import Dots

Form = Literal["kernel", "normal"]

# Of conjugate gradients: the share of the slope to which the residual falls, and products at most.
TOLERANCE, PRODUCTS = 1e-8, 300

# Multiplications that take as long as it takes to send a number: some 10 gigaflops, and some gigabytes a second.
MULTIPLICATIONS_OF_A_NUMBER = 64


class ResidualSystem(Protocol):
    """``(R^T R + lambda I) x = R^T data + remainder`` for R of shape (rows, parameters). All is collective.

    Vectors of the parameters have those that this rank holds, the same on all ranks that hold the same.

    Attributes
    ----------
    size : float
        Trace of the matrix, which is that of either form.
    """

    size: float

    def factorise(self, damping: float) -> float:
        """Have factors for a damping, or the least larger one that gives a positive definite matrix; return it."""

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """``R vector``, shape (rows,)."""

    def transposed(self, data: torch.Tensor) -> torch.Tensor:
        """``R^T data`` for data that all ranks have, shape (n,)."""

    def solve(self, data: torch.Tensor, remainder: torch.Tensor | None = None) -> torch.Tensor:
        """The x of the last damping, refined once, shape (n,)."""


def cheaper_form(rows: int, parameters: int, ranks: int) -> Form:
    """Which of the two matrices costs less, that of the rows or that of the parameters.

    Forming either takes half of ``rows * parameters`` times its size in multiplications; ranks share that and the
    factors. On several ranks the matrix is summed, and for that of the rows all rows are gathered before.
    """

    def cost(size: int, gathered: int) -> float:
        moved = (size**2 + gathered) * MULTIPLICATIONS_OF_A_NUMBER if ranks > 1 else 0
        return (0.5 * rows * parameters * size + size**3 / 6.0) / ranks + moved

    return "kernel" if cost(rows, rows * parameters) <= cost(parameters, 0) else "normal"


class Columns:
    """R of which each rank has some columns, of all rows. Making and calling is collective.

    Parameters
    ----------
    rows : Tensor, shape (own rows, n), float64
        Those of this rank's samples, by the parameters that it holds.
    comm
        All ranks.
    group
        The ranks that hold the same parameters, which have all samples together.

    Attributes
    ----------
    own : Tensor, shape (rows, own columns)
        This rank's.
    """

    def __init__(self, rows: torch.Tensor, comm: Communicator, group: Communicator) -> None:
        self._comm, self._group, self._held = comm, group, rows.shape[1]
        self._ranges = [split(self._held, group.size, rank) for rank in range(group.size)]
        self._place = slice(*self._ranges[group.rank])
        self.own = _gathered(rows, group)[:, self._place].contiguous()

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """See `ResidualSystem`."""
        return summed(self.own @ vector[self._place], self._comm)

    def transposed(self, data: torch.Tensor) -> torch.Tensor:
        """See `ResidualSystem`."""
        whole = data.new_zeros(self._held)
        whole[self._place] = self.own.T @ data
        if self._group.size > 1:
            pending = self._group.pending()
            self._group.start_gather(pending, Mirror(whole), self._ranges)
            pending.wait()
        return whole


class KernelSystem:
    """By ``R R^T``, a sum over ranks of which each has some columns of R: the inverse times R^T is R^T times its.

    Parameters
    ----------
    columns
        R.
    comm
        All ranks.
    """

    def __init__(self, columns: Columns, comm: Communicator) -> None:
        self.times, self.transposed = columns.times, columns.transposed
        self._factors = SharedCholesky(gram(columns.own.T).cpu(), comm)
        self.size = self._factors.size
        self._damping = 0.0

    def factorise(self, damping: float) -> float:
        """See `ResidualSystem`."""
        self._damping = self._factors.factorise(damping)
        return self._damping

    def solve(self, data: torch.Tensor, remainder: torch.Tensor | None = None) -> torch.Tensor:
        """See `ResidualSystem`; a remainder across the rows is divided by the damping alone (Woodbury)."""
        solved = self._solve(data)
        if remainder is None:
            return self.transposed(solved)
        return self.transposed(solved - self._solve(self.times(remainder)) / self._damping) + remainder / self._damping

    def _solve(self, data: torch.Tensor) -> torch.Tensor:
        solved = self._factors.solve(data)
        left = data - self.times(self.transposed(solved)) - self._damping * solved
        return solved + self._factors.solve(left)


class NormalSystem:
    """By ``R^T R``, a sum over ranks of which each has some rows of R; where every rank holds all parameters.

    Parameters
    ----------
    rows : Tensor, shape (own rows, n), float64
        Those of this rank's samples.
    comm
        All ranks.
    """

    def __init__(self, rows: torch.Tensor, comm: Communicator) -> None:
        self._comm, self._rows = comm, rows
        counts = comm.numbers(len(rows))
        start = sum(counts[: comm.rank])
        self._own, self._count = slice(start, start + len(rows)), sum(counts)
        self._factors = SharedCholesky(gram(rows).cpu(), comm)
        self.size = self._factors.size
        self._damping = 0.0

    def factorise(self, damping: float) -> float:
        """See `ResidualSystem`."""
        self._damping = self._factors.factorise(damping)
        return self._damping

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """See `ResidualSystem`."""
        whole = vector.new_zeros(self._count)
        whole[self._own] = self._rows @ vector
        return summed(whole, self._comm)

    def transposed(self, data: torch.Tensor) -> torch.Tensor:
        """See `ResidualSystem`."""
        total = summed(self._rows.T @ data[self._own], self._comm)
        if self._comm.size > 1:
            self._comm.share_tensors([total])
        return total

    def solve(self, data: torch.Tensor, remainder: torch.Tensor | None = None) -> torch.Tensor:
        """See `ResidualSystem`."""
        slope = self.transposed(data) if remainder is None else self.transposed(data) + remainder
        solved = self._factors.solve(slope)
        left = self.transposed(data - self.times(solved)) - self._damping * solved
        return solved + self._factors.solve(left if remainder is None else left + remainder)


class IterativeSystem:
    """By conjugate gradients on ``R^T R + lambda I``, with products alone, where either matrix is too large.

    Parameters
    ----------
    columns
        R.
    comm
        All ranks.
    dots
        Inner products of pairs of vectors of all parameters. Collective where ranks hold parts.
    """

    def __init__(self, columns: Columns, comm: Communicator, dots: Dots) -> None:
        self.times, self.transposed = columns.times, columns.transposed
        self._comm, self._dots = comm, dots
        (trace,) = summed(columns.own.square().sum().reshape(1), comm).tolist()
        (self.size,) = comm.decide(lambda: [_rounded(trace)])
        self._damping = 0.0

    def factorise(self, damping: float) -> float:
        """See `ResidualSystem`: any damping will do."""
        self._damping = damping
        return damping

    def solve(self, data: torch.Tensor, remainder: torch.Tensor | None = None) -> torch.Tensor:
        """See `ResidualSystem`; the residual falls to `TOLERANCE` of the slope, in `PRODUCTS` steps at most."""
        left = self.transposed(data) if remainder is None else self.transposed(data) + remainder
        solved, direction = torch.zeros_like(left), left.clone()
        (square,) = self._dots((left, left))
        goal = TOLERANCE**2 * square
        for _ in range(PRODUCTS):
            if not self._is_above(square, goal):
                break
            curved = self.transposed(self.times(direction)) + self._damping * direction
            length = square / self._dots((direction, curved))[0]
            solved += length * direction
            left -= length * curved
            before, (square,) = square, self._dots((left, left))
            direction = left + (square / before) * direction
        return solved

    def _is_above(self, square: float, goal: float) -> bool:
        return bool(self._comm.decide(lambda: [square > goal])[0])


def summed(tensor: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """The sum over ranks, in place. Collective."""
    if comm.size > 1:
        comm.sum(Mirror(tensor))
    return tensor


def _rounded(size: float) -> float:
    """To seven digits, as the others depend on the number of ranks."""
    return float(f"{size:.6e}")


def _gathered(rows: torch.Tensor, group: Communicator) -> torch.Tensor:
    """The rows of all ranks of a group, in their order. Collective over it."""
    if group.size == 1:
        return rows
    counts, size = group.numbers(len(rows)), rows.shape[1]
    ends = np.cumsum([0, *counts]).tolist()
    whole = rows.new_empty(ends[-1], size)
    whole[ends[group.rank] : ends[group.rank + 1]] = rows
    pending = group.pending()
    group.start_gather(pending, Mirror(whole.view(-1)), [(a * size, b * size) for a, b in itertools.pairwise(ends)])
    pending.wait()
    return whole
