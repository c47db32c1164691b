"""Which samples make the batches of an epoch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.tools.environment import kept_draws, seed_draws


class Order(Protocol):
    """The batches of each epoch, by the numbers of their samples.

    Attributes
    ----------
    drawn : bool
        Whether they are drawn by what belongs to the user: once, by one rank for all.
    sized : bool
        Whether it says itself how many samples are in a batch.
    """

    drawn: bool
    sized: bool

    def count(self, samples: int, size: int) -> int:
        """Batches an epoch, of so many samples; samples that do not fill one are left out."""

    def batches(self, samples: int, size: int, seed: int, epoch: int) -> list[torch.Tensor]:
        """Numbers of the samples of each batch; equal arguments give equal batches."""


class Shuffled:
    """All samples in an order that is drawn anew each epoch; ``group`` of them in a row stay together."""

    drawn = sized = False

    def __init__(self, group: int = 1) -> None:
        self._group = group

    def count(self, samples: int, size: int) -> int:
        """See `Order`."""
        return samples // size

    def batches(self, samples: int, size: int, seed: int, epoch: int) -> list[torch.Tensor]:
        """See `Order`."""
        size_of_group = self._group
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(samples // size_of_group, generator=generator)
        if size_of_group > 1:
            order = (order[:, None] * size_of_group + torch.arange(size_of_group)).flatten()
        return list(order[: samples - samples % size].split(size))


class InOrder:
    """All samples in the order of their numbers."""

    drawn = sized = False

    def count(self, samples: int, size: int) -> int:
        """See `Order`."""
        return samples // size

    def batches(self, samples: int, size: int, seed: int, epoch: int) -> list[torch.Tensor]:
        """See `Order`."""
        return list(torch.arange(samples - samples % size).split(size))


class InShards:
    """Of each shard the next samples, in proportion to its length, so that all end together.

    In a batch the samples of a shard stand together: ranks that share it read few shards each.

    Parameters
    ----------
    lengths : sequence of int
        Samples of each shard; they are numbered shard after shard.
    """

    drawn = sized = False

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths

    def count(self, samples: int, size: int) -> int:
        """See `Order`."""
        return samples // size

    def batches(self, samples: int, size: int, seed: int, epoch: int) -> list[torch.Tensor]:
        """See `Order`."""
        # How much of its shard is read with each sample.
        read = [(torch.arange(length, dtype=torch.float64) + 0.5) / length for length in self._lengths]
        order = torch.argsort(torch.cat(read), stable=True)
        order = order[order < samples]
        return [rows.sort().values for rows in order[: samples - samples % size].split(size)]


class Sampled:
    """The samples that a sampler of torch's, or of the user's, draws; the random numbers depend on seed and epoch.

    Parameters
    ----------
    sampler : iterable of int
        With a length, the samples of an epoch.
    """

    drawn, sized = True, False

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def count(self, samples: int, size: int) -> int:
        """See `Order`."""
        return len(self._sampler) // size

    def batches(self, samples: int, size: int, seed: int, epoch: int) -> list[torch.Tensor]:
        """See `Order`."""
        order = _numbers(_drawn(self._sampler, seed, epoch), samples)
        count = self.count(samples, size)
        if len(order) < count * size:
            raise InvalidInput(f"sampler: it gave {len(order)} samples, and its length is {len(self._sampler)}")
        return list(order[: count * size].split(size))


class SampledBatches:
    """The batches that a batch sampler of the user's draws, of any sizes; see `Sampled`."""

    drawn = sized = True

    def __init__(self, batch_sampler: Any) -> None:
        self._sampler = batch_sampler

    def count(self, samples: int, size: int) -> int:
        """See `Order`."""
        return len(self._sampler)

    def batches(self, samples: int, size: int, seed: int, epoch: int) -> list[torch.Tensor]:
        """See `Order`."""
        found = [_numbers(batch, samples) for batch in _drawn(self._sampler, seed, epoch)]
        if len(found) < len(self._sampler):
            raise InvalidInput(
                f"batch_sampler: it gave {len(found)} batches in epoch {epoch}, and its length is "
                f"{len(self._sampler)}; give as many in each epoch"
            )
        return found[: len(self._sampler)]


def _drawn(sampler: Any, seed: int, epoch: int) -> list[Any]:
    """What a sampler gives in an epoch; random states are left as they were."""
    nested = [sampler, getattr(sampler, "sampler", None)]
    generators = [g for g in (getattr(each, "generator", None) for each in nested) if isinstance(g, torch.Generator)]
    for each in nested:
        if callable(getattr(each, "set_epoch", None)):
            each.set_epoch(epoch)
    with kept_draws():
        seed_draws(seed, epoch)
        for generator in generators:
            generator.manual_seed(seed * 1_000_003 + epoch)
        return list(sampler)


def _numbers(drawn: Sequence[Any] | Iterable[Any], samples: int) -> torch.Tensor:
    numbers = torch.tensor([int(number) for number in drawn], dtype=torch.int64)
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < samples:
        raise InvalidInput(
            f"sampler: it gave sample {int(numbers.max() if numbers.min() >= 0 else numbers.min())}, and there are "
            f"{samples}, numbered from 0"
        )
    return numbers
