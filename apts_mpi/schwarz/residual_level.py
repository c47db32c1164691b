"""The coarse level in the space of the residuals: each subdomain's part of the exact Gauss-Newton step of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from apts_mpi.curvature.dense import LARGEST_DENSE
from apts_mpi.curvature.linearisation import Column
from apts_mpi.curvature.rows import GaussNewtonRows
from apts_mpi.objective.batch import Batch
from apts_mpi.objective.objective import Objective
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.result import State
from apts_mpi.schwarz.coarse import saved_coarse_state
from apts_mpi.schwarz.residual_system import (
    Columns,
    Form,
    NormalSystem,
    ResidualSystem,
    by_factors,
    by_products,
    cheaper_form,
    summed,
)
from apts_mpi.tools.schema import Check
from apts_mpi.trust_region.acceptance import Judged
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.levenberg_marquardt import Damping

# Least damping, relative to the size of the matrix, whose rounding errors are of that order.
LEAST = 1e-16

# Of a matrix without any.
TINY = 1e-30

# Length of the difference, relative to the step, that gives the second derivative of the outputs along it: rounding
# errors of float32 are seen in a shorter one.
DIFFERENCES = {torch.float32: 0.5, torch.float64: 0.1}

# What a rejection leaves of the last step in the momentum; nothing, where the model says that it leads up.
LEFT_OF_MOMENTUM = 0.5

# How often the damping is raised at most until a step is within the largest ball, ten times each.
RAISES = 100


class ResidualLevel:
    """Solves ``min |R s + r|^2 + lambda |s|^2`` for the rows R of all subdomains; see `docs/method.md`.

    Parameters
    ----------
    options
        Of the whole solver, composed.
    objective
        The global objective.
    rows
        The rows of this rank's samples at the present point, for the parameters that it holds.
    comm, group
        All ranks, and those that hold the same parameters.
    inner
        Norms over all parameters.

    Attributes
    ----------
    step, last_step : Tensor, shape (n,)
        That of the last `recombine`; and the last accepted one, less of it after a rejection.
    damping : Damping
        lambda.
    """

    def __init__(
        self,
        options: APTSOptions,
        *,
        objective: Objective,
        rows: Callable[[], Sequence[GaussNewtonRows]],
        comm: Communicator,
        group: Communicator,
        inner: InnerProducts,
    ) -> None:
        self._options, self._region = options.coarse, options.trust_region
        assert self._options.acceleration is not None  # composed
        self._acceleration = self._options.acceleration
        self._is_whole = options.layout == "replicated"
        self._objective, self._rows = objective, rows
        self._comm, self._group, self._inner = comm, group, inner
        self._values = objective.vector.values
        self.step, self.last_step = torch.zeros_like(self._values), torch.zeros_like(self._values)
        self.damping = Damping()
        self._taken = 0.0
        self._size = round(float(inner.sum(np.array([float(len(self._values))]))[0]))
        # Whoever gives a first radius means the first step.
        self._largest = self._region.initial_radius or self._region.max_radius

    def prepare(self, batch: Batch, corrections: Sequence[Column], gradient: torch.Tensor) -> None:
        """Form the equations at the present point. Collective.

        Parameters
        ----------
        batch
            The samples.
        corrections
            Of the subdomains; not used.
        gradient : Tensor, shape (n,)
            The global gradient.
        """
        with self._comm.events.timed("coarse"):
            (self._of_pass,) = self._rows()
            self._share = batch.shares[0] ** 0.5
            own = self._of_pass.of(0, len(self._values)).to(torch.float64, copy=True).mul_(self._share)
            own.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
            own *= self._objective.vector.still(own.new_ones(own.shape[1]))
            counts = self._group.numbers(len(own))
            start = sum(counts[: self._group.rank])
            self._place, self._count = slice(start, start + len(own)), sum(counts)
            self._system = self._make_system(own)
            residuals, is_complete = self._of_pass.residuals()
            self._residuals = self._put_together(residuals)
            all_complete = not self._comm.largest(not is_complete)[0]
            self._remainder = None
            if not all_complete:
                remainder = gradient.double() - self._system.transposed(self._residuals)
                self._remainder = remainder.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)

    def _make_system(self, own: torch.Tensor) -> ResidualSystem:
        if self._is_whole and self._size <= LARGEST_DENSE and self._form() == "normal":
            return NormalSystem(own, self._comm)
        if self._count > LARGEST_DENSE:
            return by_products(Columns(own, self._comm, self._group), self._comm)
        return by_factors(Columns(own, self._comm, self._group), self._comm)

    def _form(self) -> Form:
        """The cheaper matrix; that of the parameters where that of the rows is too large."""
        if self._count > LARGEST_DENSE:
            return "normal"
        return cheaper_form(self._count, self._size, self._comm.size)

    def _put_together(self, own: torch.Tensor) -> torch.Tensor:
        """Numbers of the rows of all ranks, shape (rows,), from those of this rank's samples. Collective."""
        whole = own.new_zeros(self._count, dtype=torch.float64)
        whole[self._place] = own.double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * self._share
        return summed(whole, self._comm)

    def recombine(self, state: State) -> float:
        """Put the step of the present damping into `step` and return its predicted reduction. Collective.

        The ball becomes the one that has the step on its boundary.
        """
        with self._comm.events.timed("coarse"):
            velocity, moved = self._first_order()
            slope = float(torch.dot(self._residuals, moved))
            if self._remainder is not None:
                slope += self._inner.dots((self._remainder, velocity))[0]
            step = self._accelerated(velocity, moved) if self._acceleration else velocity
            self.step.copy_(step)
            self._inner.clip(self.step, self._largest)
            length = self._inner.norm(self.step)
            predicted, state.radius = self._comm.decide(
                lambda: [
                    -slope - 0.5 * float(torch.dot(moved, moved)),
                    min(max(length, self._region.min_radius), self._region.max_radius),
                ]
            )
        return predicted

    def _first_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The step without its second-order part, within the largest ball; and R times it."""
        base, data = None, self._residuals
        if self._options.momentum:
            base = self.last_step.double() * self._options.momentum
            data = data + self._system.times(base)
        # It is the level's when the step is judged: a batch that says nothing leaves it as it was.
        damping = self.damping.for_matrix(self._system.trace)
        for _ in range(RAISES):
            damping = self._system.factorise(max(damping, LEAST * self._system.trace, TINY))
            step = -self._system.solve(data, self._remainder)
            if base is not None:
                step += base
            if self._fits(self._inner.norm(step)):
                break
            damping *= 10.0
        self._taken = damping
        return step, self._system.times(step)

    def _fits(self, length: float) -> bool:
        """Whether a step of rank 0's length is within the largest ball, or no number. Collective."""
        return bool(self._comm.decide(lambda: [length <= self._largest or not math.isfinite(length)])[0])

    def _accelerated(self, velocity: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """With half of the acceleration that keeps the outputs on their way, unless it is large (geodesic)."""
        before, share = self._values.clone(), DIFFERENCES[self._values.dtype]
        self._values.add_(velocity.to(self._values.dtype), alpha=share)
        difference = self._put_together(self._of_pass.moved())
        self._values.copy_(before)
        bent = (difference / share - moved) * (2.0 / share)
        acceleration = -self._system.solve(bent)
        sizes = self._inner.euclidean_norms(acceleration, velocity)
        (is_small,) = self._comm.decide(lambda: [2.0 * sizes[0] <= self._acceleration * sizes[1]])
        return velocity + 0.5 * acceleration if is_small else velocity

    def follow(self, judged: Judged, poor: bool) -> None:
        """Take note of how the step was judged: by its own point, whatever earlier losses it was compared with."""
        noise = self._region.noise * self._objective.epsilon * abs(judged.loss)
        actual, predicted = judged.loss - judged.trial_loss, judged.predicted_reduction
        rho = (actual + noise) / (predicted + noise) if predicted > 0.0 else 0.0
        hides_all = self._taken > self._system.trace and predicted <= noise
        if judged.step_norm == 0.0 or hides_all:
            self.damping.shorten(self._taken)
        else:
            self.damping.follow(self._taken, judged.accepted, rho, predicted > noise)
        self._largest = self._region.max_radius
        if judged.accepted:
            self.last_step.copy_(self.step)
        else:
            # However large the damping, the step is no shorter than the momentum that it draws to.
            self.last_step *= LEFT_OF_MOMENTUM if predicted > 0.0 else 0.0

    def state(self) -> dict[str, Any]:
        """What lasts from one iteration to the next, by name: numbers and tensors of shape (n,)."""
        kept = {"last_step": self.last_step, "last_correction": self.last_step[:0], "raised": 1.0}
        return kept | {"residual": {"damping": self.damping.value, "rise": self.damping.rise}}

    def saved(self, vector: Check, vector_or_empty: Check) -> Check:
        """See ``apts_mpi.state.solver.Part``."""
        return saved_coarse_state(vector, vector_or_empty)

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Take over what `state` has returned; the last step alone of another coarse level."""
        self.last_step.copy_(state["last_step"])
        known = state.get("residual")
        if known is not None:
            self.damping = Damping(known["damping"], known["rise"])
        if self.damping.value > 0.0:
            self._largest = self._region.max_radius
        return [] if known is not None else ["coarse.model: the damping of the residual level begins anew"]


def make_residual_level(
    options: APTSOptions,
    objective: Objective,
    rows: Callable[[], Sequence[GaussNewtonRows]],
    comm: Communicator,
    group: Communicator,
    inner: InnerProducts,
) -> ResidualLevel | None:
    """The level of the options, None where they have another one; see `ResidualLevel`."""
    if options.coarse.model != "residual":
        return None
    return ResidualLevel(options, objective=objective, rows=rows, comm=comm, group=group, inner=inner)
