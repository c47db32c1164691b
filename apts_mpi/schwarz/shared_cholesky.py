"""Cholesky factors of a matrix that is a sum over ranks, which share the work by rows."""

from __future__ import annotations

import itertools
import math

import torch

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror

# Blocks of so many rows go round the ranks: with larger ones some have more to do than others.
ROWS = 64

# Columns that are eliminated at once, whole blocks of rows: products of fewer are slower, and the factor of their own
# rows is not shared.
COLUMNS = 128

# Below this size messages take longer than what they save.
LEAST_SHARED = 1024

# By how much the damping is raised where rounding leaves no positive definite matrix.
RAISE = 10.0


class SharedCholesky:
    """Cholesky factors of ``sum_r M_r + damping I``, with which rank 0 solves: ranks would magnify rounding apart.

    Some columns after the others (right-looking): all ranks factorise the rows of these columns' numbers, each solves
    for its rows below, and subtracts their products with those of all ranks from what is left of its own.

    Parameters
    ----------
    term : Tensor, shape (n, n), float64, in host memory
        M_r of this rank, symmetric; the sum is positive semi-definite. It is written to.
    comm
        All ranks. Making and calling is collective.

    Attributes
    ----------
    trace : float
        Trace of the sum, to seven digits, as the others depend on the number of ranks.
    """

    def __init__(self, term: torch.Tensor, comm: Communicator) -> None:
        self._matrix, self._factor, self._comm = term, torch.empty_like(term), comm
        self._count = len(term)
        height = ROWS if comm.size > 1 else self._count
        blocks = [(start, min(start + height, self._count)) for start in range(0, self._count, height)]
        self._blocks = [blocks[rank :: comm.size] for rank in range(comm.size)]
        self._own = self._blocks[comm.rank]
        self._owners = torch.arange(self._count) // height % comm.size
        if comm.size > 1:
            self._sum()
        trace = sum(float(term[start:stop, start:stop].trace()) for start, stop in self._own)
        (self.trace,) = comm.agree([trace], lambda traces: [float(f"{traces.sum():.6e}")])

    def _sum(self) -> None:
        """Have this rank's rows of the sum, up to the diagonal."""
        rows = [[self._matrix[start:stop, :stop] for start, stop in blocks] for blocks in self._blocks]
        counts = [sum(part.numel() for part in parts) for parts in rows]
        packed = torch.cat([part.reshape(-1) for parts in rows for part in parts])
        summed = torch.from_numpy(self._comm.sum_of_part(packed.numpy(), counts))
        own = rows[self._comm.rank]
        for part, total in zip(own, summed.split([part.numel() for part in own]), strict=True):
            part.copy_(total.view(part.shape))

    def factorise(self, damping: float) -> float:
        """Have factors for rank 0's damping, or the least larger one with a positive definite matrix; return it."""
        (taken,) = self._comm.decide(lambda: [damping])
        while True:
            self._eliminate(taken)
            (definite,) = self._comm.decide(lambda: [float(self._factor.diagonal().isfinite().all())])
            if definite or not math.isfinite(taken):
                return taken
            taken *= RAISE

    def _eliminate(self, damping: float) -> None:
        """Put the factor in its place on all ranks; numbers on the diagonal are not finite where there is none.

        Nothing ends before: on ranks that round differently a block may have a factor on one and none on another.
        """
        for start, stop in self._own:
            self._factor[start:stop, :stop] = self._matrix[start:stop, :stop]
            self._factor.diagonal()[start:stop] += damping
        width = COLUMNS if self._comm.size > 1 and self._count >= LEAST_SHARED else self._count
        for start in range(0, self._count, width):
            stop = min(start + width, self._count)
            rows = self._gathered(self._factor[self._rows(start, stop), start:stop], start, stop)
            diagonal, failed = torch.linalg.cholesky_ex(rows)
            if failed:
                diagonal.fill_(math.nan)
            self._factor[start:stop, start:stop] = diagonal
            if stop < self._count:
                self._subtract(start, stop, diagonal)

    def _subtract(self, start: int, stop: int, diagonal: torch.Tensor) -> None:
        """Have the columns of the factor below a diagonal block, and subtract their products from this rank's rows."""
        own = self._factor[self._rows(stop, self._count), start:stop]
        solved = torch.linalg.solve_triangular(diagonal, own.T, upper=False).T
        below = self._gathered(solved, stop, self._count)
        self._factor[stop:, start:stop] = below
        for begin, end in self._own:
            if begin >= stop:
                row, before = below[begin - stop : end - stop], below[: end - stop]
                self._factor[begin:end, stop:end].addmm_(row, before.T, alpha=-1.0)

    def _rows(self, start: int, stop: int) -> slice | torch.Tensor:
        """Numbers of this rank's rows in a range."""
        if self._comm.size == 1:
            return slice(start, stop)
        return start + (self._owners[start:stop] == self._comm.rank).nonzero()[:, 0]

    def _gathered(self, own: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows of all ranks from one row to another, in their order, from those of each."""
        if self._comm.size == 1:
            return own
        owners = self._owners[start:stop]
        counts = torch.bincount(owners, minlength=self._comm.size).mul_(own.shape[1])
        ends = [0, *counts.cumsum(0).tolist()]
        packed = own.new_empty(stop - start, own.shape[1])
        packed.view(-1)[ends[self._comm.rank] : ends[self._comm.rank + 1]] = own.reshape(-1)
        pending = self._comm.pending()
        self._comm.start_gather(pending, Mirror(packed.view(-1)), list(itertools.pairwise(ends)))
        pending.wait()
        return torch.empty_like(packed).index_copy_(0, owners.argsort(stable=True), packed)

    def solve(self, vector: torch.Tensor) -> torch.Tensor:
        """The damped matrix' inverse times rank 0's vector. Collective."""
        solved = torch.empty(len(vector), dtype=torch.float64)
        if self._comm.rank == 0:
            half = torch.linalg.solve_triangular(self._factor, vector.cpu()[:, None], upper=False)
            solved = torch.linalg.solve_triangular(self._factor.T, half, upper=True)[:, 0]
        if self._comm.size > 1:
            self._comm.share_tensors([solved])
        return solved.to(vector.device)
