"""Directions of Adam in the place of the local solver's, where its steps do not lead away from the start.

K-FAC's curvature says nothing where gradients are not finite on some sample (a root at 0), and little where a network
is all but linear: steps are accepted, one after the other, and the loss stays. What is compared are means of the losses
of accepted steps, each of its own batch, in two halves of a window. They are the same on all ranks, as rank 0 judges.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch

from apts_mpi.local.adam import adam_direction
from apts_mpi.options import APTSOptions
from apts_mpi.tools.schema import Check, number, record, sequence, whole
from apts_mpi.trust_region.acceptance import Judged
from apts_mpi.trust_region.norms import NormKind, norm

# Accepted steps of a window, and the share of the loss that has to be gained from one half of it to the other.
WINDOW, LEAST_GAIN = 16, 0.02

WATCHING, TRIED, LEADING, OVER = range(4)


class Plateau:
    """Sees once, at the beginning of a run, whether the loss falls; a part of the solver that is saved.

    Parameters
    ----------
    values : Tensor, shape (n,)
        The parameters.
    solver
        Name of the local solver.

    Attributes
    ----------
    phase : int
        Whether it watches the local solver's steps, tries directions of its own, gives them for good, or leaves all to
        the solver for good.
    """

    def __init__(self, values: torch.Tensor, solver: str) -> None:
        self._values, self._solver = values, solver
        self.phase = WATCHING
        # Of accepted steps of the present window; and the mean from which it began.
        self._losses: list[float] = []
        self._begun = 0.0
        self._moments: tuple[torch.Tensor, torch.Tensor] | None = None
        self._count = 0
        self._direction = values[:0]

    @property
    def leads(self) -> bool:
        """Whether the corrections are to be its own."""
        return self.phase in (TRIED, LEADING)

    def see(self, gradient: torch.Tensor) -> None:
        """Take in the gradient of a batch, shape (n,)."""
        if self._moments is None:
            self._moments = torch.zeros_like(self._values), torch.zeros_like(self._values)
        self._count += 1
        self._direction = adam_direction(*self._moments, self._count, gradient)

    def displacement(self, start: int, stop: int, radius: float, kind: NormKind) -> torch.Tensor:
        """A step of length ``radius`` of the parameters from ``start`` to ``stop``."""
        own = self._direction[start:stop]
        length = norm(own, kind)
        return own * (-radius / torch.where(length > 0.0, length, torch.ones_like(length)))

    def follow(self, judged: Judged) -> list[str]:
        """Take note of a step; return what is new, one sentence."""
        if self.phase in (LEADING, OVER) or not judged.accepted:
            return []
        self._losses.append(judged.loss)
        if len(self._losses) < WINDOW:
            return []
        earlier, later = fmean(self._losses[: WINDOW // 2]), fmean(self._losses[WINDOW // 2 :])
        self._losses = []
        if self.phase == TRIED:
            self.phase = OVER if _stays(self._begun, later) else LEADING
            again = f"local.solver: {self._solver} again, as Adam's directions led no further"
            return [again] if self.phase == OVER else []
        self.phase, self._begun = (TRIED if _stays(earlier, later) else OVER), earlier
        found = f"the first {WINDOW} accepted steps of {self._solver} left the loss at {later:.3g}"
        return [f"local.solver: {found}; directions of Adam's take its place"] if self.phase == TRIED else []

    def state(self) -> dict[str, Any]:
        """See `apts_mpi.state.solver.Part`."""
        numbers = {"phase": self.phase, "losses": self._losses, "begun": self._begun, "count": self._count}
        moments = dict(zip(("first_moment", "second_moment"), self._moments or (), strict=False))
        return numbers | (moments if self.leads else {})

    def saved(self, vector: Check, vector_or_empty: Check) -> Check:
        """See `apts_mpi.state.solver.Part`."""
        numbers = {"phase": whole(0, OVER), "losses": sequence(number(), most=WINDOW), "begun": number()}
        return record(numbers | {"count": whole()}, {"first_moment": vector, "second_moment": vector})

    def restore(self, state: dict[str, Any]) -> list[str]:
        """See `apts_mpi.state.solver.Part`."""
        self.phase, self._losses, self._begun = state["phase"], list(state["losses"]), state["begun"]
        self._count, self._moments = state["count"], None
        if "first_moment" in state and "second_moment" in state:
            self._moments = state["first_moment"].clone(), state["second_moment"].clone()
        return []


def _stays(before: float, after: float) -> bool:
    return math.isfinite(after) and before > 0.0 and after > (1.0 - LEAST_GAIN) * before


def make_plateau(asked_for: APTSOptions, composed: APTSOptions, values: torch.Tensor) -> Plateau | None:
    """One for a local solver that nobody has chosen, which is kfac; not where batches are noisy, nor of data."""
    is_left_open = asked_for.local.solver == "auto" and composed.local.solver == "kfac"
    is_usual = composed.noise != "batches" and composed.schwarz.decomposition == "parameters"
    return Plateau(values, composed.local.solver) if is_left_open and is_usual else None
