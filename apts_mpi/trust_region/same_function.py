"""What judged steps tell where the function stays the same from one iteration to the next: a full batch.

A step that was made for a small batch is good for that batch, so that its ratio rho says little about damping. Where
the function stays, rho says how far its model reaches: the damping then follows it down, and up again (Levenberg and
Marquardt, in the way of More, doi 10.1007/BFb0067700), and Krylov solves become as accurate as the gradient falls fast
(Eisenstat and Walker, doi 10.1137/0917003), so that the method ends superlinearly. No communication: the same on all
ranks, as the judged steps are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from apts_mpi.tools.schema import flag, instance, number
from apts_mpi.trust_region.acceptance import Judged

# Ratios below and above which the damping moves, and by what factors.
POOR, GOOD = 0.25, 0.75
RAISE, LOWER = 4.0, 0.25

# Of the factor of the damping; and the least damping that a model has by it.
SMALLEST, LARGEST = 1e-8, 4.0**10
LEAST_DAMPING = 1e-8

# Residual relative to the gradient: of a function that is new, at most, and the exponent and factor of what follows.
FIRST_FORCING, LARGEST_FORCING, FORCING_FACTOR = 0.1, 0.5, 0.9

# Products of a Krylov solve, at most: of a function that is new, whose noise is worth no more, and of one that stays.
FEW_PRODUCTS, MANY_PRODUCTS = 10, 200

# Of what the Schwarz step lowered the loss by, what each product of a global step is to add for it to pay: less than a
# product costs beside that step, as it leads on where that has come to its end.
WORTH = 0.1

# Iterations without a global step after one that did not pay: at first, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 1, 8

# Reductions below so many times the rounding noise of the loss say nothing about a model.
VISIBLE = 10.0

# A gradient that is no shorter than this share of the shortest, for so many steps that the loss cannot show, falls no
# more.
FALLING, PATIENCE = 0.5, 5


@dataclass(frozen=True)
class Limits:
    """How accurate a Krylov solve is: its residual relative to the gradient, and how many products it has at most."""

    tolerance: float = FIRST_FORCING
    products: int = FEW_PRODUCTS


USUAL = Limits()


@dataclass(frozen=True)
class SameFunction:
    """What is known of the present function from the steps that were judged on it.

    Attributes
    ----------
    accepted : bool
        Whether a step was accepted on it.
    stays : bool
        Whether that was in an earlier iteration: only then it is known to stay.
    damping : float
        Factor of the dampings of models, 1 as long as it is not known to stay.
    forcing : float
        Residual relative to the gradient at which a Krylov solve ends.
    gradient_norm : float
        Of the last judged step; 0 before the first.
    shortest_gradient : float
        Of all judged steps; 0 before the first.
    waited : int
        Judged steps in a row which the loss cannot show and before which the gradient did not fall.
    reach : float
        Radius of the ball of the automatic global step; 0 before the first.
    pause, paused : int
        Iterations until there is another one, and how many there were since the last that paid.
    """

    accepted: bool = False
    stays: bool = False
    damping: float = 1.0
    forcing: float = FIRST_FORCING
    gradient_norm: float = 0.0
    shortest_gradient: float = 0.0
    waited: int = 0
    reach: float = 0.0
    pause: int = 0
    paused: int = 0

    @property
    def converged(self) -> bool:
        """Whether loss and gradient fall no more, up to rounding."""
        return self.waited >= PATIENCE

    def again(self) -> SameFunction:
        """At the beginning of a further iteration on it."""
        return replace(self, stays=self.accepted, pause=max(self.pause - 1, 0))

    def weighed(self, schwarz: Judged, global_step: Judged, products: int) -> SameFunction:
        """After an automatic global step: one that lowered the loss less, for its cost, than the other has a pause.

        Where the loss cannot show it, it is for the gradient, and pays.
        """
        own, other = (judged.actual_reduction if judged.accepted else 0.0 for judged in (global_step, schwarz))
        if own > WORTH * products * other or not _is_visible(global_step):
            return replace(self, pause=0, paused=0)
        length = min(2 * self.paused or FIRST_PAUSE, LONGEST_PAUSE)
        return replace(self, pause=length + 1, paused=length)

    def damped(self, damping: float) -> float:
        """A damping as it is now."""
        return damping if self.damping == 1.0 else max(damping * self.damping, min(damping, LEAST_DAMPING))

    def krylov(self, tolerance: float | None, products: int | None) -> Limits:
        """Limits of a Krylov solve: those asked for, or what the function is worth."""
        usual = MANY_PRODUCTS if self.stays else FEW_PRODUCTS
        return Limits(self.forcing if tolerance is None else tolerance, usual if products is None else products)

    def relaxed(self, judged: Judged) -> SameFunction:
        """After a step of the damped models was judged: the damping follows rho."""
        if not self.stays or judged.skipped or not _is_visible(judged):
            return self
        rho = judged.model_rho
        factor = RAISE if rho < POOR else LOWER if rho > GOOD else 1.0
        return replace(self, damping=min(max(factor * self.damping, SMALLEST), LARGEST))

    def judged(self, judged: Judged) -> SameFunction:
        """After any step was judged: what the gradient at its start tells."""
        norm, shortest = judged.gradient_norm, self.shortest_gradient
        if judged.skipped or not math.isfinite(norm):
            return self
        fell = not shortest or norm < FALLING * shortest
        waits = self.stays and not fell and not _is_visible(judged)
        return replace(
            self,
            accepted=self.accepted or judged.accepted,
            forcing=self._next_forcing(norm),
            gradient_norm=norm,
            shortest_gradient=norm if fell else shortest,
            waited=self.waited + 1 if waits else 0,
        )

    def _next_forcing(self, norm: float) -> float:
        """The second choice of Eisenstat and Walker, with their safeguard against a sudden fall."""
        if not self.stays or not self.gradient_norm:
            return self.forcing
        forcing, before = FORCING_FACTOR * (norm / self.gradient_norm) ** 2, FORCING_FACTOR * self.forcing**2
        if before > FIRST_FORCING:
            forcing = max(forcing, before)
        return min(forcing, LARGEST_FORCING)


NEW = SameFunction()

CHECK_SAME = instance(
    SameFunction,
    accepted=flag,
    stays=flag,
    damping=number(SMALLEST, LARGEST),
    forcing=number(0.0, LARGEST_FORCING),
    gradient_norm=number(0.0),
    shortest_gradient=number(0.0),
    reach=number(0.0),
)


def _is_visible(judged: Judged) -> bool:
    return judged.predicted_reduction > VISIBLE * judged.noise
