"""The coarse level: subdomain corrections recombined by the Gauss-Newton model in their span."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from apts_mpi.curvature.linearisation import Column
from apts_mpi.errors import SharedInvalidInput, shortened
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.objective.batch import Batch
from apts_mpi.options import SUBDOMAINS, USUAL_LARGEST, APTSOptions, CoarseOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.result import State
from apts_mpi.schwarz.aggregation import Groups, most_groups
from apts_mpi.schwarz.coarse_space import CoarseState, check_columns, make_coarse_space
from apts_mpi.schwarz.column_products import inner_products
from apts_mpi.schwarz.reduced_curvature import ReducedCurvature
from apts_mpi.schwarz.reduced_model import ReducedModel
from apts_mpi.tools.environment import preserved_random_state
from apts_mpi.tools.schema import Check, line, mapping, number, record
from apts_mpi.trust_region.acceptance import Judged
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.norms import euclidean_radius

# A poor ratio raises the damping, an accepted step takes half of that back, never below what the options say: a good
# ratio on one batch does not see sampling noise, and following it down drives the damping to nothing.
RAISE, LOWER = 4.0, 0.5

# Of the raised damping: with more of it a step is too short to be seen, and the model of it no longer one of numbers.
LARGEST = RAISE**10


def saved_coarse_state(vector: Check, vector_or_empty: Check) -> Check:
    """What the state of a coarse level has to be in a file, whichever: one takes over what it can of another's."""
    kept = {"last_step": vector, "last_correction": vector_or_empty, "raised": number(1.0, math.inf)}
    residual = record({"damping": number(0.0), "rise": number(1.0)})
    return record(kept, {"space": record({"name": line, "state": mapping()}), "residual": residual})


