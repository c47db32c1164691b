"""A second bound of the steps, in the Fisher metric of earlier tasks (arXiv 2602.02417).

With d the way of the parameters from where the last task ended, and F the Fisher matrix of the tasks so far,

    d^T F d <= radius^2 ,

beside the ball of the present task: the predictions for earlier tasks may change by a Kullback-Leibler divergence of
about ``radius^2 / 2``, in the mean over these tasks. F has a block ``A (x) G`` for each layer, whose factors are means
over the tasks. In the eigenvectors of the factors it is diagonal, so that the nearest point within the bound,

    d(mu) = (I + mu F)^{-1} d   with   d(mu)^T F d(mu) = radius^2 ,

costs four products of matrices a layer and a root of one variable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from apts_mpi.curvature.fisher import fisher_factors
from apts_mpi.curvature.kinds import KroneckerFactors, make_curvature
from apts_mpi.errors import InvalidInput
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import Layer, split
from apts_mpi.objective.passes import Mean
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror
from apts_mpi.tools.schema import Check, record, sequence, whole
from apts_mpi.tools.trees import Tree, count_samples, take

# Samples of a task that its factors are measured on, evenly spread; with more they change by a few hundredths alone.
SAMPLES = 2048

# Newton steps for the multiplier, which rises from zero and never beyond; they double the digits.
STEPS = 50


class FisherMetric:
    """Bounds the way from the end of the last task; without an earlier task nothing is bounded.

    Parameters
    ----------
    network
        Whose layers are linear or convolutions.
    chain
        The same, as it is called with inputs.
    vector
        Its parameters.
    layers
        Where they lie.
    loss
        The mean loss.
    comm
        The ranks, each of which has all parameters.
    radius
        The bound.

    Attributes
    ----------
    tasks : int
        Earlier ones.
    centre : Tensor, shape (n,)
        Parameters at the end of the last.

    Raises
    ------
    InvalidInput
        For a layer without Kronecker factors, naming it.
    """

    def __init__(
        self,
        network: nn.Module,
        chain: nn.Module,
        vector: FlatParameters,
        layers: Sequence[Layer],
        loss: Mean,
        comm: Communicator,
        radius: float,
    ) -> None:
        self._chain, self._loss, self._comm, self._radius = chain, loss, comm, radius
        self._vector = vector
        self._layers: list[tuple[nn.Module, KroneckerFactors]] = []
        self._parts = [slice(layer.start, layer.stop) for layer in layers]
        for layer in layers:
            module = network.get_submodule(layer.name)
            curvature = make_curvature(module, layer.stop - layer.start)
            if not isinstance(curvature, KroneckerFactors):
                raise InvalidInput(
                    f"trust_region.metric: 'fisher' is for linear layers and convolutions, and layer {layer.name!r} is "
                    f"{type(module).__name__}; choose identity"
                )
            self._layers.append((module, curvature))
        self.tasks = 0
        self.centre = vector.values.clone()
        self._factors = [[self.centre.new_zeros(shape) for shape in own.statistics] for _, own in self._layers]
        self._eigen: list[list[tuple[torch.Tensor, torch.Tensor | None]]] = []

    def remember(self, inputs: Tree, targets: Tree) -> None:
        """Take in a task that ends at the present parameters. Collective.

        Parameters
        ----------
        inputs, targets
            Its samples, the same on all ranks, which measure a share each.
        """
        count = count_samples(inputs)
        chosen = torch.arange(min(count, SAMPLES)) * count // min(count, SAMPLES)
        own = chosen[slice(*split(len(chosen), self._comm.size, self._comm.rank))]
        shapes = [factor.shape for factors in self._factors for factor in factors]
        packed = Mirror(self.centre.new_zeros(sum(map(math.prod, shapes))))
        if len(own):
            training = self._chain.training
            self._chain.eval()
            found = fisher_factors(self._chain, self._layers, self._loss, take(inputs, own), take(targets, own))
            self._chain.train(training)
            packed.tensor.copy_(_packed(found)).mul_(len(own) / len(chosen))
        self._comm.sum(packed)
        self.tasks += 1
        kept = _packed(self._factors).lerp(packed.tensor, 1.0 / self.tasks)
        self._take(kept)
        self.centre.copy_(self._vector.values)

    def _take(self, packed: torch.Tensor) -> None:
        """Have these factors, and their eigenvectors."""
        parts = iter(packed.split([factor.numel() for factors in self._factors for factor in factors]))
        for factors in self._factors:
            for factor in factors:
                factor.copy_(next(parts).view(factor.shape))
        self._eigen = [[_eigen(factor) for factor in factors] for factors in self._factors]

    def square(self, way: torch.Tensor) -> float:
        """``way^T F way`` of a vector of shape (n,); 0 without an earlier task."""
        return float((self._values() * self._turned(way).square()).sum()) if self.tasks else 0.0

    def nearest(self, way: torch.Tensor) -> torch.Tensor:
        """The nearest vector, shape (n,), within the bound; ``way`` itself where that is. Collective."""
        turned = self._turned(way) if self.tasks else way
        # One rank decides, and for all.
        (multiplier,) = self._comm.decide(lambda: [self._multiplier(turned) if self.tasks else 0.0])
        return way if multiplier == 0.0 else self._back(turned / (1.0 + multiplier * self._values())).to(way)

    def within(
        self, point: torch.Tensor, gradient: torch.Tensor, step: torch.Tensor, predicted: float | None
    ) -> tuple[torch.Tensor, float | None]:
        """A step from ``point`` that ends within the bound, no longer than ``step``, and its predicted reduction.

        Projections do not lengthen, so that it stays in the ball. Where it leads uphill that of the steepest descent
        of the same length takes its place, which never does. All vectors have shape (n,). Collective.

        Returns
        -------
        step : Tensor, shape (n,)
        predicted : float or None
            As given where the step is; else None, for the first-order prediction.
        """
        start = point - self.centre
        found = self.nearest(start + step)
        if not self.tasks or torch.equal(found, start + step):
            return step, predicted
        bounded = found - start
        (uphill,) = self._comm.decide(lambda: [float(torch.dot(gradient, bounded)) >= 0.0])
        if uphill:
            downhill = gradient * (-step.norm() / gradient.norm().clamp_min(torch.finfo(step.dtype).tiny))
            bounded = self.nearest(start + downhill) - start
        return bounded, None

    def _multiplier(self, turned: torch.Tensor) -> float:
        """mu of the nearest point; 0 within the bound, and for a step that is not finite, which will be rejected."""
        values, bound = self._values().double(), self._radius**2
        weights = values * turned.double().square()
        multiplier = 0.0
        for _ in range(STEPS):
            scales = 1.0 / (1.0 + multiplier * values)
            square = float((weights * scales**2).sum())
            if not math.isfinite(square):
                return 0.0
            if square <= bound * (1.0 + 1e-9):
                break
            # 1 / sqrt(square) is nearly linear in mu, and concave: Newton's method comes from one side.
            slope = float((weights * values * scales**3).sum())
            multiplier += square / slope * (math.sqrt(square / bound) - 1.0)
        return multiplier

    def _values(self) -> torch.Tensor:
        """Eigenvalues of F in the order of `_turned`, shape (n,)."""
        blocks = [torch.outer(outputs[0], inputs[0]).flatten() for inputs, outputs in self._eigen]
        return torch.cat(blocks)

    def _turned(self, way: torch.Tensor) -> torch.Tensor:
        """In the eigenvectors, layer by layer."""
        found = []
        for part, (module, _), (inputs, outputs) in zip(self._parts, self._layers, self._eigen, strict=True):
            matrix = _matrix(way[part], module)
            matrix = matrix if outputs[1] is None else outputs[1].T @ matrix
            found.append((matrix if inputs[1] is None else matrix @ inputs[1]).flatten())
        return torch.cat(found)

    def _back(self, turned: torch.Tensor) -> torch.Tensor:
        """The inverse of `_turned`."""
        found = []
        for part, (module, _), (inputs, outputs) in zip(self._parts, self._layers, self._eigen, strict=True):
            matrix = turned[part].view(len(outputs[0]), len(inputs[0]))
            matrix = matrix if outputs[1] is None else outputs[1] @ matrix
            found.append(_flat(matrix if inputs[1] is None else matrix @ inputs[1].T, module))
        return torch.cat(found)

    def state(self) -> dict[str, Any]:
        """See `apts_mpi.state.solver.Part`; the factors are cut into vectors of n numbers, the last one with zeros."""
        size, packed = len(self.centre), _packed(self._factors)
        padded = torch.cat([packed, packed.new_zeros(-len(packed) % size)])
        return {"tasks": self.tasks, "centre": self.centre, "factors": list(padded.split(size))}

    def saved(self, vector: Check, vector_or_empty: Check) -> Check:
        """See `apts_mpi.state.solver.Part`."""
        count = -(-len(_packed(self._factors)) // len(self.centre))
        return record({"tasks": whole(), "centre": vector, "factors": sequence(vector, least=count)})

    def restore(self, state: dict[str, Any]) -> list[str]:
        """See `apts_mpi.state.solver.Part`."""
        self.tasks = state["tasks"]
        self.centre.copy_(state["centre"])
        self._take(torch.cat(state["factors"])[: len(_packed(self._factors))])
        return []


def _packed(factors: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    return torch.cat([factor.flatten() for factor in itertools.chain(*factors)])


def _eigen(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Eigenvalues, none below zero, and eigenvectors as columns; None for a diagonal."""
    if factor.dim() == 1:
        return factor, None
    # Exactly the symmetric part is decomposed; float64 costs little, once a task.
    values, vectors = torch.linalg.eigh(factor.double())
    return values.clamp_min(0.0).to(factor), vectors.to(factor)


def _matrix(flat: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """Weights and biases of a layer side by side, shape (rows, columns)."""
    weight: Any = module.weight
    size, rows = weight.numel(), len(weight)
    biases = flat[size:].view(rows, (len(flat) - size) // rows)
    return torch.cat([flat[:size].view(rows, -1), biases], dim=1)


def _flat(matrix: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """The inverse of `_matrix`."""
    weight: Any = module.weight
    columns = weight[0].numel()
    return torch.cat([matrix[:, :columns].flatten(), matrix[:, columns:].flatten()])
