"""Rows of the Gauss-Newton matrix of a rank's subdomains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from apts_mpi.curvature.dense import BlockJacobian
from apts_mpi.curvature.loss_curvature import read_outputs, side_by_side
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Cache
from apts_mpi.tools.trees import take


class GaussNewtonRows:
    """Rows of the Gauss-Newton matrix on the samples of one pass, for the neighbouring subdomains of a rank.

    They are computed when first asked for, at the parameters of that moment, for all subdomains at once, which costs
    little more than for one: each needs the same passes through the network.

    Parameters
    ----------
    objective
        The global objective.
    caches
        Of the subdomains, on the same samples.

    Attributes
    ----------
    owned : set of (int, int)
        Ranges of the flat vector that the subdomains own.
    """

    def __init__(self, objective: Objective, caches: Sequence[Cache]) -> None:
        self._objective = objective
        self._cache = min(caches, key=lambda cache: cache.subdomain.first_segment)
        self._parts = self._cache.micro_batches or [self._cache]
        start, stop = min(c.subdomain.start for c in caches), max(c.subdomain.stop for c in caches)
        self.owned = {(c.subdomain.owned_start, c.subdomain.owned_stop) for c in caches}
        self._touched = objective.vector.touching(start, stop)
        self._start = objective.vector.entries[self._touched][0].start
        self._rows: torch.Tensor | None = None

    def of(self, start: int, stop: int) -> torch.Tensor:
        """R with ``R^T R`` the matrix of a range of the flat vector, shape (samples * outputs, stop - start)."""
        if self._rows is None:
            self._rows = self._compute()
        return self._rows[:, start - self._start : stop - self._start]

    def count(self) -> int:
        """Number of rows, without computing them."""
        if self._rows is not None:
            return len(self._rows)
        part = self._parts[0]
        with torch.no_grad(), self._objective.replayed(part.random_state):
            # Two, as a loss may use squeeze().
            inputs, targets = (take(samples, slice(2)) for samples in (part.inputs, part.targets))
            outputs = nn.Sequential(*self._segments(part))(inputs)
            places = read_outputs(self._objective.loss, outputs, targets)
        of_sample = side_by_side(outputs, places).shape[1] if places else 1
        return self._cache.samples * of_sample

    def _compute(self) -> torch.Tensor:
        if len(self._parts) == 1:
            return self._of_part(self._parts[0])
        # Rows of a mean over all samples, of which those are a share.
        return torch.cat([self._of_part(part).mul_(part.share**0.5) for part in self._parts])

    def _of_part(self, part: Cache) -> torch.Tensor:
        """Rows of the mean over the samples of a part."""
        objective, segments = self._objective, self._objective.segmented
        parameters = objective.vector.parameters[self._touched]
        jacobian = BlockJacobian(self._segments(part), parameters, objective.loss)
        with objective.replayed(part.random_state):
            rows = jacobian.rows(part.inputs, part.targets)
        share = segments.share(part.subdomain.first_segment, len(segments) - 1)
        objective.events.count_work(part.samples, share, jacobian.cost)
        return rows

    def _segments(self, part: Cache) -> Sequence[nn.Module]:
        return self._objective.segmented.segments[part.subdomain.first_segment :]
