"""Local trust regions with second-order models: L-SR1 and Steihaug-CG on products with the curvature.

They wait for the device. Rank 0 of a team decides for its members, which have sums over the team with other bits.
"""

from __future__ import annotations

import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.local.objective import LocalObjective
from apts_mpi.local.solver import LocalSetting, LocalSolver, LocalState, SavedState, Split
from apts_mpi.options import APTSOptions, LocalOptions
from apts_mpi.tools.schema import number, whole
from apts_mpi.trust_region.acceptance import judge
from apts_mpi.trust_region.models import LSR1, PAIRS, Model, ProductModel
from apts_mpi.trust_region.norms import NormKind, clip_to_ball, euclidean_radius, norm

# Names of the two vectors of a pair in the state.
PAIR = ("step", "change")


class LSR1TrustRegion(LocalSolver):
    """Trust region on the local objective with a limited-memory SR1 model.

    An iteration costs one gradient of the local objective.

    Attributes
    ----------
    memory : LSR1
        The pairs of all trials, rejected ones too; they last from one iteration to the next.
    """

    evaluates = True
    divisible = False

    def __init__(self, setting: LocalSetting) -> None:
        super().__init__(setting)
        self.memory = LSR1()

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        trials = _Trials(local, radius, kind, self.setting)
        for _ in range(self.setting.options.iterations):
            before = trials.gradient
            step = trials.take(self.memory)
            value, gradient = local.value_and_gradient()
            self.memory.update(step, gradient - before)
            trials.judge(value, gradient)

    def state(self) -> LocalState:
        """See `apts_mpi.local.LocalSolver`."""
        memory = self.memory
        pairs = enumerate(zip(memory.steps, memory.changes, strict=True))
        vectors = {f"{name}_{index}": vector for index, pair in pairs for name, vector in zip(PAIR, pair, strict=True)}
        return LocalState(numbers={"pairs": len(memory.steps), "gamma": memory.gamma}, vectors=vectors)

    def check_saved(self, saved: SavedState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        self.check_numbers_and_vectors(
            saved,
            {"pairs": whole(0, PAIRS), "gamma": number()},
            lambda numbers: [f"{name}_{index}" for index in range(numbers["pairs"]) for name in PAIR],
        )

    def restore(self, state: LocalState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        steps, changes = (
            [state.vectors[f"{name}_{index}"] for index in range(state.numbers["pairs"])] for name in PAIR
        )
        self.memory.restore(steps, changes, state.numbers["gamma"])


class SteihaugTrustRegion(LocalSolver):
    """Trust region on the local objective with Steihaug-CG on products with its curvature.

    An iteration costs as many products as it takes for its residual, see `apts_mpi.LocalOptions`, and one. The
    last one evaluates the objective without its gradient.
    """

    evaluates = True

    @classmethod
    def needs_exact(cls, options: LocalOptions) -> bool:
        """See `apts_mpi.local.LocalSolver`."""
        return options.product == "gauss-newton"

    @classmethod
    def check(cls, options: APTSOptions, split: Split) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        if not cls.needs_exact(options.local):
            return
        if options.layout == "staged":
            raise InvalidInput(
                "local.product: 'gauss-newton' is not for layout staged, as it needs the layers up to the loss; choose "
                "hessian"
            )
        if options.schwarz.variant == "inexact":
            raise InvalidInput(
                "local.product: 'gauss-newton' is zero with schwarz.variant inexact, whose local objectives are linear "
                "in their outputs; choose --schwarz.variant exact, or --local.product hessian"
            )

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        trials = _Trials(local, radius, kind, self.setting)
        options = self.setting.options
        limits = self.same.krylov(options.krylov_tolerance, options.krylov_products)
        for iteration in range(options.iterations):
            trials.take(ProductModel(local.products(options.product), agree=self._agree, limits=limits))
            if iteration < options.iterations - 1:
                trials.judge(*local.value_and_gradient())
            else:
                trials.judge(local.value(), trials.gradient)

    def _agree(self, stop: bool) -> bool:
        return bool(self.setting.team.decide(lambda: [stop])[0])


class _Trials:
    """Trial steps of ``local.block`` within the ball around its first values, and their judgement.

    Attributes
    ----------
    gradient : Tensor, shape (stop - start,)
        Of the local objective at the last accepted point.
    """

    def __init__(self, local: LocalObjective, radius: float, kind: NormKind, setting: LocalSetting) -> None:
        self._local = local
        self._kind = kind
        self._options = setting.trust_region
        self._team = setting.team
        self._centre = local.block.clone()
        self._radius = self._reach = radius
        local.begin()
        self._value, self.gradient = float(local.start_value), local.gradient

    def take(self, model: Model) -> torch.Tensor:
        """Move the block by the model's step in the present radius, clipped to the ball; return the step."""
        block, kind = self._local.block, self._kind
        self._before = block.clone()
        step = model.minimise(self.gradient, euclidean_radius(self._reach, len(block), kind))
        clip_to_ball(step, self._reach, kind)
        displacement = self._before - self._centre + step
        clip_to_ball(displacement, self._radius, kind)
        if self._team.size > 1:
            self._team.share_tensors([displacement])
        step = self._centre + displacement - self._before
        self._predicted = model.predict(self.gradient, step)  # products hold for the block before it moves
        self._length = float(norm(step, kind))
        torch.add(self._centre, displacement, out=block)
        return step

    def judge(self, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Accept the trial with its value and gradient, or take the block back; rank 0 of the team decides."""

        def decide() -> tuple[float, float, float]:
            trial = float(value)
            judged = judge(
                self._options,
                radius=self._reach,
                loss=self._value,
                trial_loss=trial,
                predicted_reduction=self._predicted,
                step_norm=self._length,
            )
            return judged.accepted, min(judged.next_radius, self._radius), trial

        accepted, self._reach, trial = self._team.decide(decide)
        if accepted:
            self._value, self.gradient = trial, gradient
        else:
            self._local.block.copy_(self._before)
