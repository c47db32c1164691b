"""The local solver K-FAC: the natural gradient by Kronecker factors of each layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from apts_mpi.curvature.layer import Curvature, LayerBatch
from apts_mpi.curvature.signed import DRAWS, SignedFactors, signed_factors
from apts_mpi.local.objective import LocalObjective
from apts_mpi.local.solver import LayerState, LocalState
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.options import LocalOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror
from apts_mpi.trust_region.subproblem import NormKind, clip_to_ball


class KFAC:
    """Steps along the natural gradient by Kronecker-factored curvature of each layer, clipped to the ball.

    Costs no evaluation and no communication: it uses the inputs and output gradients recorded while the global
    gradient was evaluated. Only layers of unknown kind need a few gradients of the local objective an update. See
    `apts_mpi.curvature.kinds`.

    Parameters
    ----------
    options
        Damping, decay of the running means, iterations between factorisations.
    layers
        The subdomain's layers: their curvature, module and range within the block.
    team
        The ranks that share the subdomain's samples.

    Attributes
    ----------
    statistics : list of list of Tensor
        Running means of each layer.
    count, updates : int
        Iterations, and those whose statistics were taken in.
    """

    def __init__(
        self,
        options: LocalOptions,
        layers: Sequence[tuple[Curvature, torch.nn.Module, slice]],
        team: Communicator,
    ) -> None:
        assert options.damping is not None  # composed
        self._damping = options.damping
        self._options = options
        self._layers = layers
        self._team = team
        self.statistics: list[list[torch.Tensor]] = []
        self.count = self.updates = 0

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `apts_mpi.local.gradient.LocalSolver`."""
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
        """Minus the inverse curvature of the block times a gradient, both of shape (stop - start,)."""
        return torch.cat([curvature.direction(gradient[part]) for curvature, _, part in self._layers])

    def state(self) -> LocalState:
        """See `apts_mpi.local.gradient.LocalSolver`; the factors follow from the running means."""
        layers = [
            LayerState(type(curvature).__name__, means)
            for (curvature, _, _), means in zip(self._layers, self.statistics, strict=False)
        ]
        return LocalState(numbers={"count": self.count, "updates": self.updates}, layers=layers)

    def restore(self, state: LocalState) -> None:
        """See `apts_mpi.local.gradient.LocalSolver`."""
        self.count, self.updates = state.numbers["count"], state.numbers["updates"]
        self.statistics = [layer.tensors for layer in state.layers]
        if state.layers:
            unseen = [layer.kind == SignedFactors.__name__ for layer in state.layers]
            self._layers = [
                (signed_factors(module, part.stop - part.start) if replaced else curvature, module, part)
                for (curvature, module, part), replaced in zip(self._layers, unseen, strict=True)
            ]
        for means, (curvature, _, _) in zip(self.statistics, self._layers, strict=False):
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
            for curvature, module, part in self._layers
        ]
        self._sum_over_team(fresh)
        self.updates += 1
        keep = min(1.0 - 1.0 / self.updates, self._options.decay)
        if not self.statistics:
            self.statistics = fresh
        for means, statistics, (curvature, _, _) in zip(self.statistics, fresh, self._layers, strict=True):
            for mean, statistic in zip(means, statistics, strict=True):
                mean.lerp_(statistic, 1.0 - keep)
            curvature.refresh(means, self._damping)

    def _signed_gradients(self, local: LocalObjective) -> list[torch.Tensor]:
        """What layers of unknown kind are measured by; empty without such. Collective over the team."""
        if not any(isinstance(curvature, SignedFactors) for curvature, _, _ in self._layers):
            return []
        return local.signed_gradients(DRAWS, key=self.updates)

    def _replace_unseen(self, records: Sequence[LayerRecord]) -> None:
        """A layer whose weights are used without calling it has nothing to measure but its gradients.

        Collective over the team, of which one rank's samples may not reach what those of another do.
        """
        called = {id(record.module) for record in records if record.gradient is not None}
        seen = [[id(module) in called for _, module, _ in self._layers]]
        if self._team.size > 1:
            seen = self._team.collect(seen[0])
        self._layers = [
            (curvature if any(reached) else signed_factors(module, part.stop - part.start), module, part)
            for reached, (curvature, module, part) in zip(zip(*seen, strict=True), self._layers, strict=True)
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
