"""Solutions with a large kernel matrix by conjugate gradients on its products, preconditioned as Nyström has it.

Frangella, Tropp and Udell, Randomized Nyström preconditioning (arXiv 2110.02820).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.trust_region.subproblem import steihaug

# Columns of the sketch: at first, and at most. They double until the least eigenvalue in it is so many dampings.
FIRST, MOST, SEEN = 128, 2048, 10.0

# Of a solution: the share of the right-hand side to which its residual falls, and products at most.
TOLERANCE, PRODUCTS = 1e-10, 300

# Of the damping, relative to the trace: with less, rounding errors of products are larger than what is solved for.
LEAST = 1e-13

# The random vectors are those of all ranks.
SEED = 0

# Of a matrix of zeros.
TINY = 1e-100


class NystromSolver:
    """``(K + damping I)^-1`` for a symmetric, positive semi-definite K that is known by its products alone.

    The eigenvalues of the kernel of a physics-informed network fall fast, so that a few hundred random products have
    all that are above the damping: ``K ~ U diag(values) U^T``, and

        P^-1 = I + U ((least + damping) / (values + damping) - 1) U^T

    leaves a matrix with which conjugate gradients take some steps, whatever the damping. Making and calling is
    collective.

    Parameters
    ----------
    product
        K times a matrix of shape (n, k); the same on all ranks but for rounding. Collective.
    trace : Tensor, shape ()
        Of K; rank 0's counts.
    count
        n.
    comm
        All ranks.

    Attributes
    ----------
    trace : float
        The trace to seven digits.
    """

    def __init__(
        self, product: Callable[[torch.Tensor], torch.Tensor], trace: torch.Tensor, count: int, comm: Communicator
    ) -> None:
        self._product, self._count, self._comm = product, count, comm
        (self.trace,) = comm.decide(lambda: [float(f"{float(trace):.6e}")])
        self._damping = 0.0
        self._generator = torch.Generator().manual_seed(SEED)
        self._test = self._sketch = trace.new_zeros(count, 0)
        self._extend(min(FIRST, count))

    def _extend(self, columns: int) -> None:
        """Have more random products, and the approximation that they give."""
        more = torch.randn(self._count, columns, dtype=torch.float64, generator=self._generator).to(self._test.device)
        found = self._product(more)
        if self._comm.size > 1:
            self._comm.share_tensors([found])
        self._test = torch.cat([self._test, more], dim=1)
        self._sketch = torch.cat([self._sketch, found], dim=1)
        self._vectors, self._values = approximation(self._test, self._sketch)

    def factorise(self, damping: float) -> float:
        """See `apts_mpi.schwarz.residual_system.ResidualSystem`: no damping is below ``LEAST`` of the trace."""
        (self._damping,) = self._comm.decide(lambda: [max(damping, LEAST * self.trace, TINY)])
        most = min(MOST, self._count)
        while (columns := self._test.shape[1]) < most and self._is_coarse():
            self._extend(min(columns, most - columns))
        return self._damping

    def _is_coarse(self) -> bool:
        return self._agree(float(self._values[-1]) > SEEN * self._damping)

    def _agree(self, holds: bool) -> bool:
        return bool(self._comm.decide(lambda: [holds])[0])

    def solve(self, vector: torch.Tensor) -> torch.Tensor:
        """The inverse of the last damping times a vector that all ranks have, up to ``TOLERANCE`` or ``PRODUCTS``."""
        # No solution is longer: where rounding hides the damping conjugate gradients end there.
        longest = float(vector.norm()) / self._damping
        found, _ = steihaug(self._damped, -vector, longest, TOLERANCE, PRODUCTS, self._precondition, self._agree)
        if self._comm.size > 1:
            self._comm.share_tensors([found])
        return found

    def _damped(self, vector: torch.Tensor) -> torch.Tensor:
        if self._comm.size > 1:
            # A sum of products with directions that are rounded apart is no product, and the ways part.
            self._comm.share_tensors([vector])
        return self._product(vector[:, None])[:, 0] + self._damping * vector

    def _precondition(self, vector: torch.Tensor) -> torch.Tensor:
        shares = (self._values[-1] + self._damping) / (self._values + self._damping) - 1.0
        return vector + self._vectors @ (shares * (self._vectors.T @ vector))


def approximation(test: torch.Tensor, sketch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors, (n, k), and falling eigenvalues, (k,), of the best K that the products with ``test`` allow.

    That is ``Y (Omega^T Y)^-1 Y^T`` for the products ``Y = K Omega``, shifted by rounding and back (algorithm 2.1).

    Parameters
    ----------
    test : Tensor, shape (n, k), float64
        Omega.
    sketch : Tensor, shape (n, k)
        Y.
    """
    shift = max(torch.finfo(sketch.dtype).eps * float(sketch.norm()), TINY)
    factor, shifted = sketch, sketch
    failed = True
    while failed:
        if not math.isfinite(shift):  # the products are not: nothing is known
            return torch.zeros_like(test), test.new_zeros(test.shape[1])
        shifted = sketch + shift * test
        factor, failed = torch.linalg.cholesky_ex(test.T @ shifted)
        shift *= 10.0 if failed else 1.0
    halves = torch.linalg.solve_triangular(factor.T, shifted, upper=True, left=False)
    vectors, roots, _ = torch.linalg.svd(halves, full_matrices=False)
    return vectors, (roots.square() - shift).clamp_min(0.0)
