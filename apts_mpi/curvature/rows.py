"""Rows of the Gauss-Newton matrix of a rank's subdomains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from apts_mpi.curvature.dense import BlockJacobian
from apts_mpi.curvature.loss_curvature import AtOutputs, read_outputs, side_by_side
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Cache
from apts_mpi.tools.events import FORWARD
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
        start, stop = min(c.subdomain.start for c in caches), max(c.subdomain.stop for c in caches)
        self.owned = {(c.subdomain.owned_start, c.subdomain.owned_stop) for c in caches}
        self._touched = objective.vector.touching(start, stop)
        self._start = objective.vector.entries[self._touched][0].start
        self._rows: torch.Tensor | None = None
        self._at_outputs: AtOutputs | None = None

    def of(self, start: int, stop: int) -> torch.Tensor:
        """R with ``R^T R`` the matrix of a range of the flat vector, shape (samples * outputs, stop - start)."""
        if self._rows is None:
            self._rows = self._compute()
        return self._rows[:, start - self._start : stop - self._start]

    def residuals(self) -> tuple[torch.Tensor, bool]:
        """The y with ``R^T y`` the gradient of the mean loss, shape (rows,), and whether there is such a y.

        Where there is none, as the loss is linear in an output, that of the nearest; zero where the loss is on another
        rank.
        """
        if self._rows is None:
            self._rows = self._compute()
        if self._at_outputs is None:
            return self._rows.new_zeros(len(self._rows)), True
        return self._at_outputs.residuals.flatten(), self._at_outputs.is_complete

    def moved(self) -> torch.Tensor:
        """By how much the outputs are others at the present parameters, in the metric of the loss, shape (rows,)."""
        assert self._at_outputs is not None  # there are rows, and the loss is on this rank
        known, cache = self._at_outputs, self._cache
        with torch.no_grad(), self._objective.replayed(cache.random_state):
            outputs = cache.inputs
            for segment in self._segments():
                outputs = self._objective.segmented.run(segment, outputs)
        share = self._objective.segmented.share(cache.subdomain.first_segment, len(self._objective.segmented) - 1)
        self._objective.events.count_work(cache.samples, share, FORWARD)
        if not known.places:
            return torch.zeros_like(known.values).flatten()
        return (known.roots @ (side_by_side(outputs, known.places) - known.values)[:, :, None]).flatten()

    def count(self) -> int:
        """Number of rows, without computing them."""
        if self._rows is not None:
            return len(self._rows)
        with torch.no_grad(), self._objective.replayed(self._cache.random_state):
            # Two, as a loss may use squeeze().
            inputs, targets = (take(samples, slice(2)) for samples in (self._cache.inputs, self._cache.targets))
            outputs = nn.Sequential(*self._segments())(inputs)
            places = read_outputs(self._objective.loss, outputs, targets)
        of_sample = side_by_side(outputs, places).shape[1] if places else 1
        return self._cache.samples * of_sample

    def _compute(self) -> torch.Tensor:
        objective, cache = self._objective, self._cache
        segments, first = objective.segmented, cache.subdomain.first_segment
        parameters = objective.vector.parameters[self._touched]
        jacobian = BlockJacobian(self._segments(), parameters, objective.loss)
        with objective.replayed(cache.random_state):
            rows = jacobian.rows(cache.inputs, cache.targets)
        self._at_outputs = jacobian.at_outputs
        self._objective.events.count_work(cache.samples, segments.share(first, len(segments) - 1), jacobian.cost)
        return rows

    def _segments(self) -> Sequence[nn.Module]:
        return self._objective.segmented.segments[self._cache.subdomain.first_segment :]
