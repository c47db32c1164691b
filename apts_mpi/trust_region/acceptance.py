"""When a step is accepted, and how the radius follows. No communication."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

from apts_mpi.options import TrustRegionOptions
from apts_mpi.trust_region.measured import Measured

# Share of the radius from which on the ball, or those of subdomains in it, may have made a step too short to change a
# parameter: the radius then grows.
OF_THE_BALL = 1e-2


@dataclass(frozen=True)
class Judged:
    """One judged step.

    Attributes
    ----------
    loss, trial_loss
        f_k before and after the step.
    predicted_reduction, actual_reduction, rho
        Of the model, of f_k (from the maximum of the window, if any), and their ratio.
    accepted
        Whether the step is taken.
    radius
        Radius of the ball in which the step was looked for.
    next_radius
        Radius of the next step.
    step_norm, gradient_norm
        Norms of the step (in the norm of the ball) and of the gradient (2-norm); not a number where nobody asked. A
        step that is too short to change a parameter has length 0.
    skipped
        Whether the batch says nothing about the ball, as its loss or gradient is not finite or its gradient is zero:
        then nothing of the method moves.
    not_finite_on
        First rank whose share of a loss that is not finite is not; -1 where there is none, or all ranks' are not.
    noise
        Of a loss, absolute: smaller reductions are not to be seen.
    """

    loss: float
    trial_loss: float
    predicted_reduction: float
    actual_reduction: float
    rho: float
    accepted: bool
    radius: float
    next_radius: float
    step_norm: float
    gradient_norm: float = math.nan
    skipped: bool = False
    not_finite_on: int = -1
    noise: float = 0.0

    @property
    def model_rho(self) -> float:
        """How well the model predicted the loss: rho without a window of earlier losses."""
        return ratio(self.loss - self.trial_loss, self.predicted_reduction, self.noise)

    @property
    def at_rest(self) -> bool:
        """Whether the batch has nothing left to gain: a zero gradient, or no step even in the smallest ball."""
        no_smaller = self.next_radius == self.radius
        return self.gradient_norm == 0.0 or (no_smaller and not self.accepted and not self.skipped)

    def record(self) -> dict[str, float]:
        """Its numbers by their names; the rank is a part of the reason, and the noise follows from the loss."""
        return {name: value for name, value in asdict(self).items() if name not in ("not_finite_on", "noise")}

    @property
    def reason(self) -> str:
        """What is known of why the step was rejected, for who started the run; empty where it was accepted."""
        where = f" on rank {self.not_finite_on}" if self.not_finite_on >= 0 else ""
        if self.accepted:
            return ""
        if not math.isfinite(self.loss):
            return (
                f"the loss is not finite{where}; look for nan and inf in the inputs, the targets and the network's "
                "outputs"
            )
        if self.skipped and not math.isfinite(self.gradient_norm):
            return "the gradient is not finite; look for a root or logarithm of 0 in the network and the loss"
        if self.gradient_norm == 0.0:
            return "the gradient is 0; look for what cuts the network off from the loss"
        if not 0.0 < self.predicted_reduction < math.inf:
            predicted = f"the predicted reduction is {self.predicted_reduction:g}"
            return f"{predicted}; choose --coarse none, or another local solver"
        if not math.isfinite(self.trial_loss):
            return f"the loss after the step is not finite{where}; give a smaller --trust-region.initial-radius"
        return (
            f"the last one had rho {self.rho:.3g} with radius {self.radius:.3g}; give more --epochs, in which the "
            "radius shrinks further, or a smaller --trust-region.initial-radius"
        )


def ratio(actual: float, predicted: float, noise: float) -> float:
    """Actual over predicted reduction, both raised by the noise; -inf for what is not finite or predicts none."""
    if not (math.isfinite(actual) and 0.0 < predicted < math.inf):
        return -math.inf
    return (actual + noise) / (predicted + noise)


def judge(
    options: TrustRegionOptions,
    *,
    radius: float,
    loss: float,
    trial_loss: float,
    predicted_reduction: float,
    step_norm: float,
    earlier_losses: tuple[float, ...] = (),
    noise: float = 0.0,
) -> Judged:
    """Judge a step. The rule::

        reference = max(loss, earlier losses of the window)
        actual    = reference - trial_loss
        rho       = (actual + noise) / (predicted_reduction + noise)
        accept     if rho >= eta1, and step_norm > 0
        model rho = (loss - trial_loss + noise) / (predicted_reduction + noise)
        next radius = decrease_factor * min(radius, step_norm)   if model rho <  shrink_below
                      increase_factor * radius                   if model rho >= eta2 and step_norm reached the radius
                      radius                                     otherwise, within [min_radius, max_radius]

    A window lets steps rise; it says nothing about how far the model reaches.

    Anything not finite, and a predicted reduction that is not positive, is a rejection with
    ``radius * decrease_factor``, as in PETSc (src/snes/impls/tr/tr.c).

    Parameters
    ----------
    options
        The constants.
    radius, step_norm
        Radius of the ball and norm of the step.
    loss, trial_loss
        Loss before and after the step on one batch.
    predicted_reduction
        Of the model that gave the step.
    earlier_losses
        Losses of earlier iterations; the last ``options.window`` of them count.
    noise
        Of a loss, absolute: reductions below it are not to be seen (Conn, Gould and Toint, Trust-Region Methods,
        section 17.4.2).
    """
    window = earlier_losses[-options.window :] if options.window else ()
    actual = max(loss, *window) - trial_loss if window else loss - trial_loss
    finite = math.isfinite(loss) and math.isfinite(step_norm)
    rho = ratio(actual, predicted_reduction, noise) if finite else -math.inf
    of_model = ratio(loss - trial_loss, predicted_reduction, noise) if finite else -math.inf
    following = radius
    if of_model == -math.inf:
        following = options.decrease_factor * radius
    elif of_model < options.shrink_below:
        following = options.decrease_factor * min(radius, step_norm)
    elif of_model >= options.eta2 and step_norm >= options.grow_from * radius:
        following = options.increase_factor * radius
    following = min(max(following, options.min_radius), options.max_radius)
    accepted = rho >= options.eta1 and step_norm > 0.0
    numbers = loss, trial_loss, predicted_reduction, actual, rho, accepted, radius, following, step_norm
    return Judged(*numbers, noise=noise)


def of_blocks(judged: Judged, options: TrustRegionOptions, share: float) -> Judged:
    """A judged sum of blocks, each in a ball of ``share`` of the radius: one block that was cut lets the radius grow.

    The sum is then at least as long as that ball, 1 / sqrt(N) of the radius for N blocks in the 2-norm.
    """
    reached = judged.step_norm >= options.grow_from * share * judged.radius
    if not (reached and judged.model_rho >= options.eta2):
        return judged
    return replace(judged, next_radius=min(options.increase_factor * judged.radius, options.max_radius))


def untried(loss: float, predicted_reduction: float, step_norm: float, radius: float) -> Judged:
    """A step that is taken without a trial, as the next batch will judge it: one that goes down by its model."""
    accepted = 0.0 < predicted_reduction < math.inf and 0.0 < step_norm < math.inf
    return Judged(loss, math.nan, predicted_reduction, math.nan, math.nan, accepted, radius, radius, step_norm)


def judged_of(record: Sequence[float]) -> Judged:
    """A judged step from the numbers of its fields, in their order."""
    values = dict(zip((value.name for value in fields(Judged)), record, strict=True))
    accepted, skipped, rank = (values.pop(name) for name in ("accepted", "skipped", "not_finite_on"))
    return Judged(**values, accepted=bool(accepted), skipped=bool(skipped), not_finite_on=int(rank))


def judge_measured(
    step: Measured,
    *,
    options: TrustRegionOptions,
    radius: float,
    predicted_reduction: float | None,
    earlier_losses: Sequence[float],
    rounding: float,
    share: float = 1.0,
) -> Judged:
    """Judge a step from what all ranks know of it; on rank 0.

    Parameters
    ----------
    step
        What they know.
    options
        Of the solver.
    radius
        Of the ball in which the step was looked for.
    predicted_reduction
        Of the model; None for the first-order one, whose reduction is ``-<gradient, step>``.
    earlier_losses
        Of the window.
    rounding
        Relative error of a loss.
    share
        Of the radius, in which each block of a plain sum was looked for: see ``of_blocks``.
    """
    judged = judge(
        options,
        radius=radius,
        loss=step.loss,
        trial_loss=step.trial_loss,
        predicted_reduction=-step.slope if predicted_reduction is None else predicted_reduction,
        step_norm=step.step_norm,
        earlier_losses=tuple(earlier_losses),
        noise=options.noise * rounding * abs(step.loss),
    )
    # What a model gave was looked for in the whole ball.
    judged = of_blocks(judged, options, share if predicted_reduction is None else 1.0)
    return _with_facts(judged, step, options)


def judge_untried(
    step: Measured, *, options: TrustRegionOptions, radius: float, predicted_reduction: float | None
) -> Judged:
    """`judge_measured` of a step that the next batch will judge, whose loss after it says nothing."""
    predicted = -step.slope if predicted_reduction is None else predicted_reduction
    return _with_facts(untried(step.loss, predicted, step.step_norm, radius), step, options)


def _with_facts(judged: Judged, step: Measured, options: TrustRegionOptions) -> Judged:
    """A judged step with what else the ranks know: gradient, ranks without a number, steps too short to be one."""
    loss, radius, gradient_norm = judged.loss, judged.radius, step.gradient_norm
    before, after = step.not_finite
    judged = replace(judged, gradient_norm=gradient_norm, not_finite_on=after if math.isfinite(loss) else before)
    if not (math.isfinite(loss) and math.isfinite(gradient_norm)) or gradient_norm == 0.0:
        return replace(judged, accepted=False, skipped=True, next_radius=radius)
    if step.has_moved:
        return judged
    following = judged.next_radius
    if following == radius and step.step_norm > OF_THE_BALL * radius:
        following = min(options.increase_factor * radius, options.max_radius)
    return replace(judged, accepted=False, step_norm=0.0, next_radius=following)
