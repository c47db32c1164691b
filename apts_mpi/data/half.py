"""The inputs, or the targets, of a source, which a solver cuts as if they were a tensor: what it cuts out is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from apts_mpi.data.source import Epoch, Pair, Source
from apts_mpi.errors import InvalidInput
from apts_mpi.tools.tensors import first_not_finite
from apts_mpi.tools.trees import Tree, Unread, map_tensors, tensors_of

# Of what is read at a time outside of training: bounds the memory that it takes.
PIECE_BYTES = 1 << 22

INPUTS, TARGETS = 0, 1

NO_EPOCH = Epoch(0, 0)

CPU = torch.device("cpu")

# Reads samples at places of a batch, or all of them where a range is given.
Index = slice | torch.Tensor


@dataclass(frozen=True)
class Form:
    """What samples become on the device where they are used.

    Attributes
    ----------
    dtype : torch.dtype
        Of what is a floating-point number.
    device : torch.device
    prepare : callable, optional
        Of the inputs there: bytes become numbers, say.
    """

    dtype: torch.dtype
    device: torch.device = CPU
    prepare: Callable[[Any], Any] | None = None

    def of(self, place: int, values: Any) -> Any:
        """The inputs or targets that were read; integers among targets are numbers of classes, with 64 bits."""

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            moved = tensor.to(self.device)
            if tensor.is_floating_point():
                return moved.to(self.dtype)
            is_small = tensor.dtype != torch.uint8 if place == INPUTS else True
            return moved.long() if is_small and not tensor.is_complex() and tensor.dtype != torch.bool else moved

        values = map_tensors(convert, values)
        return self.prepare(values) if place == INPUTS and self.prepare is not None else values


class Samples:
    """Samples of a source in an order, of which both halves are read at once and kept until they were given.

    Parameters
    ----------
    source
        Has the samples.
    form
        What they become.
    rows : Tensor of int64, optional
        Their numbers in this order; None: all.
    epoch
        See `Source.take`.
    first
        What is read of the first sample of the source; None: it is read now.
    """

    def __init__(
        self,
        source: Source,
        form: Form,
        rows: torch.Tensor | None = None,
        epoch: Epoch = NO_EPOCH,
        first: Pair | None = None,
    ) -> None:
        self.source, self.form, self.epoch = source, form, epoch
        self._rows = rows
        row = torch.tensor([0])
        if first is None:
            first = source.take(row, NO_EPOCH)
            check_samples(first, row)
        self.first_pair = first
        self._places: torch.Tensor | None = None
        self._kept: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self.source) if self._rows is None else len(self._rows)

    def halves(self) -> tuple[Half, Half]:
        """Inputs and targets."""
        return Half(self, INPUTS), Half(self, TARGETS)

    def numbers(self, places: torch.Tensor) -> torch.Tensor:
        """What the source numbers the samples at these places."""
        return places if self._rows is None else self._rows[places]

    def range(self, start: int, stop: int) -> Samples:
        """A range of them, of which nothing is read yet."""
        rows = self.numbers(torch.arange(start, stop))
        return Samples(self.source, self.form, rows, self.epoch, self.first_pair)

    def on(self, device: torch.device) -> Samples:
        """The same on another device."""
        form = replace(self.form, device=device)
        return Samples(self.source, form, self._rows, self.epoch, self.first_pair)

    def give(self, index: Index, place: int) -> Any:
        """Inputs or targets of some of them, on the device."""
        places = torch.arange(len(self))[index] if isinstance(index, slice) else index.to("cpu", torch.int64)
        if self._places is None or place not in self._kept or not torch.equal(places, self._places):
            self._kept = dict(enumerate(self._read(index, places)))
            self._places = places
        return self.form.of(place, self._kept.pop(place))

    def _read(self, index: Index, places: torch.Tensor) -> Pair:
        rows = self.numbers(places)
        pair = self.source.take(rows, self.epoch)
        check_samples(pair, rows)
        return pair


def check_samples(pair: Pair, rows: torch.Tensor) -> None:
    """Raise `InvalidInput` for what was read unless it is numbers of so many samples, of which none is nan or inf."""
    for what, part in zip(("inputs", "targets"), pair, strict=True):
        for tensor in tensors_of(part):
            if tensor.dim() == 0:
                continue
            if len(tensor) != len(rows):
                raise InvalidInput(
                    f"train: a batch of {len(rows)} samples has {len(tensor)} {what}; give tensors with the samples in "
                    "the first dimension"
                )
            place = first_not_finite(tensor)
            if place is not None:
                raise InvalidInput(
                    f"train: the {what} of sample {int(rows[place[0]])} have {float(tensor[place])}; remove or mend it"
                )


class Half(Unread):
    """Inputs, or targets, of samples that are read when a part of them is asked for.

    ``half[start:stop]`` and ``half[rows]``, with a tensor of numbers, are tensors (or nested tuples and dictionaries of
    some) with the samples in the first dimension; ``len(half)`` is the number of samples.
    """

    def __init__(self, samples: Samples, place: int) -> None:
        self.samples, self.place = samples, place

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, rows: Index) -> Tree:
        return self.samples.give(rows, self.place)

    def range(self, start: int, stop: int) -> Half:
        """A range of them, of which nothing is read yet."""
        return Half(self.samples.range(start, stop), self.place)

    @property
    def device(self) -> torch.device:
        """Where what is read comes to."""
        return self.samples.form.device

    @property
    def example(self) -> Tree:
        """The first sample of the source, shape (1, ...)."""
        return self.samples.form.of(self.place, self.samples.first_pair[self.place])

    def piece(self, most: int) -> int:
        """Samples to read at a time, so that they take little memory; at most so many."""
        # As numbers: bytes become some on the device.
        size = 4 * sum(tensor.numel() for tensor in tensors_of(self.example))
        return max(1, min(most, PIECE_BYTES // max(size, 1)))
