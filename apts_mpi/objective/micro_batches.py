"""What is kept of the micro-batches of a pass of which no more than one graph is there at a time."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from apts_mpi.network.partition import Subdomain
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.objective.passes import Cache, Pass, Summaries, Sums


@dataclass
class Gathered:
    """What micro-batches leave of themselves, put together for their pass.

    Attributes
    ----------
    whole : Pass
        The pass.
    caches : list of list of Cache
        Of each micro-batch so far, one a subdomain.
    records : list of LayerRecord
        Calls of recorded layers, where they are kept.
    sums : dict of nn.Module to list, or None
        In their place what `apts_mpi.objective.passes.Summaries` makes of them, added up.
    """

    whole: Pass
    caches: list[list[Cache]] = field(default_factory=list)
    records: list[LayerRecord] = field(default_factory=list)
    sums: Sums | None = None

    def received(
        self, piece: Pass, records: Sequence[LayerRecord], summaries: Summaries | None
    ) -> Sequence[LayerRecord]:
        """Have layers that were called once summed up as soon as they have their gradients; returns the other calls."""
        if summaries is None:
            return records
        calls = Counter(record.module for record in records)
        for record in records:
            if calls[record.module] == 1:
                record.ready = functools.partial(self._sum_up, piece, summaries)
        return [record for record in records if record.ready is None]

    def _sum_up(self, piece: Pass, summaries: Summaries, record: LayerRecord) -> None:
        self.take(piece, [record], summaries)
        record.inputs = record.gradient = None

    def take(self, piece: Pass, records: Sequence[LayerRecord], summaries: Summaries | None) -> None:
        """Keep calls on a micro-batch that have their gradients, or add what ``summaries`` makes of them."""
        for record in records:
            record.complete(self.whole.weight)
        if summaries is None:
            self.records += records
            return
        first = piece.position - self.whole.position
        total = {} if self.sums is None else self.sums
        for module, more in summaries.sums(records, self.whole, first, first + piece.samples).items():
            before = total.get(module)
            total[module] = more if before is None else [old + new for old, new in zip(before, more, strict=True)]
        self.sums = total

    def merged(self, gradients: Sequence[torch.Tensor]) -> list[Cache]:
        """The caches of the pass, one a subdomain.

        ``gradients`` has those of the pass's loss with respect to each; none where local solvers do not evaluate.
        """
        found = []
        for number, subdomain in enumerate(self.whole.subdomains):
            pieces = [caches[number] for caches in self.caches]
            cache = Cache(subdomain, None, self.whole.stream, self.whole.targets)
            cache.value = torch.stack([piece.value for piece in pieces if piece.value is not None]).sum()
            cache.gradient = gradients[number] if gradients else None
            cache.records, cache.sums = self.records, self.sums
            cache.micro_batches, cache.is_recomputed = pieces, True
            found.append(cache)
        return found


def light_cache(piece: Pass, subdomain: Subdomain) -> Cache:
    """A cache that holds no activations: the local objective runs from the samples to the true loss."""
    return Cache(replace(subdomain, first_segment=0), piece.inputs, piece.stream, piece.targets)
