"""The local solver K-FAC: the natural gradient by Kronecker factors of each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apts_mpi.curvature.layer import LayerBatch
from apts_mpi.curvature.signed import DRAWS, SignedFactors, signed_factors
from apts_mpi.local.objective import LocalObjective
from apts_mpi.local.solver import LayerState, LocalSetting, LocalSolver, LocalState, SavedState, WholeLayer
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.parallel.transport import Mirror
from apts_mpi.tools.schema import allow, whole
from apts_mpi.trust_region.norms import NormKind, clip_to_ball


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
    count, updates : int
        Iterations, and those whose statistics were taken in.
    """

    whole_layers = True
    preconditions = True
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
        self.count = self.updates = 0

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        # At first the running means move fast, and every iteration counts.
        if self.count < self._options.refresh or self.count % self._options.refresh == 0:
            self._update(local)
        self.count += 1
        start = local.block.clone()
        for gradient in local.gradients(self._options.iterations):
            local.block += self.direction(gradient)
            displacement = local.block - start
            clip_to_ball(displacement, radius, kind)
            torch.add(start, displacement, out=local.block)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """See `apts_mpi.local.LocalSolver`."""
        return torch.cat([curvature.direction(gradient[part]) for curvature, _, part in self.layers])

    def state(self) -> LocalState:
        """See `apts_mpi.local.LocalSolver`; the factors follow from the running means."""
        layers = [
            LayerState(curvature.kind, means)
            for (curvature, _, _), means in zip(self.layers, self.statistics, strict=False)
        ]
        return LocalState(numbers={"count": self.count, "updates": self.updates}, layers=layers)

    def check_saved(self, saved: SavedState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        self.check_numbers_and_vectors(saved, {"count": whole(), "updates": whole()}, lambda numbers: ())
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
        self.statistics = [layer.tensors for layer in state.layers]
        if state.layers:
            saved = [layer.kind == SignedFactors.kind for layer in state.layers]
            self.layers = [
                _signed(layer) if signed else layer for layer, signed in zip(self.layers, saved, strict=True)
            ]
        for means, (curvature, _, _) in zip(self.statistics, self.layers, strict=False):
            curvature.refresh(means, self._damping)

    def _update(self, local: LocalObjective) -> None:
        """Take in the statistics of this batch, and factorise."""
        if not self.statistics:
            self._replace_unseen(local.records)
        signed = self._signed_gradients(local)
        fresh = [
            [
                # What is not finite leads to a rejected step; it must not stay in the running means.
                statistic.mul_(local.weight).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
                for statistic in curvature.measure(
                    LayerBatch(
                        [record for record in local.records if record.module is module],
                        local.samples,
                        [gradient[part] for gradient in signed],
                        round(local.samples / local.weight),
                    )
                )
            ]
            for curvature, module, part in self.layers
        ]
        self._sum_over_team(fresh)
        self.updates += 1
        keep = min(1.0 - 1.0 / self.updates, self._options.decay)
        if not self.statistics:
            self.statistics = fresh
        for means, statistics, (curvature, _, _) in zip(self.statistics, fresh, self.layers, strict=True):
            for mean, statistic in zip(means, statistics, strict=True):
                mean.lerp_(statistic, 1.0 - keep)
            curvature.refresh(means, self._damping)

    def _signed_gradients(self, local: LocalObjective) -> list[torch.Tensor]:
        """What layers of unknown kind are measured by; empty without such. Collective over the team."""
        if not any(layer.curvature.signed for layer in self.layers):
            return []
        return local.signed_gradients(DRAWS, key=self.updates)

    def _replace_unseen(self, records: Sequence[LayerRecord]) -> None:
        """A layer whose weights are used without calling it has nothing to measure but its gradients.

        Collective over the team, of which one rank's samples may not reach what those of another do.
        """
        called = {id(record.module) for record in records if record.gradient is not None}
        seen = [[id(module) in called for _, module, _ in self.layers]]
        if self._team.size > 1:
            seen = self._team.collect(seen[0])
        self.layers = [
            layer if any(reached) else _signed(layer)
            for reached, layer in zip(zip(*seen, strict=True), self.layers, strict=True)
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


def _signed(layer: WholeLayer) -> WholeLayer:
    """The layer with the curvature of layers of unknown kind."""
    return layer._replace(curvature=signed_factors(layer.module, layer.part.stop - layer.part.start))
