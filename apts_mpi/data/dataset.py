"""Samples of data sets of torch's, and the processes that read them ahead."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import default_collate

from apts_mpi.data.source import Epoch, Pair, Position, Request
from apts_mpi.errors import InvalidInput, shown
from apts_mpi.tools.environment import kept_draws, seed_draws

# Makes a batch of a list of samples.
Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Workers:
    """Processes that read ahead, with torch's own names and meanings.

    Attributes
    ----------
    num_workers : int
    settings : dict
        Further arguments of ``torch.utils.data.DataLoader``.
    """

    num_workers: int
    settings: dict[str, Any]


class Reading:
    """What data sets by number and streams have in common: the making of batches, and workers."""

    varies = True
    parts: int | None = None

    @property
    def positions(self) -> Sequence[Position]:
        """See `apts_mpi.data.source.Source`: none are known."""
        return ()

    def go_on(self, positions: Sequence[Position]) -> None:
        """See `apts_mpi.data.source.Source`."""

    def __init__(self, collate: Collate | None, workers: Workers | None, most_workers: int | None = None) -> None:
        self._collate = collate or default_collate
        number = 0 if workers is None else workers.num_workers
        self._number = number if most_workers is None else min(number, most_workers)
        self._settings = {} if workers is None else workers.settings
        self._loader: DataLoader | None = None
        self._requests: list[Request] = []

    def __getstate__(self) -> dict[str, Any]:
        # For workers: they read, and have no workers of their own.
        return {**self.__dict__, "_loader": None, "_requests": []}

    def take(self, rows: torch.Tensor, epoch: Epoch) -> Pair:
        """See `apts_mpi.data.source.Source`."""
        with kept_draws():
            return self.collated(self.samples(rows.tolist(), epoch))

    def collated(self, samples: list[Any]) -> Pair:
        """The batch that samples make."""
        try:
            batch = self._collate(samples)
        except Exception as error:
            reason = shown(f"{type(error).__name__}: {error}")
            raise InvalidInput(
                f"train: {len(samples)} samples do not make a batch ({reason}); give a collate_fn that makes one"
            ) from error
        return as_pair(batch)

    def samples(self, rows: list[int], epoch: Epoch) -> list[Any]:
        """The samples before they make a batch. Random states move."""
        raise NotImplementedError

    def answer(self, rows: torch.Tensor, epoch: Epoch) -> Any:
        """What a process that reads ahead gives for a request."""
        return self.take(rows, epoch)

    def ahead(self, requests: Sequence[Request]) -> Iterator[Pair] | None:
        """See `apts_mpi.data.source.Source`. The processes stay for the next call."""
        if self._number == 0:
            return None
        if self._loader is None:
            # A generator of its own: torch's would move, from which the solver draws.
            self._loader = DataLoader(
                _Requested(copy.copy(self)),  # not itself: in a circle the workers would stay until it is collected
                batch_size=None,
                sampler=self._requests,
                collate_fn=_as_it_is,
                num_workers=self._number,
                persistent_workers=True,
                generator=torch.Generator(),
                **self._settings,
            )
        self._requests[:] = requests
        return self.results()

    def results(self) -> Iterator[Any]:
        """The answers, in the order of the requests."""
        results: Iterable[Any] = () if self._loader is None else self._loader
        for result in results:
            if isinstance(result, InvalidInput):
                raise result
            yield result


class _Requested(Dataset):
    """What a worker does: it reads what it is asked for; what is wrong with a sample comes back as a value."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading

    def __getitem__(self, request: Request) -> Any:
        try:
            return self._reading.answer(*request)
        except InvalidInput as error:
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


class Mapped(Reading):
    """Samples of a data set by number.

    Before each sample the generators of torch, numpy and Python are seeded by the epoch and its number, so that what is
    drawn for it depends on neither ranks nor workers.
    """

    def __init__(self, dataset: Any, collate: Collate | None = None, workers: Workers | None = None) -> None:
        super().__init__(collate, workers)
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def samples(self, rows: list[int], epoch: Epoch) -> list[Any]:
        """One after the other, each with its own random numbers."""
        found = []
        for row in rows:
            seed_draws(*epoch, row)
            try:
                found.append(self._dataset[row])
            except Exception as error:
                raise unreadable(self._dataset, row, error) from error
        return found


def as_pair(batch: Any) -> Pair:
    """Inputs and targets of a batch.

    Raises
    ------
    InvalidInput
        If it is no pair.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise InvalidInput(
            f"train: a batch of the data set is a {kind}; let its samples, or collate_fn, be a pair (inputs, targets)"
        )
    return batch[0], batch[1]


def unreadable(dataset: Any, row: int, error: Exception) -> InvalidInput:
    """The error for a sample that a data set fails to give."""
    reason = shown(f"{type(error).__name__}: {error}")
    return InvalidInput(f"train: sample {row} of {name_of(dataset)} cannot be read ({reason}); remove or mend it")


def name_of(dataset: Any) -> str:
    """What messages call a data set."""
    return type(dataset).__name__
