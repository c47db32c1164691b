"""Rows of the Gauss-Newton matrix of a rank's subdomains."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from apts_mpi.curvature.dense import BlockJacobian
from apts_mpi.curvature.loss_curvature import AtOutputs, joined, read_outputs, side_by_side
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
        self._parts = self._cache.micro_batches or [self._cache]
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
        known = self._at_outputs
        values = [self._values_of_part(part, known.places) for part in self._parts]
        if not known.places:
            return torch.zeros_like(known.values).flatten()
        return (known.roots @ (torch.cat(values) - known.values)[:, :, None]).flatten()

    def _values_of_part(self, part: Cache, places: Sequence[int]) -> torch.Tensor:
        """The outputs that the loss reads, at the present parameters, shape (samples, o)."""
        segmented = self._objective.segmented
        with torch.no_grad(), self._objective.replayed(part.random_state):
            outputs = part.inputs
            for segment in self._segments(part):
                outputs = segmented.run(segment, outputs)
        share = segmented.share(part.subdomain.first_segment, len(segmented) - 1)
        self._objective.events.count_work(part.samples, share, FORWARD)
        # A network that differentiates itself may have switched gradients on.
        return side_by_side(outputs, places).detach() if places else self.of(0, 0)[:0]

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
            rows, self._at_outputs = self._of_part(self._parts[0])
            return rows
        # Rows of a mean over all samples, of which those are a share.
        found = [self._of_part(part) for part in self._parts]
        shares = [part.share for part in self._parts]
        self._at_outputs = joined([known for _, known in found], shares)
        return torch.cat([rows.mul_(share**0.5) for (rows, _), share in zip(found, shares, strict=True)])

    def _of_part(self, part: Cache) -> tuple[torch.Tensor, AtOutputs]:
        """Rows of the mean over the samples of a part, and the loss around its outputs."""
        objective, segments = self._objective, self._objective.segmented
        parameters = objective.vector.parameters[self._touched]
        jacobian = BlockJacobian(self._segments(part), parameters, objective.loss)
        with objective.replayed(part.random_state):
            rows = jacobian.rows(part.inputs, part.targets, part.returned)
        share = segments.share(part.subdomain.first_segment, len(segments) - 1)
        objective.events.count_work(part.samples, share, jacobian.cost)
        return rows, jacobian.at_outputs

    def _segments(self, part: Cache) -> Sequence[nn.Module]:
        return self._objective.segmented.segments[part.subdomain.first_segment :]
