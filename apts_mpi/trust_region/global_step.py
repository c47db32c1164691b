"""The trust-region step over all parameters: first-order, L-SR1, or Steihaug-CG on products with the curvature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from apts_mpi.network.activations import Bundle
from apts_mpi.objective.objective import Objective, Pass
from apts_mpi.options import GlobalStepOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror
from apts_mpi.tools.environment import preserved_random_state, seed_stream
from apts_mpi.tools.events import BACKWARD, FORWARD, Events
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.models import LSR1, GaussNewtonProducts, HessianProducts, Product, ProductModel


class Preconditioner(Protocol):
    """An approximate inverse of the curvature over all parameters."""

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
    schwarz
        The preconditioner of steihaug; None is none.
    comm, events
        The ranks that hold the same parameters, and where work is counted.
    products
        Inner products of vectors of all parameters, and the norm of the ball.

    Attributes
    ----------
    memory : LSR1
        Pairs of lsr1: steps between points at which the gradient of one batch was evaluated, and its changes.
    """

    def __init__(
        self,
        *,
        options: GlobalStepOptions,
        objective: Objective,
        schwarz: Preconditioner | None,
        comm: Communicator,
        events: Events,
        products: InnerProducts,
    ) -> None:
        self._options = options
        self._inner = products
        self._objective = objective
        self._schwarz = schwarz
        self._comm = comm
        self._events = events
        self.memory = LSR1(inner=products)
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

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` has returned."""
        if state:
            self._function, self._values, self._gradient = state["function"], state["values"], state["gradient"]
            self.memory.restore(state["steps"], state["changes"], state["gamma"])

    def find(self, passes: Sequence[Pass], gradient: torch.Tensor, radius: float) -> tuple[torch.Tensor, float | None]:
        """The model's step within ``radius``. Collective.

        Parameters
        ----------
        passes
            This rank's samples.
        gradient : Tensor, shape (n,)
            Of the batch, at the present point.
        radius
            Of the ball.

        Returns
        -------
        step : Tensor, shape (n,)
        predicted_reduction : float or None
            None for the first-order model.
        """
        if self._options.model == "first-order":
            return self._inner.steepest_descent(gradient, radius), None
        if self._options.model == "lsr1":
            model: LSR1 | ProductModel = self.memory
        else:
            model = ProductModel(self._products(passes), self._preconditioner(), self._agree, self._inner.dots)
        step = model.minimise(gradient, self._inner.euclidean_radius(radius, gradient))
        self._inner.clip(step, radius)
        # Rank 0's for all: a model magnifies the different rounding errors of the ranks' sums.
        self._comm.share_tensors([step])
        return step, model.predict(gradient, step)

    def _products(self, passes: Sequence[Pass]) -> Product:
        """Products with the curvature of the batch at the present point, summed over passes and ranks."""
        of_rank = self._products_of_rank(passes)

        def product(direction: torch.Tensor) -> torch.Tensor:
            total = of_rank(direction)
            self._comm.sum(Mirror(total))
            return total

        return product

    def _products_of_rank(self, passes: Sequence[Pass]) -> Product:
        """The same, summed over this rank's passes."""
        objective = self._objective
        parameters, loss = objective.vector.parameters, objective.loss
        own: list[Product] = []
        for part in passes:
            # The fused kernels of attention have no second derivatives.
            with sdpa_kernel(SDPBackend.MATH):
                outputs = self._outputs(part)
            if self._options.product == "hessian":
                own.append(HessianProducts(loss(outputs, part.targets), parameters))
            else:
                own.append(GaussNewtonProducts(outputs, part.targets, loss, parameters))
            self._events.count_work(part.samples, 1.0, FORWARD + BACKWARD)

        def product(direction: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(direction)
            for part, of_pass in zip(passes, own, strict=True):
                total.add_(of_pass(direction), alpha=part.weight)
                self._events.count_work(part.samples, 1.0, 2.0 * BACKWARD)
            return total

        return product

    def _outputs(self, part: Pass) -> torch.Tensor:
        """The network's outputs with their graph, with the masks of the global evaluation."""
        objective = self._objective
        device = part.inputs.device
        with preserved_random_state(device), objective.buffers.copied():
            seed_stream(device, *part.stream)
            outputs: Bundle = part.inputs
            for segment in objective.segmented.segments:
                outputs = objective.segmented.run(segment, outputs)
        assert isinstance(outputs, torch.Tensor)
        return outputs

    def _preconditioner(self) -> Callable[[torch.Tensor], torch.Tensor] | None:
        schwarz = self._schwarz
        if schwarz is None:
            return None
        solved = Mirror(self._objective.vector.values.clone())

        def precondition(residual: torch.Tensor) -> torch.Tensor:
            schwarz.precondition(residual, solved)
            return solved.tensor

        return precondition

    def _agree(self, stop: bool) -> bool:
        return bool(self._comm.decide(lambda: [stop])[0])
