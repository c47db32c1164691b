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
from apts_mpi.schwarz.nystrom import NystromSolver
from apts_mpi.schwarz.shared_cholesky import SharedCholesky

Form = Literal["kernel", "normal"]

# Multiplications that take as long as it takes to send a number: some 10 gigaflops, and some gigabytes a second.
MULTIPLICATIONS_OF_A_NUMBER = 64


class ResidualSystem(Protocol):
    """``(R^T R + lambda I) x = R^T data + remainder`` for R of shape (rows, parameters). All is collective.

    Vectors of the parameters have those that this rank holds, the same on all ranks that hold the same.

    Attributes
    ----------
    trace : float
        Trace of the matrix, which is that of either form.
    """

    trace: float

    def factorise(self, damping: float) -> float:
        """Have factors for a damping, or the least larger one that gives a positive definite matrix; return it."""

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """``R vector``, shape (rows,)."""

    def transposed(self, data: torch.Tensor) -> torch.Tensor:
        """``R^T data`` for data that all ranks have, shape (n,)."""

    def solve(self, data: torch.Tensor, remainder: torch.Tensor | None = None) -> torch.Tensor:
        """The x of the last damping, shape (n,)."""


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

    def kernel_times(self, matrix: torch.Tensor) -> torch.Tensor:
        """``R R^T`` times a matrix of shape (rows, k)."""
        return summed(self.own @ (self.own.T @ matrix), self._comm)

    def transposed(self, data: torch.Tensor) -> torch.Tensor:
        """See `ResidualSystem`."""
        whole = data.new_zeros(self._held)
        whole[self._place] = self.own.T @ data
        if self._group.size > 1:
            pending = self._group.pending()
            self._group.start_gather(pending, Mirror(whole), self._ranges)
            pending.wait()
        return whole


class Inverse(Protocol):
    """Of a matrix plus a damping; see `SharedCholesky`. All is collective."""

    trace: float

    def factorise(self, damping: float) -> float:
        """See `ResidualSystem`."""

    def solve(self, vector: torch.Tensor) -> torch.Tensor:
        """The inverse of the last damping times a vector, on all ranks."""


class KernelSystem:
    """By ``R R^T``, a sum over ranks of which each has some columns of R: the inverse times R^T is R^T times its.

    Parameters
    ----------
    columns
        R.
    inverse
        Of ``R R^T`` and a damping.
    refined
        Whether what a solution leaves is solved for once more.
    """

    def __init__(self, columns: Columns, inverse: Inverse, refined: bool) -> None:
        self.times, self.transposed, self._inverse = columns.times, columns.transposed, inverse
        self._refined = refined
        self.trace, self._damping = inverse.trace, 0.0

    def factorise(self, damping: float) -> float:
        """See `ResidualSystem`."""
        self._damping = self._inverse.factorise(damping)
        return self._damping

    def solve(self, data: torch.Tensor, remainder: torch.Tensor | None = None) -> torch.Tensor:
        """See `ResidualSystem`; a remainder across the rows is divided by the damping alone (Woodbury)."""
        solved = self._solve(data)
        if remainder is None:
            return self.transposed(solved)
        return self.transposed(solved - self._solve(self.times(remainder)) / self._damping) + remainder / self._damping

    def _solve(self, data: torch.Tensor) -> torch.Tensor:
        solved = self._inverse.solve(data)
        if not self._refined:
            return solved
        left = data - self.times(self.transposed(solved)) - self._damping * solved
        return solved + self._inverse.solve(left)


def by_factors(columns: Columns, comm: Communicator) -> KernelSystem:
    """The system by Cholesky factors of ``R R^T``. Collective."""
    return KernelSystem(columns, SharedCholesky(gram(columns.own.T).cpu(), comm), refined=True)


def by_products(columns: Columns, comm: Communicator) -> KernelSystem:
    """The system by products with R alone, where either matrix is too large. Collective."""
    trace = summed(columns.own.square().sum().reshape(1), comm)[0]
    return KernelSystem(columns, NystromSolver(columns.kernel_times, trace, len(columns.own), comm), refined=False)


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
        self.trace = self._factors.trace
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


def summed(tensor: torch.Tensor, comm: Communicator) -> torch.Tensor:
    """The sum over ranks, in place. Collective."""
    if comm.size > 1:
        comm.sum(Mirror(tensor.view(-1)))
    return tensor


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
