"""The local solver K-FAC: the natural gradient by Kronecker factors of each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from apts_mpi.curvature.kinds import make_curvature
from apts_mpi.curvature.layer import LayerBatch
from apts_mpi.curvature.signed import DRAWS, SignedFactors, signed_factors
from apts_mpi.local.objective import LocalObjective
from apts_mpi.local.solver import LayerState, LocalSetting, LocalSolver, LocalState, SavedState, WholeLayer
from apts_mpi.network.partition import Layer
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.network.shared_work import Work
from apts_mpi.objective.passes import Sums
from apts_mpi.parallel.transport import Mirror
from apts_mpi.tools.schema import allow, number, whole
from apts_mpi.trust_region.norms import NormKind, clip_to_ball
from apts_mpi.trust_region.same_function import LARGEST, SMALLEST, SameFunction

# Iterations at the start that all update the running means; up to the first interval, every so many do.
OFTEN = 5

# What calls cost an iteration in each layer, whatever its size, in multiplications: a tenth of a millisecond of a core.
CALLS = 4e6


class KFAC(LocalSolver):
    """Steps along the natural gradient by Kronecker-factored curvature of each layer, clipped to the ball.

    Costs no evaluation and no communication: it uses the inputs and output gradients recorded while the global
    gradient was evaluated. Only layers of unknown kind need a few gradients of the local objective an update. See
    `apts_mpi.curvature.kinds`.

    Attributes
    ----------
    layers : list of WholeLayer
        The subdomain's.
    statistics : list of list of Tensor
        Running means of each layer.
    momentum : Tensor, shape (stop - start,)
        Running mean of the gradients; empty without momentum.
    count, updates : int
        Iterations, and those whose statistics were taken in.
    """

    whole_layers = True
    takes_sums = True
    local_data = "shared"
    preconditions = True
    averages = True
    divides_work = True
    damping = 0.3
    # The curvature of such a loss does not change along a step: on three problems, noisy data among them, squared
    # errors fell lower with it than with 0.3, and with a tenth of it those of other data rose.
    quadratic_damping = 0.003

    def __init__(self, setting: LocalSetting) -> None:
        super().__init__(setting)
        damping = setting.options.damping
        assert damping is not None  # composed
        self._damping = damping
        self._options = setting.options
        self.layers = list(setting.layers)
        self._team = setting.team
        self.statistics: list[list[torch.Tensor]] = []
        self.momentum = torch.zeros_like(setting.block[: len(setting.block) if self._options.momentum else 0])
        self.count = self.updates = 0
        self._is_measured = False
        self._relaxed = 1.0

    @classmethod
    def work(cls, layer: Layer, module: nn.Module, refresh: int) -> Work:
        """See `apts_mpi.local.LocalSolver`.

        Inverses of side s take s^3 each ``refresh`` iterations, and the products with them the parameters times s.
        """
        curvature = make_curvature(module, layer.stop - layer.start)
        sides = [shape[0] for shape in curvature.statistics if len(shape) == 2 and shape[0] == shape[1]]
        inverses = sum(side**3 for side in sides) / refresh
        return Work(layer.start, layer.stop, curvature.places, CALLS + inverses, sum(sides) + 1.0)

    @property
    def is_due(self) -> bool:
        """Whether the statistics of this iteration are wanted."""
        refresh = self._options.refresh
        assert refresh is not None  # composed
        # At first the running means move fast, and every iteration counts.
        often = min(refresh, OFTEN)
        return self.count < often or self.count % (often if self.count < refresh else refresh) == 0

    @property
    def observes(self) -> bool:
        """See `apts_mpi.local.LocalSolver`; its direction takes the gradient alone."""
        return self.is_due or self._options.iterations > 1

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        self._begin(local)
        start = local.block.clone()
        for gradient in local.gradients(self._options.iterations):
            local.block += self.direction(self._averaged(gradient))
            displacement = local.block - start
            clip_to_ball(displacement, radius, kind)
            torch.add(start, displacement, out=local.block)

    def follow(self, local: LocalObjective) -> None:
        """What `solve` leaves to the next iteration, where another rank has the direction: nothing is factorised."""
        if self.is_due:
            self.take_in(self.measure(local, self.updates), factorise=False)
        self._is_measured = False
        self.count += 1
        for gradient in local.gradients(self._options.iterations):
            self._averaged(gradient)

    def unbounded(self, local: LocalObjective) -> torch.Tensor:
        """See `apts_mpi.local.LocalSolver`; a single iteration is the direction itself."""
        if self._options.iterations > 1:
            return super().unbounded(local)
        self._begin(local)
        return self.direction(self._averaged(local.gradient))

    def _begin(self, local: LocalObjective) -> None:
        """Take in statistics that are due, and count the iteration."""
        if self.is_due and not self._is_measured:
            self.take_in(self.measure(local, self.updates))
        if self.statistics and self._options.relax and self.same.damping != self._relaxed:
            self._factorise()
        self._is_measured = False
        self.count += 1

    def _averaged(self, gradient: torch.Tensor) -> torch.Tensor:
        """The running mean of the gradients up to this one, without the zeros from which it starts."""
        share = self._options.momentum
        if not share:
            return gradient
        # A gradient that is not finite leads to a rejected step; it must not stay in the mean.
        self.momentum.lerp_(gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), 1.0 - share)
        return self.momentum / (1.0 - share**self.count)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `apts_mpi.local.LocalSolver`; of ``own_part``."""
        parts = [
            curvature.direction(gradient[part])
            if inside == slice(0, part.stop - part.start)
            else curvature.part(gradient[part], inside.start, inside.stop)
            for (curvature, _, part), inside in zip(self.layers, self._inside(), strict=True)
            if inside is not None
        ]
        return torch.cat(parts) if parts else gradient[:0]

    def _inside(self) -> list[slice | None]:
        """Of each layer the part, counted from its first element, that lies in ``own_part``."""
        found: list[slice | None] = []
        own = self.own_part or slice(0, len(self.setting.block))
        for _, _, part in self.layers:
            start, stop = max(part.start, own.start), min(part.stop, own.stop)
            found.append(slice(start - part.start, stop - part.start) if start < stop else None)
        return found

    def state(self) -> LocalState:
        """See `apts_mpi.local.LocalSolver`; the factors follow from the running means."""
        layers = [
            LayerState(curvature.kind, means)
            for (curvature, _, _), means in zip(self.layers, self.statistics, strict=False)
        ]
        vectors = {"momentum": self.momentum} if len(self.momentum) else {}
        numbers: dict[str, float] = {"count": self.count, "updates": self.updates}
        if self._relaxed != 1.0:
            numbers["relaxed"] = self._relaxed
        return LocalState(numbers=numbers, vectors=vectors, layers=layers)

    def check_saved(self, saved: SavedState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        # A run may go on with momentum, or without.
        vectors = ("momentum",) if "momentum" in saved.vectors else ()
        numbers = {"count": whole(), "updates": whole()}
        if "relaxed" in saved.numbers:
            numbers["relaxed"] = number(SMALLEST, LARGEST)
        self.check_numbers_and_vectors(saved, numbers, lambda numbers: vectors)
        if not saved.layers:
            return
        place = f"{saved.place}.layers"
        allow(len(saved.layers) == len(self.layers), place, len(saved.layers), f"as many as here, {len(self.layers)}")
        for (kind, tensors), layer in zip(saved.layers, self.layers, strict=True):
            allow(kind in (layer.curvature.kind, SignedFactors.kind), place, kind, layer.curvature.kind)
            curvature = layer.curvature if kind == layer.curvature.kind else _signed(layer).curvature
            shapes = [tensor.shape for tensor in tensors]
            allow(shapes == curvature.statistics, place, shapes, f"of shapes {curvature.statistics}")
            for tensor in tensors:
                self.check_tensor(tensor, place)

    def restore(self, state: LocalState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        self.count, self.updates = state.numbers["count"], state.numbers["updates"]
        if len(self.momentum) and "momentum" in state.vectors:
            self.momentum.copy_(state.vectors["momentum"])
        self.statistics = [layer.tensors for layer in state.layers]
        if state.layers:
            saved = [layer.kind == SignedFactors.kind for layer in state.layers]
            self.layers = [
                _signed(layer) if signed else layer for layer, signed in zip(self.layers, saved, strict=True)
            ]
        self.same = SameFunction(damping=state.numbers.get("relaxed", 1.0))
        self._factorise()

    def measure(self, local: LocalObjective, key: int) -> list[list[torch.Tensor]]:
        """Statistics of each layer on the samples of all who measure together. Collective over them.

        Parameters
        ----------
        local
            The subdomain's objective on the samples of this rank.
        key
            What random signs are drawn with.
        """
        seen = local.sums or [record.module for record in local.records if record.gradient is not None]
        self._replace_unseen({id(module) for module in seen})
        signed = local.signed_gradients(DRAWS, key) if any(layer.curvature.signed for layer in self.layers) else []
        fresh = [
            [
                # What is not finite leads to a rejected step; it must not stay in the running means.
                statistic.mul_(local.weight).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                for statistic in _measured(layer, local, signed)
            ]
            for layer in self.layers
        ]
        self._sum_over_team(fresh)
        return fresh

    def sums(self, records: Sequence[LayerRecord], samples: int, part: tuple[int, int]) -> Sums:
        """See `apts_mpi.local.LocalSolver`; of the layers that the loss depends on."""
        found: Sums = {}
        for curvature, module, _ in self.layers:
            batch = LayerBatch([record for record in records if record.module is module], samples, part=part)
            if batch.reached:
                found[module] = [] if curvature.signed else curvature.sums(batch)
        return found

    def take_in(self, fresh: list[list[torch.Tensor]], factorise: bool = True) -> None:
        """Move the running means by what `measure` returned, and factorise."""
        self._is_measured = True
        self.updates += 1
        keep = min(1.0 - 1.0 / self.updates, self._options.decay)
        if not self.statistics:
            self.statistics = fresh
        for means, statistics in zip(self.statistics, fresh, strict=True):
            for mean, statistic in zip(means, statistics, strict=True):
                mean.lerp_(statistic, 1.0 - keep)
        if factorise:
            self._factorise()

    def _factorise(self) -> None:
        """Invert the running means, damped as the function at hand wants it."""
        self._relaxed = self.same.damping if self._options.relax else 1.0
        for means, (curvature, _, _), inside in zip(self.statistics, self.layers, self._inside(), strict=False):
            if inside is not None:
                curvature.refresh(means, self.same.damped(self._damping) if self._options.relax else self._damping)

    def _replace_unseen(self, called: set[int]) -> None:
        """A layer whose weights are used without calling it has nothing to measure but its gradients.

        Collective over the team: one rank's samples may not reach what those of another do, and what a rank has
        running means of stays as it is, also for ranks that have none. ``called`` has the identities of the modules
        that this rank's loss depends on.
        """
        has_means = bool(self.statistics)
        known = [has_means and layer.curvature.kind == SignedFactors.kind for layer in self.layers]
        reached = [id(layer.module) in called for layer in self.layers]
        told: list[int] = [has_means, *known, *reached]
        if self._team.size > 1:
            told = self._team.largest(*told)
        count = len(self.layers)
        signed = told[1 : 1 + count] if told[0] else [not is_reached for is_reached in told[1 + count :]]
        self.layers = [
            _signed(layer) if unseen and layer.curvature.kind != SignedFactors.kind else layer
            for unseen, layer in zip(signed, self.layers, strict=True)
        ]

    def _sum_over_team(self, fresh: list[list[torch.Tensor]]) -> None:
        if self._team.size == 1:
            return
        flat = [statistic for statistics in fresh for statistic in statistics]
        packed = Mirror(torch.cat([statistic.flatten() for statistic in flat]))
        self._team.sum(packed)
        start = 0
        for statistic in flat:
            statistic.copy_(packed.tensor[start : start + statistic.numel()].view(statistic.shape))
            start += statistic.numel()


def _measured(layer: WholeLayer, local: LocalObjective, signed: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Statistics of a layer on this rank's samples; ``signed`` has gradients with random signs."""
    curvature, module, part = layer
    if local.sums is None or curvature.signed:
        return curvature.measure(
            LayerBatch(
                [record for record in local.records if record.module is module],
                local.samples,
                [gradient[part] for gradient in signed],
                round(local.samples / local.weight),
            )
        )
    nothing = curvature.sums(LayerBatch([], local.samples))
    return curvature.means(local.sums.get(module, nothing), local.samples)


def _signed(layer: WholeLayer) -> WholeLayer:
    """The layer with the curvature of layers of unknown kind."""
    return layer._replace(curvature=signed_factors(layer.module, layer.part.stop - layer.part.start))
