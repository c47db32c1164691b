"""The local solver Muon: matrices move by the orthogonal factor of the mean of their gradients."""

from __future__ import annotations

import torch
from torch import nn

from apts_mpi.local.objective import LocalObjective
from apts_mpi.local.solver import LocalSetting, LocalSolver, LocalState, SavedState
from apts_mpi.network.partition import Layer
from apts_mpi.network.shared_work import Work
from apts_mpi.tools.schema import whole
from apts_mpi.trust_region.norms import NormKind, norm

# Coefficients of an iteration that takes all singular values from 0.003 to 1 to about 1, and of how many.
QUINTIC, ITERATIONS = (3.4445, -4.7750, 2.0315), 5

# What the calls of these cost a matrix, whatever its size, in multiplications: a quarter of a millisecond of a core.
CALLS = 1e7

# Of the running mean of squares, an iteration.
DECAY, EPSILON = 0.95, 1e-12


# Layers whose weights multiply elements, or have a row a word, whatever their dimensions.
NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


class Muon(LocalSolver):
    """Steps along orthogonal factors (Jordan et al., kellerjordan.github.io/posts/muon; arXiv 2502.16982).

    With M the running mean of the gradients of a weight, ``local.momentum`` of M and the rest of the present one, the
    weight of m times n numbers goes along ``-sqrt(max(m, n)) U V^T`` with ``M = U S V^T``: as far in all directions
    that M has, and by 1 in the root mean square of its elements. Convolutions have a row an output channel
    (transposed ones one an input channel). What is no
    matrix, and embeddings, whose rows few samples reach, go along M over the root of the running mean of its squares,
    of about that length too; so no factor stands between the two. It costs no evaluation, and knows no damping.

    Attributes
    ----------
    momentum, squares : Tensor, shape (stop - start,)
        Running means of the gradient and its square; empty before the first iteration.
    count : int
        Iterations.
    """

    whole_layers = True
    local_data = "shared"
    averages = True
    divides_work = True

    @classmethod
    def work(cls, layer: Layer, module: nn.Module, refresh: int) -> Work:
        """See `apts_mpi.local.LocalSolver`: an iteration of `orthogonal_factor` takes three products."""
        weights = _weights(module, slice(layer.start, layer.stop))
        sides = [sorted((rows, (part.stop - part.start) // rows)) for part, rows in weights]
        products = ITERATIONS * sum(2.0 * short**2 * long + short**3 for short, long in sides)
        size = layer.stop - layer.start
        return Work(layer.start, layer.stop, range(1), CALLS * len(sides), 1.0 + products / size)

    def __init__(self, setting: LocalSetting) -> None:
        super().__init__(setting)
        self._parts = [part for layer in setting.layers for part in _weights(layer.module, layer.part)]
        self.momentum, self.squares = setting.block[:0], setting.block[:0]
        self.count = 0

    @property
    def observes(self) -> bool:
        """See `apts_mpi.local.LocalSolver`; its direction takes the gradient alone."""
        return self.setting.options.iterations > 1

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `apts_mpi.local.LocalSolver`; steps of length radius / iterations."""
        iterations = self.setting.options.iterations
        for gradient in local.gradients(iterations):
            step = self._step(gradient)
            length = norm(step, kind)
            local.block.add_(step * (radius / iterations / torch.where(length > 0.0, length, torch.ones_like(length))))

    def unbounded(self, local: LocalObjective) -> torch.Tensor:
        """The step itself, of a root mean square of about 1."""
        return self._step(local.gradient)

    def follow(self, local: LocalObjective) -> None:
        """What `unbounded` leaves to the next iteration, where another rank has the step."""
        self._average(local.gradient)

    def _average(self, gradient: torch.Tensor) -> torch.Tensor:
        """Move the running means, and return the gradient as they have it."""
        # A gradient that is not finite leads to a rejected step; it must not stay in the means.
        gradient = gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if self.count == 0:
            # Not before: a rank has solvers of subdomains that others solve for.
            self.momentum, self.squares = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.count += 1
        share = self.setting.options.momentum or 0.0
        self.momentum.lerp_(gradient, 1.0 - share)
        self.squares.lerp_(gradient.square(), 1.0 - DECAY)
        return gradient

    def _step(self, gradient: torch.Tensor) -> torch.Tensor:
        gradient, share = self._average(gradient), self.setting.options.momentum or 0.0
        own = self.own_part or slice(0, len(gradient))
        mean = (self.momentum[own] / (1.0 - share**self.count)).lerp_(gradient[own], 1.0 - share)
        root = (self.squares[own] / (1.0 - DECAY**self.count)).sqrt_().add_(EPSILON)
        step = mean.div(root).neg_()
        for part, rows in self._parts:
            if own.start <= part.start and part.stop <= own.stop:
                inside = slice(part.start - own.start, part.stop - own.start)
                matrix = mean[inside].view(rows, -1)
                step[inside] = orthogonal_factor(matrix).mul_(-(max(matrix.shape) ** 0.5)).flatten()
        return step

    def state(self) -> LocalState:
        """See `apts_mpi.local.LocalSolver`."""
        means = {"momentum": self.momentum, "squares": self.squares} if self.count else {}
        return LocalState(numbers={"count": self.count}, vectors=means)

    def check_saved(self, saved: SavedState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        self.check_numbers_and_vectors(
            saved, {"count": whole()}, lambda numbers: ("momentum", "squares") if numbers["count"] else ()
        )

    def restore(self, state: LocalState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        self.count = state.numbers["count"]
        if self.count:
            self.momentum, self.squares = state.vectors["momentum"].clone(), state.vectors["squares"].clone()


def orthogonal_factor(matrix: torch.Tensor) -> torch.Tensor:
    """About ``U V^T`` of a matrix ``U S V^T``, without its singular values.

    Five steps of an odd polynomial of degree five take singular values from 0.003 to 1 of the Frobenius norm to between
    0.68 and 1.14; smaller ones grow by 3.4 a step. Products alone, which a device does at its full speed.

    Parameters
    ----------
    matrix : Tensor, shape (m, n)

    Returns
    -------
    Tensor, shape (m, n)
        New; zero for a matrix of zeros.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    factor = matrix.T if tall else matrix
    # Twice, as the squares of small numbers are none: a layer that no sample reaches any more has a mean that fades.
    for size in (torch.amax, torch.norm):
        length = size(factor.abs())
        factor = factor / torch.where(length > 0.0, length, torch.ones_like(length))
    first, third, fifth = QUINTIC
    for _ in range(ITERATIONS):
        gram = factor @ factor.T
        factor = torch.addmm(factor, torch.addmm(gram, gram, gram, beta=third, alpha=fifth), factor, beta=first)
    return factor.T if tall else factor


def _weights(module: nn.Module, of_layer: slice) -> list[tuple[slice, int]]:
    """Ranges within the block of the matrices of a layer, and their rows."""
    weights = [weight for weight in module.parameters(recurse=False) if weight.requires_grad]
    # Of tied weights one layer has the range; complex ones are two real numbers each there.
    is_whole = sum(weight.numel() for weight in weights) == of_layer.stop - of_layer.start
    if isinstance(module, NO_MATRICES) or not is_whole:
        return []
    found, start = [], of_layer.start
    for weight in weights:
        if weight.dim() > 1 and weight.numel():
            found.append((slice(start, start + weight.numel()), weight.shape[0]))
        start += weight.numel()
    return found
