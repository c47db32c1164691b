"""Why a step was rejected, in words for who started the run."""

from __future__ import annotations

import math

from apts_mpi.trust_region.acceptance import Judged


def why_not_accepted(judged: Judged) -> str:
    """What is known of why a step was rejected."""
    if not math.isfinite(judged.loss):
        return "the loss is not finite; look for nan and inf in the inputs, the targets and the network's outputs"
    if not math.isfinite(judged.gradient_norm):
        return "the gradient is not finite; look for a root or logarithm of 0 in the network and the loss"
    if judged.gradient_norm == 0.0:
        return "the gradient is 0; look for what cuts the network off from the loss"
    if not 0.0 < judged.predicted_reduction < math.inf:
        return (
            f"the predicted reduction is {judged.predicted_reduction:g}; choose --coarse none, or another local solver"
        )
    if not math.isfinite(judged.trial_loss):
        return "the loss after the step is not finite; give a smaller --trust-region.initial-radius"
    return (
        f"the last one had rho {judged.rho:.3g} with radius {judged.radius:.3g}; give more --epochs, in which the "
        "radius shrinks further, or a smaller --trust-region.initial-radius"
    )
