"""Samples of data sets that give them one after the other, in one shard or in several."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data._utils import worker

from apts_mpi.data.dataset import Collate, Reading, Workers, name_of, unreadable
from apts_mpi.data.source import Epoch, Pair, Position, Request
from apts_mpi.errors import InvalidInput
from apts_mpi.tools.environment import kept_draws, seed_draws

# Samples that are counted at most, where a stream does not say how many it has.
MOST_COUNTED = 1_000_000


class Streamed(Reading):
    """Samples of a data set that gives them one after the other, numbered as they come, shard after shard.

    A data set with a number ``num_shards``, as HuggingFace's have, gives the samples of one shard where
    ``torch.utils.data.get_worker_info()`` says that this is one of so many workers, as torch asks of a data set with
    workers. A shard is read only where samples of it are asked for; to come to a sample the ones before it in its shard
    are read and left, but for those before a known position, where the data set has ``state_dict`` and
    ``load_state_dict`` as HuggingFace's and torchdata's have. As many processes as there are shards can read ahead,
    each of its own.

    Attributes
    ----------
    lengths : list of int
        Samples of each shard.
    """

    def __init__(self, dataset: Any, collate: Collate | None = None, workers: Workers | None = None) -> None:
        self.lengths = _shard_lengths(dataset)
        self.parts = len(self.lengths)
        self._dataset = dataset
        self._streams = [_Stream(dataset, self.lengths, shard) for shard in range(len(self.lengths))]
        self._starts = np.cumsum([0, *self.lengths])
        super().__init__(collate, workers, most_workers=len(self.lengths))
        self._places: dict[int, Position] = {}
        # Masks of what each process reads of the requests that were made.
        self._shares: list[list[torch.Tensor]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_shares": []}

    def __len__(self) -> int:
        return sum(self.lengths)

    def samples(self, rows: list[int], epoch: Epoch) -> list[Any]:
        """Each of its shard, from where that is, or from its beginning where the sample is behind."""
        found = {row: self._streams[int(self._shards(row))].come_to(row, epoch) for row in sorted(set(rows))}
        self._note(each for shard in sorted(set(self._shards(rows))) if (each := self._streams[shard].position()))
        return [found[row] for row in rows]

    def _note(self, positions: Iterable[Position]) -> None:
        self._places |= {each.shard: each for each in positions}

    @property
    def positions(self) -> list[Position]:
        """Of the shards that were read here in an epoch of the training, the last one of each."""
        return list(self._places.values())

    def go_on(self, positions: Sequence[Position]) -> None:
        """See `Source`."""
        for stream in self._streams:
            stream.known = [each for each in positions if each.shard == stream.shard]

    def _shards(self, rows: Any) -> Any:
        return np.searchsorted(self._starts, rows, side="right") - 1

    def answer(self, rows: torch.Tensor, epoch: Epoch) -> Any:
        """See `Reading`: samples alone, where a batch is made of those of several processes; and the positions."""
        self._places = {}
        if self._number <= 1:
            return super().answer(rows, epoch), self.positions
        with kept_draws():
            return self.samples(rows.tolist(), epoch), self.positions

    def ahead(self, requests: Sequence[Request]) -> Iterator[Pair] | None:
        """See `Source`."""
        if self._number <= 1:
            return None if super().ahead(requests) is None else self._noted()
        # The requests go round the processes, so that the one of a number always comes to the same process.
        shares, parts = [], []
        for rows, epoch in requests:
            process = torch.from_numpy(self._shards(rows.numpy()) % self._number)
            shares.append([process == number for number in range(self._number)])
            parts += [(rows[mask], epoch) for mask in shares[-1]]
        self._shares = shares
        super().ahead(parts)
        return self._joined()

    def _noted(self) -> Iterator[Any]:
        """What the processes have read, and note where they were then, not how far ahead they are."""
        for answer, positions in self.results():
            self._note(positions)
            yield answer

    def _joined(self) -> Iterator[Pair]:
        """Batches of what all processes have read of them."""
        answers = self._noted()
        for masks in self._shares:
            samples: list[Any] = [None] * len(masks[0])
            for mask in masks:
                for place, sample in zip(mask.nonzero()[:, 0].tolist(), next(answers), strict=True):
                    samples[place] = sample
            with kept_draws():
                yield self.collated(samples)


class _Stream:
    """One shard of a data set, which goes on from positions that are known.

    Parameters
    ----------
    dataset
        The whole.
    lengths, shard
        Samples of all shards, and the number of this one.
    """

    def __init__(self, dataset: Any, lengths: Sequence[int], shard: int) -> None:
        self._whole = self._dataset = dataset
        self._first, self._length = sum(lengths[:shard]), lengths[shard]
        self.shard, self._shards = shard, len(lengths)
        self.known: list[Position] = []
        self._tells = all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))
        self._iterator: Iterator[Any] | None = None
        self._epoch, self._next = Epoch(0, 0), 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_iterator": None}

    def come_to(self, row: int, epoch: Epoch) -> Any:
        """The sample of a number. Random states move."""
        place = row - self._first
        with as_worker(self._dataset, self.shard, self._shards):
            iterator = self._iterator
            if iterator is None or epoch != self._epoch or place < self._next:
                iterator = self._begin(place, epoch)
            while True:
                seed_draws(*epoch, self._first + self._next)
                try:
                    sample = next(iterator)
                except StopIteration as error:
                    raise self._too_short(epoch) from error
                except Exception as error:
                    raise unreadable(self._dataset, self._first + self._next, error) from error
                self._next += 1
                if self._next > place:
                    return sample

    def _begin(self, place: int, epoch: Epoch) -> Iterator[Any]:
        """At the nearest known position before a place of the shard."""
        if self._tells or self._shards > 1:
            # A copy: a data set knows where it is, and that differs between shards and from one reading to the next.
            self._dataset = copy.copy(self._whole)
        if callable(getattr(self._dataset, "set_epoch", None)):
            self._dataset.set_epoch(epoch.number)
        seed_draws(*epoch)
        self._epoch, self._next = epoch, 0
        behind = [each for each in self.known if (each.seed, each.epoch) == epoch and each.read <= place]
        if self._tells and behind:
            nearest = max(behind, key=lambda each: each.read)
            self._dataset.load_state_dict(copy.deepcopy(nearest.state))
            self._next = nearest.read
        self._iterator = iter(self._dataset)
        return self._iterator

    def position(self) -> Position | None:
        """Where the reading is, if the data set says so in what JSON has, in an epoch of the training."""
        if not self._tells or self._epoch.number == 0:
            return None
        state = self._dataset.state_dict()
        try:
            written = json.loads(json.dumps(state))
        except (TypeError, ValueError):
            return None
        return Position(self.shard, *self._epoch, self._next, written) if written == state else None

    def _too_short(self, epoch: Epoch) -> InvalidInput:
        several = self._shards > 1
        shard = f"shard {self.shard} of {self._shards} of " if several else ""
        remedy = "let shard_lengths say the samples of each shard" if several else "give as many in each epoch"
        return InvalidInput(
            f"train: {shard}{name_of(self._dataset)} ended after {self._next} samples in epoch {epoch.number}, and "
            f"{self._length} were counted or promised; {remedy}"
        )


@contextmanager
def as_worker(dataset: Any, shard: int, shards: int) -> Iterator[None]:
    """Let the data set see one worker of as many as it has shards, where these are several."""
    before = worker._worker_info
    if shards > 1:
        worker._worker_info = worker.WorkerInfo(id=shard, num_workers=shards, seed=0, dataset=dataset)
    try:
        yield
    finally:
        worker._worker_info = before


def _shard_lengths(dataset: Any) -> list[int]:
    """Samples of each shard: what the data set says, or what is counted."""
    shards = getattr(dataset, "num_shards", 1)
    shards = shards if isinstance(shards, int) and not isinstance(shards, bool) and shards > 1 else 1
    said = getattr(dataset, "shard_lengths", None)
    if shards > 1 and said is not None:
        lengths = [int(length) for length in said]
        if len(lengths) != shards or min(lengths) < 1:
            raise InvalidInput(
                f"train: {name_of(dataset)} has {shards} shards and the shard_lengths {lengths}; give the samples of "
                "each, 1 or more"
            )
    if shards > 1:
        _check_shards(dataset, shards)
    if shards > 1 and said is not None:
        return lengths
    try:
        total = len(dataset)
    except TypeError:
        return [_counted(dataset, shard, shards) for shard in range(shards)]
    # As they are where the samples go round the shards, or are cut evenly.
    return [total // shards + (shard < total % shards) for shard in range(shards)]


def _check_shards(dataset: Any, shards: int) -> None:
    """Raise `InvalidInput` for a data set that gives the same samples for each shard."""
    found = []
    for shard in (0, 1):
        with kept_draws(), as_worker(dataset, shard, shards):
            seed_draws(0, 0)
            found.append(tree_leaves(list(itertools.islice(iter(dataset), 2))))
    if len(found[0]) == len(found[1]) and all(itertools.starmap(_are_equal, zip(*found, strict=True))):
        raise InvalidInput(
            f"train: {name_of(dataset)} has {shards} shards, and gives the same samples for each; let its __iter__ "
            "give those of shard torch.utils.data.get_worker_info().id"
        )


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    return bool(np.array_equal(one, other))


def _counted(dataset: Any, shard: int, shards: int) -> int:
    count = 0
    with kept_draws(), as_worker(dataset, shard, shards):
        seed_draws(0, 0)
        for _ in dataset:
            count += 1
            if count > MOST_COUNTED:
                raise InvalidInput(
                    f"train: {name_of(dataset)} does not say how many samples it has, and has more than "
                    f"{MOST_COUNTED:,}; give it a __len__, the samples of an epoch"
                )
    return count