class CoarseLevel:
    """Finds the best combination of the columns of the coarse space within the trust region.

    Parameters
    ----------
    options
        Which columns, and with what damping; composed.
    parts
        The ranges of the flat vector of this rank that its subdomains own.
    like : Tensor, shape (n,)
        A vector such as the parameters that this rank holds.
    comm
        All ranks.
    curvature
        Forms the reduced model.
    inner
        Norms over all parameters.
    size
        Number of all parameters.

    Attributes
    ----------
    parts
        As given.
    is_asked : bool
        Whether the model was asked for: where it cannot be formed, that is an error, and else the plain sum is taken.
    step : Tensor, shape (n,)
        The step of the last `recombine`.
    last_step, last_correction : Tensor, shape (n,)
        The last accepted step, and the sum of the corrections of which it was made; the latter is empty unless
        the space needs it.
    raised : float
        Factor of the damping, 1 or more.
    curvature : ReducedCurvature
        As given.
    model : ReducedModel or None
        On rank 0, that of the last `prepare`.
    """

    def __init__(
        self,
        options: CoarseOptions,
        *,
        parts: Sequence[tuple[int, int]],
        like: torch.Tensor,
        comm: Communicator,
        curvature: ReducedCurvature,
        inner: InnerProducts,
        size: int,
    ) -> None:
        self._options = options
        self.is_asked = True
        self._has_model = True
        assert options.norm != "auto"  # composed
        self._norm: Literal["2", "scaled"] = options.norm
        with comm.shared_errors():  # a class of the user's may not be there
            self._space = make_coarse_space(options)
        self.parts = parts
        self._comm = comm
        self.curvature = curvature
        self._inner = inner
        self._size = size
        self.step = torch.zeros_like(like)
        self.last_step = torch.zeros_like(like)
        self.last_correction = torch.zeros_like(like[: len(like) if self._space.needs_last_correction else 0])
        self.raised = 1.0
        self.model: ReducedModel | None = None
        self._groups: Groups | None = None
        self._corrections: Sequence[Column] = []
        self._state: CoarseState | None = None
        self._columns: Sequence[Column] = []
        self._coefficients = np.zeros(0)

    def prepare(self, batch: Batch, corrections: Sequence[Column], gradient: torch.Tensor) -> None:
        """Form the reduced model of the subdomains' corrections. Collective.

        Parameters
        ----------
        batch
            The samples.
        corrections
            One column a subdomain.
        gradient : Tensor, shape (n,)
            The global gradient.

        Raises
        ------
        SharedInvalidInput
            The first time, where the network or the loss cannot be differentiated so, and that was asked for; or where
            there are more columns than are allowed, however the subdomains are grouped.
        """
        with self._comm.events.timed("coarse"):
            self._corrections = corrections
            self._state = CoarseState(self.parts, corrections, gradient, self.last_step, self.last_correction)
            if not self._has_model:
                return
            if self._groups is None:
                self._groups = self._group(self._state)
            self._state = _grouped(self._state, self._groups)
            self._columns = self._make_columns(self._state)
            products = torch.cat([inner_products(self._columns), self._slope(gradient)[None]])
            try:
                self.model = self.curvature.form(batch, self._columns, products)
            except SharedInvalidInput as error:
                if self.is_asked:
                    raise
                self._has_model = False
                self._comm.events.notes.add(f"coarse.model auto: corrections are summed up from now on ({error})")

    def _group(self, state: CoarseState) -> Groups:
        """How the subdomains are grouped, in all iterations. Collective."""
        subdomains, asked = len(state.corrections), self._options.largest

        def columns(groups: int) -> int:
            return len(self._make_columns(_grouped(state, Groups(groups, 0))))

        with preserved_random_state(self.step.device):  # a space of the user's may draw
            groups = most_groups(asked or USUAL_LARGEST, subdomains, self.curvature.total, columns)
        if asked is not None and groups.columns > asked:
            raise SharedInvalidInput(
                f"coarse.largest: {asked} is too few, as one group of subdomains a stage gives {groups.columns} "
                f"columns; give {groups.columns} or more"
            )
        return groups

    def _make_columns(self, state: CoarseState) -> Sequence[Column]:
        if self._options.space == SUBDOMAINS:
            return self._space.columns(state)
        # One of the user's may fail on one rank alone, for which the others would wait.
        with self._comm.shared_errors():
            columns = self._space.columns(state)
            check_columns(columns, len(self.step), self._options.space)
        return columns

    def _slope(self, gradient: torch.Tensor) -> torch.Tensor:
        """Inner products of the gradient with the columns, shape (m,), float64."""
        return torch.stack([torch.dot(gradient[c.start : c.stop], c.values) for c in self._columns]).double()

    def recombine(self, state: State) -> float | None:
        """Put the best step within the ball into `step` and return its predicted reduction. Collective.

        Without a model, or one that is finite, the step is the plain sum of the corrections, and the reduction None.
        Where the function is known to stay, ``state.same`` says how the model is damped.
        """
        radius, same = state.present_radius, state.same
        with self._comm.events.timed("coarse"):
            if not self._has_model:
                self._sum_up(radius)
                return None
            damping = self._options.damping
            damping = same.damped(damping) if same.stays else damping * self.raised
            told = self._tell(lambda: self._minimise(radius, damping))
            self._combine(told)
            # The ball of the maximum norm is not one in the span, and rounding may lead out of that of the 2-norm.
            # Where rank 0 has all columns, it alone waits for its device to say how long the step is.
            length = self._inner.norm(self.step) if told else 0.0
            *coefficients, predicted = self._comm.decide(lambda: self._cut(length, radius))
            if math.isnan(predicted):
                self._comm.events.notes.add(
                    "coarse.model: the curvature between the corrections is not finite (a root of 0 in the network or "
                    "the loss?); they are summed up in such an iteration"
                )
                self._sum_up(radius)
                return None
            self._combine(coefficients)
        return predicted

    def _sum_up(self, radius: float) -> None:
        """Put the sum of the corrections, cut to the ball, into `step`: of subdomains of data their mean."""
        self.step.zero_()
        for column in self._corrections:
            alike = sum((other.start, other.stop) == (column.start, column.stop) for other in self._corrections)
            self.step[column.start : column.stop].add_(column.values, alpha=1.0 / alike)
        self._inner.clip(self.step, radius)

    def _tell(self, decide: Callable[[], Sequence[float]]) -> Sequence[float]:
        """What rank 0 decides, on all ranks that have to combine it for the step to be measured; empty elsewhere."""
        if self._inner.spread:
            return self._comm.decide(decide)
        return decide() if self._comm.rank == 0 else ()

    def _minimise(self, radius: float, damping: float) -> Sequence[float]:
        """Coefficients of all columns within the Euclidean ball around the ball; on rank 0."""
        model = self.model
        assert model is not None  # on rank 0
        self._coefficients = np.zeros(len(model.slope))
        if model.is_finite:
            reach = euclidean_radius(radius, self._size, self._inner.kind)
            self._coefficients = model.minimise(reach, damping, self._norm)
        return self._coefficients.tolist()

    def _cut(self, length: float, radius: float) -> Sequence[float]:
        """The coefficients of a step of ``length``, cut to the ball, and the predicted reduction; on rank 0."""
        model = self.model
        assert model is not None  # on rank 0
        coefficients = self._coefficients * (min(1.0, radius / length) if length > 0.0 else 1.0)
        return [*coefficients, model.reduction(coefficients) if model.is_finite else math.nan]

    def _combine(self, coefficients: Sequence[float]) -> None:
        """Put the combination of the columns into `step`: zero without coefficients."""
        self.step.zero_()
        for coefficient, column in zip(coefficients[self.curvature.own], self._columns, strict=False):
            self.step[column.start : column.stop].add_(column.values, alpha=coefficient)

    def follow(self, judged: Judged, poor: bool) -> None:
        """Take note of how the step was judged."""
        accepted = judged.accepted
        if poor:
            self.raised = min(RAISE * self.raised, LARGEST)
        elif accepted:
            self.raised = max(1.0, LOWER * self.raised)
        if accepted:
            assert self._state is not None  # a step is made of columns
            self._space.follow(self._state, self.step)
            self.last_step.copy_(self.step)
            if self.last_correction.numel():
                self.last_correction.zero_()
                for column in self._corrections:
                    self.last_correction[column.start : column.stop] += column.values

    def state(self) -> dict[str, Any]:
        """What lasts from one iteration to the next, by name: numbers and tensors of shape (n,)."""
        kept = {"last_step": self.last_step, "last_correction": self.last_correction, "raised": self.raised}
        own = self._space.state()
        return kept | ({"space": {"name": self._options.space, "state": own}} if own else {})

    def saved(self, vector: Check, vector_or_empty: Check) -> Check:
        """See ``apts_mpi.state.solver.Part``."""
        return saved_coarse_state(vector, vector_or_empty)

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Take over what `state` has returned; return what is of no use here, one sentence each."""
        self.last_step.copy_(state["last_step"])
        # Only where both or neither keep it.
        if len(state["last_correction"]) == len(self.last_correction):
            self.last_correction.copy_(state["last_correction"])
        self.raised = min(state["raised"], LARGEST)
        space = state.get("space")
        if space is None:
            return []
        if space["name"] != self._options.space:
            return [f"the state of coarse space {shortened(space['name'])} is of no use to another"]
        self._space.restore(space["state"])
        return []


def _grouped(state: CoarseState, groups: Groups) -> CoarseState:
    corrections, parts = groups.of(state.corrections, state.parts)
    return replace(state, corrections=corrections, parts=parts)


def make_coarse_level(
    options: APTSOptions,
    decomposition: Decomposition,
    like: torch.Tensor,
    comm: Communicator,
    make_curvature: Callable[[], ReducedCurvature],
    inner: InnerProducts,
    size: int,
    is_asked: bool,
) -> CoarseLevel | None:
    """The coarse level of the options; see `CoarseLevel`."""
    if options.coarse.model == "none":
        return None
    level = CoarseLevel(
        options.coarse,
        parts=decomposition.owned_parts(),
        like=like,
        comm=comm,
        curvature=make_curvature(),
        inner=inner,
        size=size,
    )
    level.is_asked = is_asked
    return level
