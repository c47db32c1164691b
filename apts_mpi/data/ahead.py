"""The parts of batches that a rank needs, asked for before they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from apts_mpi.data.half import Index, Samples, check_samples
from apts_mpi.data.source import Epoch, Pair, Source

# A range of the samples of a batch.
Range = tuple[int, int]


class Ahead:
    """The batches of an epoch, of which the same ranges are needed as of the batch before: these are read ahead.

    Parameters
    ----------
    samples
        All samples.
    """

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self._epoch, self._batches = Epoch(0, 0), list[torch.Tensor]()
        self._number = -1
        # Ranges of the present batch that were asked for, and those of the last one.
        self._seen: list[Range] = []
        self._coming: list[tuple[int, Range]] = []
        self._results: Iterator[Pair] | None = None

    @property
    def source(self) -> Source:
        """What is read."""
        return self._samples.source

    def begin(self, epoch: Epoch, batches: Sequence[torch.Tensor]) -> None:
        """From now on there are these batches."""
        self._epoch, self._batches = epoch, [self._samples.numbers(rows) for rows in batches]
        self._number, self._coming, self._results = -1, [], None

    def batch(self, number: int) -> Samples:
        """One of them; asked for again, nothing changes."""
        return _Part(self, number, self._samples, self._batches[number], self._epoch)

    def read(self, number: int, wanted: Range) -> Pair | None:
        """A range of a batch if it was read ahead."""
        if number != self._number:
            if self._results is None and self._seen:
                self._start(number)
            self._number, self._seen = number, []
        self._seen.append(wanted)
        if self._results is None:
            return None
        if self._coming and self._coming[0] == (number, wanted):
            del self._coming[0]
            return next(self._results)
        # Another range than before: what was read ahead is of no use.
        self._coming, self._results = [], None
        return None

    def _start(self, first: int) -> None:
        ranges = self._seen
        self._coming = [(number, place) for number in range(first, len(self._batches)) for place in ranges]
        requests = [(self._batches[number][start:stop], self._epoch) for number, (start, stop) in self._coming]
        self._results = self._samples.source.ahead(requests)


class _Part(Samples):
    """A batch, of which ranges may have been read ahead."""

    def __init__(self, ahead: Ahead, number: int, samples: Samples, rows: torch.Tensor, epoch: Epoch) -> None:
        super().__init__(samples.source, samples.form, rows, epoch, samples.first_pair)
        self._ahead, self._number = ahead, number

    def _read(self, index: Index, places: torch.Tensor) -> Pair:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            pair = self._ahead.read(self._number, (start, stop))
            if pair is not None:
                check_samples(pair, self.numbers(places))
                return pair
        return super()._read(index, places)
