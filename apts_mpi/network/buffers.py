"""The network's buffers (running statistics) across evaluations that must not see each other's updates."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from apts_mpi.network.buffer_copies import copy_of, fits, has_moved, is_averaged
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror
from apts_mpi.tools.tensors import Packed, packed, unpacked

# The number of a module in ``network.modules()``, and the name of a buffer in it.
Place = tuple[int, str]

# Modules with the buffers that they had before a pass.
Held = list[tuple[torch.nn.Module, dict[str, torch.Tensor | None]]]


class Buffers:
    """Buffers of a network: every pass runs on copies of them; they move once, when a step is accepted.

    Copies are lazy, and only what a pass has changed, in place or by assignment, on some rank, is told to the others:
    other buffers cost nothing and stay untouched. A floating-point or complex buffer becomes the mean over all passes
    of all ranks, weighted by their samples. Integers and booleans, and buffers that take another shape or are made by
    the pass, are those of rank 0's last pass.

    Parameters
    ----------
    network
        The network.
    comm
        Its ranks.
    like
        A tensor with the dtype and device of the parameters.
    """

    def __init__(self, network: torch.nn.Module, comm: Communicator, like: torch.Tensor) -> None:
        self._comm = comm
        self._modules = list(network.modules())
        self._like = like[:0]
        # Weighted sums of changes, one after the other, by the places that a pass has moved: most passes move the same.
        self._changes: dict[tuple[Place, ...], torch.Tensor] = {}
        self._others: dict[Place, torch.Tensor | None] = {}

    @contextmanager
    def copied(self) -> Iterator[tuple[Held, dict[int, torch.Tensor]]]:
        """Let the network use copies in the block, which are given by the identity of what they are copies of.

        Saving and restoring in place would not do: a graph that is kept refers to the buffers that it saw.
        """
        held: Held = [(module, dict(module._buffers)) for module in self._modules]
        copies: dict[int, torch.Tensor] = {}
        try:
            for module, originals in held:
                for name, original in originals.items():
                    if original is not None:
                        if id(original) not in copies:
                            copies[id(original)] = copy_of(original)
                        module._buffers[name] = copies[id(original)]
            yield held, copies
        finally:
            for module, originals in held:
                for name in [name for name in module._buffers if name not in originals]:
                    del module._buffers[name]
                for name, original in originals.items():
                    module._buffers[name] = original

    def begin(self) -> None:
        """Before the passes of an evaluation."""
        self._changes, self._others = {}, {}

    @contextmanager
    def unnoted(self) -> Iterator[None]:
        """Let evaluations in the block leave what `accept` may want as it is."""
        kept = self._changes, self._others
        try:
            yield
        finally:
            self._changes, self._others = kept

    @contextmanager
    def noted(self, weight: float) -> Iterator[None]:
        """Like `copied`, for a pass with this share of all samples, whose change `accept` may want."""
        with self.copied() as (held, copies):
            yield
            with torch.no_grad():
                self._note(held, copies, weight)

    def _note(self, held: Held, copies: dict[int, torch.Tensor], weight: float) -> None:
        """Take note of what the pass that is over has changed."""
        averaged: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}
        for number, (module, before) in enumerate(held):
            for name in {**before, **module._buffers}:
                original, now = before.get(name), module._buffers.get(name)
                if not has_moved(original, None if original is None else copies[id(original)], now):
                    continue
                if original is not None and now is not None and is_averaged(original, now):
                    averaged[number, name] = original, now
                else:
                    self._others[number, name] = None if now is None else now.detach()
        if averaged:
            originals, present = zip(*averaged.values(), strict=True)
            change = self._flat(present) - _base(self._flat(originals))
            known = self._changes.get(tuple(averaged))
            if known is None:
                known = self._changes[tuple(averaged)] = torch.zeros_like(change, dtype=self._like.dtype)
            known.add_(change, alpha=weight)

    def _flat(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Their real numbers, one after the other."""
        real = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in tensors)
        return torch.cat([tensor.detach().reshape(-1).to(self._like.device) for tensor in real])

    @property
    def have_moved(self) -> bool:
        """Whether the last evaluation has changed some on this rank."""
        return bool(self._changes or self._others)

    @torch.no_grad()
    def accept(self, *also: tuple[torch.Tensor, torch.Tensor], moved_somewhere: bool = True) -> None:
        """Move the buffers by the change of the last evaluation, and copy the second of each two tensors to the first.

        All in one call, which an interrupt does not divide. Collective where one has moved on some rank.
        """
        moved, others = self._agree() if moved_somewhere else ([], {})
        pairs = self._means(moved)
        for (number, name), value in others.items():
            buffers = self._modules[number]._buffers
            present = buffers.get(name)
            if present is not None and value is not None and fits(present, value):
                pairs.append((present, value))
            else:
                buffers[name] = value
        # Of a buffer with two names the same comes twice.
        unique = {id(place): (place, value) for place, value in [*pairs, *also]}
        if unique:
            places, values = zip(*unique.values(), strict=True)
            torch._foreach_copy_(list(places), list(values))

    def _agree(self) -> tuple[list[Place], dict[Place, torch.Tensor | None]]:
        """The places whose mean is to be taken, and what others are to have: the same on all ranks. Collective."""
        moved = sorted({place for places in self._changes for place in places})
        if self._comm.size == 1:
            return moved, self._others
        places = sorted(self._others)
        values = [self._others[place] for place in places]
        told = [None if value is None else (value.shape, value.dtype, value.layout) for value in values]
        alike = zlib.crc32(repr((moved, places, told)).encode())
        highest, lowest = self._comm.largest(alike, -alike)
        if highest == -lowest:  # as nearly always
            others = {place: None if value is None else value.clone() for place, value in self._others.items()}
            if places:
                self._comm.share_tensors([value for place in places if (value := others[place]) is not None])
            return [place for place in moved if place not in others], others
        given: dict[Place, Packed] = {}
        if self._comm.rank == 0:
            given = {place: packed(value) for place, value in self._others.items()}
        found: list[Any] = self._comm.collect((moved, given))
        others = {place: unpacked(value, self._like.device) for place, value in found[0][1].items()}
        return sorted({place for places, _ in found for place in places} - set(others)), others

    def _means(self, places: Sequence[Place]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The buffers in these places, and what they become. Collective."""
        if not places:
            return []
        buffers = [self._modules[number]._buffers[name] for number, name in places]
        present = [buffer for buffer in buffers if buffer is not None]
        sizes = [buffer.numel() * (2 if buffer.is_complex() else 1) for buffer in present]
        total = self._like.new_zeros(sum(sizes))
        parts = dict(zip(places, total.split(sizes), strict=True))
        for of_pass, change in self._changes.items():
            own = [parts[place].numel() if place in parts else self._size(place) for place in of_pass]
            for place, part in zip(of_pass, change.split(own), strict=True):
                if place in parts:
                    parts[place] += part
        self._comm.sum(Mirror(total))
        means = (_base(self._flat(present)) + total).split(sizes)
        return [(buffer, _shaped(mean, buffer)) for buffer, mean in zip(present, means, strict=True)]

    def _size(self, place: Place) -> int:
        buffer = self._modules[place[0]]._buffers[place[1]]
        assert buffer is not None  # what was averaged
        return buffer.numel() * (2 if buffer.is_complex() else 1)


def _base(values: torch.Tensor) -> torch.Tensor:
    """What changes are counted from: the values, and zero where inf or nan would swallow any change."""
    return values.nan_to_num(0.0, 0.0, 0.0)


def _shaped(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of ``Buffers._flat``, of one tensor."""
    return torch.view_as_complex(values.view(*like.shape, 2)) if like.is_complex() else values.view(like.shape)
