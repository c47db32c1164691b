"""The coarse level: subdomain corrections recombined by the Gauss-Newton model in their span."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from apts_mpi.curvature.linearisation import Column, Linearisation
from apts_mpi.local.objective import GaussNewtonRows
from apts_mpi.network.parameters import norm
from apts_mpi.network.partition import Subdomain
from apts_mpi.objective.objective import Objective, Pass
from apts_mpi.options import ENOUGH_TARGETS, CoarseOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import Events
from apts_mpi.trust_region.subproblem import NormKind, euclidean_radius, minimise_in_ball

# A poor ratio raises the damping, an accepted step takes half of that back, never below what the options say: a good
# ratio on one batch does not see sampling noise, and following it down drives the damping to nothing.
RAISE, LOWER = 4.0, 0.5

# Columns whose part outside the span of the others is below this share of their length are dropped.
DEPENDENT = 1e-6

# Least curvature in the scaled norm, relative to the largest.
TRACE = 1e-6


@dataclass(frozen=True)
class ReducedModel:
    """``slope . a + 1/2 a . curvature a`` for the coefficients a of m columns; ``gram`` are their inner products."""

    slope: np.ndarray
    curvature: np.ndarray
    gram: np.ndarray

    def reduction(self, coefficients: np.ndarray) -> float:
        """Predicted reduction of a step."""
        return -float(self.slope @ coefficients + 0.5 * coefficients @ self.curvature @ coefficients)

    def minimise(self, radius: float, damping: float, kind: Literal["2", "scaled"]) -> np.ndarray:
        """Coefficients of the minimiser of the damped model in the ball ``|S a| <= radius``, shape (m,).

        Solves ``(C + damping s D + mu D) a = -slope`` for the least mu >= 0 that leads into the ball. In the 2-norm
        D = S^T S and s is the largest eigenvalue of ``D^-1 C``; in the scaled norm D is the diagonal of C and s = 1,
        which is Marquardt's method (doi 10.1137/0111030) and needs a positive definite matrix: without one, the 2-norm
        is taken. Neither damps a model without curvature, which ends at the ball.
        """
        basis = orthonormal_coefficients(self.gram)
        if basis.shape[1] == 0:
            return np.zeros(len(self.slope))
        if kind == "scaled" and np.diag(self.curvature).max() > 0.0:
            lengths = np.linalg.inv(np.linalg.qr(self._scales()[:, None] * basis, mode="r"))
            scaled = basis @ lengths
            damped = self._curvature_along(scaled) + damping * np.eye(len(lengths))
            if np.linalg.eigvalsh(damped)[0] > 0.0:
                return scaled @ minimise_in_ball(damped, scaled.T @ self.slope, radius, lengths)
        curvature = self._curvature_along(basis)
        largest = max(np.linalg.eigvalsh(curvature)[-1], 0.0)
        damped = curvature + damping * largest * np.eye(len(curvature))
        return basis @ minimise_in_ball(damped, basis.T @ self.slope, radius)

    def _curvature_along(self, basis: np.ndarray) -> np.ndarray:
        curvature = basis.T @ self.curvature @ basis
        return 0.5 * (curvature + curvature.T)

    def _scales(self) -> np.ndarray:
        """Square roots of the diagonal of D in the scaled norm.

        A column without curvature gets a trace of that of the others, of the same length: it is not to be lost, and
        with little damping the ball alone ends its way.
        """
        squares = np.clip(np.diag(self.gram), 0.0, None)
        curvatures = np.clip(np.diag(self.curvature), 0.0, None)
        relative = np.divide(curvatures, squares, out=np.zeros_like(squares), where=squares > 0.0)
        # Zero columns are not in the basis.
        return np.sqrt(np.maximum(relative, TRACE * relative.max()) * squares)


def orthonormal_coefficients(gram: np.ndarray) -> np.ndarray:
    """Coefficients of an orthonormal basis of the columns with this Gram matrix, shape (m, rank).

    Zero and nearly dependent columns are left out.
    """
    lengths = np.sqrt(np.clip(np.diag(gram), 0.0, None))
    scale = np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0.0)
    values, vectors = np.linalg.eigh(gram * scale[:, None] * scale)
    kept = values > DEPENDENT
    return scale[:, None] * vectors[:, kept] / np.sqrt(values[kept])


def inner_products(columns: Sequence[Column]) -> torch.Tensor:
    """Inner products of columns, shape (m, m), float64; zero for those that share no index."""
    count = len(columns)
    gram = torch.zeros(count, count, dtype=torch.float64, device=columns[0].values.device)
    for first, left in enumerate(columns):
        for second in range(first, count):
            right = columns[second]
            start, stop = max(left.start, right.start), min(left.stop, right.stop)
            if start < stop:
                product = torch.dot(
                    left.values[start - left.start : stop - left.start],
                    right.values[start - right.start : stop - right.start],
                )
                gram[first, second] = gram[second, first] = product
    return gram


class CoarseLevel:
    """Finds the best combination of the subdomains' columns within the trust region.

    Parameters
    ----------
    options
        Which columns, on which share of the samples, with what damping.
    objective
        The global objective.
    subdomains
        All subdomains.
    comm, events
        The ranks, and where work is counted.
    kind
        Norm of the ball.

    Attributes
    ----------
    step : Tensor, shape (n,)
        The step of the last `recombine`.
    last_step, last_correction : Tensor, shape (n,)
        The last accepted step, and the sum of the corrections of which it was made; the latter is empty unless
        it is among the columns.
    raised : float
        Factor of the damping, 1 or more.
    """

    def __init__(
        self,
        *,
        options: CoarseOptions,
        objective: Objective,
        subdomains: Sequence[Subdomain],
        comm: Communicator,
        events: Events,
        kind: NormKind,
    ) -> None:
        self._options = options
        # Subdomains of data all have the same part: the whole.
        self._parts = sorted({(part.owned_start, part.owned_stop) for part in subdomains})
        self._comm = comm
        self._events = events
        self._kind = kind
        assert options.norm != "auto"  # composed
        self._norm: Literal["2", "scaled"] = options.norm
        self._linearisation = Linearisation(
            objective.segmented, objective.vector, objective.buffers, objective.loss, events
        )
        self._size = objective.vector.values.numel()
        self.step = torch.zeros_like(objective.vector.values)
        self.last_step = torch.zeros_like(self.step)
        kept = "last_correction" in options.columns
        self.last_correction = torch.zeros_like(self.step[: self.step.numel() if kept else 0])
        self.raised = 1.0
        self._tried = False
        self._corrections: Sequence[Column] = []
        self._columns: list[Column] = []
        self._model: ReducedModel | None = None

    def prepare(
        self,
        passes: Sequence[Pass],
        corrections: Sequence[Column],
        gradient: torch.Tensor,
        batch_size: int,
        rows: Sequence[GaussNewtonRows] = (),
    ) -> None:
        """Form the reduced model of the subdomains' corrections. Collective.

        Parameters
        ----------
        passes
            This rank's samples.
        corrections
            One column a subdomain.
        gradient : Tensor, shape (n,)
            The global gradient.
        batch_size
            Number of samples of the batch.
        rows
            Where every rank has the rows of its own subdomains on the whole batch: those, one a pass. They give the
            curvature without another pass through the network.

        Raises
        ------
        SharedInvalidInput
            The first time, where the network or the loss cannot be differentiated so.
        """
        with self._events.timed("coarse"):
            self._corrections = corrections
            self._columns = self._columns_of(corrections, gradient)
            count, leads = len(self._columns), self._comm.rank == 0
            # What cannot be differentiated shows the first time.
            with nullcontext() if self._tried else self._comm.shared_errors():
                parts = [] if rows else [self._curvature_of_passes(passes, batch_size)]
            self._tried = True
            # The device is waited for once.
            parts += [inner_products(self._columns), self._slope(gradient)[None]] if leads else []
            own = torch.cat(parts).cpu().numpy() if parts else np.zeros((0, count))
            curvature = self._products_of_rows(passes, rows, batch_size) if rows else own[:count]
            total = self._comm.sum_on_root(curvature)
            if total is not None and rows:
                total = total @ total.T
            if total is not None:
                self._model = ReducedModel(own[-1], total, own[-1 - count : -1])

    def _columns_of(self, corrections: Sequence[Column], gradient: torch.Tensor) -> list[Column]:
        vectors = {"last_step": self.last_step, "gradient": gradient, "last_correction": self.last_correction}
        return list(corrections) + [
            Column(start, stop, vectors[name][start:stop])
            for name in self._options.columns
            if name != "correction"
            for start, stop in self._parts
        ]

    def _slope(self, gradient: torch.Tensor) -> torch.Tensor:
        """Inner products of the gradient with the columns, shape (m,), float64."""
        return torch.stack([torch.dot(gradient[c.start : c.stop], c.values) for c in self._columns]).double()

    def _curvature_of_passes(self, passes: Sequence[Pass], batch_size: int) -> torch.Tensor:
        """The reduced curvature of all columns on a share of this rank's samples, shape (m, m), float64."""
        count = len(self._columns)
        curvature = torch.zeros(count, count, dtype=torch.float64, device=self.step.device)
        for part in passes:
            thinned = part.thinned(self._share(batch_size, part.targets))
            if thinned is not None:
                curvature += thinned.weight * self._linearisation.reduced(thinned, self._columns)
        return curvature

    def _products_of_rows(self, passes: Sequence[Pass], rows: Sequence[GaussNewtonRows], batch_size: int) -> np.ndarray:
        """This rank's own columns times the rows of its samples; summed over the ranks, the curvature's square root."""
        products = np.zeros((0, 0))
        for part, of_pass in zip(passes, rows, strict=True):
            for number, column in enumerate(self._columns):
                if (column.start, column.stop) not in of_pass.owned:
                    continue
                product = of_pass.of(column.start, column.stop) @ column.values
                outputs = len(product) // part.samples
                if products.size == 0:
                    products = np.zeros((len(self._columns), batch_size * outputs))
                place = slice(part.position * outputs, (part.position + part.samples) * outputs)
                # The rows are those of the mean over this rank's samples.
                products[number, place] = product.double().cpu().numpy() * math.sqrt(part.samples / batch_size)
        return products

    def _share(self, batch_size: int, targets: torch.Tensor) -> float:
        """Share of the batch on which the curvature is measured."""
        if self._options.samples is not None:
            return self._options.samples
        return min(1.0, ENOUGH_TARGETS / (batch_size * targets[0].numel()))

    def recombine(self, radius: float) -> float:
        """Put the best step within ``radius`` into `step` and return its predicted reduction. Collective."""
        count = len(self._columns)
        damping = self._options.damping * self.raised

        def decide() -> list[float]:
            model = self._model
            assert model is not None  # on rank 0
            if not (np.isfinite(model.slope).all() and np.isfinite(model.curvature).all()):
                return [0.0] * count + [math.nan]  # which is judged a rejection
            reach = euclidean_radius(radius, self._size, self._kind)
            coefficients = model.minimise(reach, damping, self._norm)
            # The ball of the maximum norm is not one in the span, and rounding may lead out of that of the 2-norm.
            self._combine(coefficients)
            length = float(norm(self.step, self._kind))
            coefficients *= min(1.0, radius / length) if length > 0.0 else 1.0
            return [*coefficients, model.reduction(coefficients)]

        with self._events.timed("coarse"):
            *coefficients, predicted = self._comm.decide(decide)
            self._combine(coefficients)
        return predicted

    def _combine(self, coefficients: Sequence[float] | np.ndarray) -> None:
        self.step.zero_()
        for coefficient, column in zip(coefficients, self._columns, strict=True):
            self.step[column.start : column.stop].add_(column.values, alpha=float(coefficient))

    def state(self) -> dict[str, Any]:
        """What lasts from one iteration to the next, by name: numbers and tensors of shape (n,)."""
        return {"last_step": self.last_step, "last_correction": self.last_correction, "raised": self.raised}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` has returned; a last correction only where both or neither keep it."""
        self.last_step.copy_(state["last_step"])
        if len(state["last_correction"]) == len(self.last_correction):
            self.last_correction.copy_(state["last_correction"])
        self.raised = state["raised"]

    def follow(self, accepted: bool, poor: bool) -> None:
        """Take note of how the step was judged."""
        if poor:
            self.raised *= RAISE
        elif accepted:
            self.raised = max(1.0, LOWER * self.raised)
        if accepted:
            self.last_step.copy_(self.step)
            if self.last_correction.numel():
                self.last_correction.zero_()
                for column in self._corrections:
                    self.last_correction[column.start : column.stop] += column.values
