"""Options of the trust region, and of the global step in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apts_mpi.errors import require, require_fields


@dataclass(frozen=True, kw_only=True)
class TrustRegionOptions:
    """When a step is accepted and how the radius follows.

    The rule is written out in `apts_mpi.trust_region.acceptance`.

    Parameters
    ----------
    initial_radius
        First radius. None: the length of the Cauchy step of the first batch.
    min_radius
        Lower bound of the radius.
    max_radius
        Upper bound of the radius.
    eta1
        A step is accepted if rho >= eta1.
    eta2
        The radius grows if rho >= eta2 and the step reached the boundary, or ``grow_from`` of it.
    shrink_below
        The radius shrinks if rho is below this.
    decrease_factor
        What the radius, or the length of a shorter step, is multiplied by to shrink.
    increase_factor
        What the radius is multiplied by to grow.
    grow_from
        Share of the radius that a step has to reach for the radius to grow.
    norm
        Norm of the ball.
    metric
        Of a second bound: ``fisher``, the Fisher metric of earlier tasks, for sequences of tasks in layout replicated;
        ``identity``, none. See ``apts_mpi.trust_region.metric``. A training run tells it where a task ends; a program
        does by ``solver.holding.inner.metric.remember(inputs, targets)``, before which nothing is bounded.
    metric_radius
        That bound: half its square is about the Kullback-Leibler divergence by which predictions for earlier tasks may
        change while another one is learnt.
    window
        Number of earlier losses with whose maximum a trial is compared as well (non-monotone, arXiv 2605.14860);
        0 is the monotone method.
    pull
        Share of its length by which every step also takes parameters of two dimensions or more towards the origin:
        decoupled weight decay that knows no unit.
        null: 0, or 0.2 with noise batches; then a training run of known epochs has 0.1 times their root, at most 0.3.
        It is a part of the step that is judged, and for the plain sum of the corrections (coarse.model none).
    weight_decay
        After each accepted step s the n parameters are multiplied by ``1 - weight_decay |s| / sqrt(n)``, or 0:
        decoupled weight decay as AdamW has it, whose step size is here the root mean square of the step. It is no part
        of the step that is judged, and ends with the steps.
    noise
        Rounding noise of the loss, relative to it and to the epsilon of its dtype; numerator and denominator of rho
        are both raised by it, so that rho goes to 1 where reductions are below what the dtype can show.
    """

    initial_radius: float | None = None
    min_radius: float = 1e-8
    max_radius: float = 1e4
    eta1: float = 1e-4
    eta2: float = 0.75
    shrink_below: float = 0.25
    decrease_factor: float = 0.25
    increase_factor: float = 2.0
    grow_from: float = 0.999
    norm: Literal["2", "inf"] = "2"
    metric: Literal["identity", "fisher"] = "identity"
    metric_radius: float = 0.05
    window: int = 0
    pull: float | None = None
    weight_decay: float = 0.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        require_fields(self, "trust_region.")
        name = "trust_region."
        require(
            0.0 < self.min_radius < self.max_radius,
            name + "min_radius, max_radius",
            (self.min_radius, self.max_radius),
            "give 0 < min_radius < max_radius",
        )
        require(
            self.initial_radius is None or self.min_radius <= self.initial_radius <= self.max_radius,
            name + "initial_radius",
            self.initial_radius,
            f"give a number from min_radius {self.min_radius} to max_radius {self.max_radius}, or null for automatic",
        )
        require(
            0.0 <= self.eta1 <= self.shrink_below <= self.eta2 < 1.0,
            name + "eta1, shrink_below, eta2",
            (self.eta1, self.shrink_below, self.eta2),
            "give 0 <= eta1 <= shrink_below <= eta2 < 1",
        )
        small, large = self.decrease_factor, self.increase_factor
        require(0.0 < small < 1.0, name + "decrease_factor", small, "give a number in (0, 1)")
        require(large > 1.0, name + "increase_factor", large, "give a number above 1")
        require(0.0 <= self.grow_from < 1.0, name + "grow_from", self.grow_from, "give a number in [0, 1)")
        self._check_metric()
        require(self.window >= 0, name + "window", self.window, "give 0 or more")
        require(
            self.pull is None or 0.0 <= self.pull < 1.0, name + "pull", self.pull, "give a number in [0, 1), or null"
        )
        require(self.weight_decay >= 0.0, name + "weight_decay", self.weight_decay, "give 0 or more")
        require(self.noise >= 0.0, name + "noise", self.noise, "give 0 or more")

    def _check_metric(self) -> None:
        bound, is_plain = self.metric_radius, self.metric == "identity"
        require(bound > 0.0, "trust_region.metric_radius", bound, "give a number above 0")
        round_ball = is_plain or self.norm == "2"
        require(round_ball, "trust_region.metric", self.metric, "with norm 'inf' choose identity, or norm 2")


GlobalModelName = Literal["auto", "none", "first-order", "lsr1", "steihaug"]


@dataclass(frozen=True, kw_only=True)
class GlobalStepOptions:
    """The trust-region step over all parameters that follows the Schwarz step.

    Parameters
    ----------
    model
        ``none``; the ``first-order`` model, whose step goes down the gradient to the boundary of the ball; ``lsr1``,
        limited-memory SR1 from the steps on one batch; ``steihaug``, conjugate gradients on products with the
        curvature, preconditioned by the kfac of subdomains of parameters where that is the local solver. ``auto``:
        steihaug in iterations on a function that stays the same (a full batch), where kfac of subdomains of parameters
        is the local solver, of at most 131,072 of them, layout is replicated and autocast none; else none. It has a
        ball of its own, and a pause of up to 8 iterations after a step that lowered the loss little for its products.
    product
        Curvature of steihaug: ``gauss-newton`` or ``hessian``.
    iterations
        Trust-region steps in a row, each judged by itself.
    krylov_tolerance
        Of steihaug: the residual relative to the gradient at which its conjugate gradients end. null: 0.1; where the
        function stays the same, as accurate as its gradient falls fast (the second choice of Eisenstat and Walker).
    krylov_products
        Of steihaug: the most products of its conjugate gradients. null: 10, or 200 where the function stays the same.
    """

    model: GlobalModelName = "auto"
    product: Literal["gauss-newton", "hessian"] = "gauss-newton"
    iterations: int = 1
    krylov_tolerance: float | None = None
    krylov_products: int | None = None

    def __post_init__(self) -> None:
        require_fields(self, "global_step.")
        require(self.iterations >= 1, "global_step.iterations", self.iterations, "give 1 or more")
        require_krylov("global_step.", self.krylov_tolerance, self.krylov_products)


def require_krylov(prefix: str, tolerance: float | None, products: int | None) -> None:
    """Raise `InvalidInput` for limits that no Krylov solve can have."""
    allowed = tolerance is None or 0.0 < tolerance < 1.0
    require(allowed, prefix + "krylov_tolerance", tolerance, "give a number in (0, 1), or null")
    require(products is None or products >= 1, prefix + "krylov_products", products, "give 1 or more, or null")
