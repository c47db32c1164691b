"""The trust-region step over all parameters: first-order, L-SR1, or Steihaug-CG on products with the curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from apts_mpi.curvature.products import Product
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Pass
from apts_mpi.options import GlobalStepOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror
from apts_mpi.tools.schema import Check, allow, number, record, sequence, whole
from apts_mpi.trust_region.acceptance import Judged
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.models import LSR1, PAIRS, ProductModel
from apts_mpi.trust_region.same_function import SameFunction


class Preconditioner(Protocol):
    """An approximate inverse of the curvature over all parameters."""

    @property
    def preconditions(self) -> bool:
        """Whether it knows the curvature."""

    def precondition(self, residual: torch.Tensor, solved: Mirror) -> None:
        """Put the approximate inverse times ``residual`` into ``solved``. Collective."""


class GlobalStep:
    """Finds a step from the present point within the ball; right preconditioning by the Schwarz step before it.

    Memory: lsr1 keeps 2 vectors of all parameters for each of its pairs, as many for Psi (15 at 5 pairs), and the last
    point and gradient, on every rank. steihaug keeps five vectors and the graph of this rank's samples, about three
    times what a gradient needs, while it looks for a step.

    Parameters
    ----------
    options
        Model and product.
    objective
        The global objective.
    preconditioner
        Of steihaug; None is none.
    comm
        The ranks that hold the same parameters.
    inner
        Inner products of vectors of all parameters, and the norm of the ball.
    products_of_rank
        Makes products with the curvature at the present point, summed over some passes of this rank.

    Attributes
    ----------
    memory : LSR1
        Pairs of lsr1: steps between points at which the gradient of one batch was evaluated, and its changes.
    """

    def __init__(
        self,
        options: GlobalStepOptions,
        *,
        objective: Objective,
        preconditioner: Preconditioner | None,
        comm: Communicator,
        inner: InnerProducts,
        products_of_rank: Callable[[Sequence[Pass]], Product],
    ) -> None:
        self._options = options
        self._inner = inner
        self._objective = objective
        self._preconditioner = preconditioner
        self._comm = comm
        self._products_of_rank = products_of_rank
        self.memory = LSR1(inner=inner)
        self._count = 0
        self._is_tried = self._is_possible = False
        self._function: int | None = None
        self._values = self._gradient = objective.vector.values[:0]

    def observe(self, function: int, gradient: torch.Tensor) -> None:
        """Learn from a gradient at the present point.

        The difference of two gradients is a secant of one function only: of the same batch, masks and statistics.

        Parameters
        ----------
        function
            Number of the function, k of f_k.
        gradient : Tensor, shape (n,)
            Its gradient.
        """
        if self._options.model != "lsr1":
            return
        values = self._objective.vector.values
        if function == self._function:
            self.memory.update(values - self._values, gradient - self._gradient)
        self._function, self._values, self._gradient = function, values.clone(), gradient.clone()

    def state(self) -> dict[str, Any]:
        """What lasts from one iteration to the next: numbers, tensors of shape (n,) and lists of them, by name."""
        if self._function is None:
            return {}
        memory = self.memory
        return {
            "function": self._function,
            "values": self._values,
            "gradient": self._gradient,
            "steps": memory.steps,
            "changes": memory.changes,
            "gamma": memory.gamma,
        }

    def saved(self, vector: Check, vector_or_empty: Check) -> Check:
        """See ``apts_mpi.state.solver.Part``."""
        pairs = sequence(vector, PAIRS)
        known = record(
            {
                "function": whole(),
                **dict.fromkeys(("values", "gradient"), vector),
                **dict.fromkeys(("steps", "changes"), pairs),
                "gamma": number(),
            }
        )

        def check(value: Any, place: str) -> dict[str, Any]:
            if value == {}:
                return {}
            found: dict[str, Any] = known(value, place)
            steps, changes = len(found["steps"]), len(found["changes"])
            allow(steps == changes, f"{place}.changes", changes, f"as many as steps, {steps}")
            return found

        return check

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Take over what `state` has returned, all of it."""
        if state:
            self._function, self._values, self._gradient = state["function"], state["values"], state["gradient"]
            self.memory.restore(state["steps"], state["changes"], state["gamma"])
        return []

    def is_due(self, same: SameFunction, passes: Sequence[Pass]) -> bool:
        """Whether there is to be a step from the present point. Collective.

        With model auto where the function is known to stay, unless there is a pause, or no products can be made.
        """
        if not self.is_automatic:
            return True
        if not same.stays or same.pause:
            return False
        if not self._is_tried:
            self._is_tried, self._is_possible = True, self._try(passes)
        return self._is_possible

    def _try(self, passes: Sequence[Pass]) -> bool:
        """See whether products can be made of this rank's samples, and say once if not. Collective."""
        events = self._comm.events
        work = events.work
        try:
            with self._comm.shared_errors(), self._objective.buffers.copied():
                self._products_of_rank(passes)(torch.zeros_like(self._objective.vector.values))
        except SharedInvalidInput as error:
            events.notes.add(f"global_step.model auto: there is no global step ({error})")
            return False
        finally:
            events.work = work  # a resumed run tries once more
        return True

    @property
    def is_automatic(self) -> bool:
        """Whether the model is left auto."""
        return self._options.model == "auto"

    def weigh(self, same: SameFunction, schwarz: Judged, judged: Judged) -> SameFunction:
        """What is known of the function after both steps of an iteration."""
        return same.weighed(schwarz, judged, self._count) if self.is_automatic else same

    def __call__(
        self, passes: Sequence[Pass], gradient: torch.Tensor, radius: float, same: SameFunction
    ) -> tuple[torch.Tensor, float | None]:
        """The model's step within ``radius``. Collective.

        Parameters
        ----------
        passes
            This rank's samples.
        gradient : Tensor, shape (n,)
            Of the batch, at the present point.
        radius
            Of the ball.
        same
            What is known of the function.

        Returns
        -------
        step : Tensor, shape (n,)
        predicted_reduction : float or None
            None for the first-order model.
        """
        with self._comm.events.timed("global step"):
            return self.find(passes, gradient, radius, same)

    def find(
        self, passes: Sequence[Pass], gradient: torch.Tensor, radius: float, same: SameFunction
    ) -> tuple[torch.Tensor, float | None]:
        if self._options.model == "first-order":
            return self._inner.steepest_descent(gradient, radius), None
        if self._options.model == "lsr1":
            model: LSR1 | ProductModel = self.memory
        else:
            limits = same.krylov(self._options.krylov_tolerance, self._options.krylov_products)
            model = ProductModel(self._products(passes), self._precondition(), self._agree, self._inner.dots, limits)
        with self._objective.buffers.copied():  # what is run again in a backward pass must not move statistics
            step = model.minimise(gradient, self._inner.euclidean_radius(radius, gradient))
            self._inner.clip(self._objective.vector.still(step), radius)
            # Rank 0's for all: a model magnifies the different rounding errors of the ranks' sums.
            self._comm.share_tensors([step])
            return step, model.predict(gradient, step)

    def _products(self, passes: Sequence[Pass]) -> Product:
        """Products with the curvature of the batch at the present point, summed over passes and ranks."""
        of_rank, self._count = self._products_of_rank(passes), 0

        def product(direction: torch.Tensor) -> torch.Tensor:
            self._count += 1
            total = of_rank(direction)
            self._comm.sum(Mirror(total))
            return self._objective.vector.still(total)

        return product

    def _precondition(self) -> Product | None:
        preconditioner = self._preconditioner
        if preconditioner is None:
            return None
        solved = Mirror(self._objective.vector.values.clone())

        def precondition(residual: torch.Tensor) -> torch.Tensor:
            preconditioner.precondition(residual, solved)
            return self._objective.vector.still(solved.tensor)

        return precondition

    def _agree(self, stop: bool) -> bool:
        return bool(self._comm.decide(lambda: [stop])[0])


def make_global_step(
    options: GlobalStepOptions,
    level: Preconditioner,
    *,
    objective: Objective,
    comm: Communicator,
    inner: InnerProducts,
    products_of_rank: Callable[[Sequence[Pass]], Product],
) -> GlobalStep | None:
    """The global step of the options, preconditioned by the Schwarz ``level`` where that can; see `GlobalStep`."""
    if options.model == "none":
        return None
    preconditioner = level if level.preconditions else None
    return GlobalStep(
        options,
        objective=objective,
        preconditioner=preconditioner,
        comm=comm,
        inner=inner,
        products_of_rank=products_of_rank,
    )
