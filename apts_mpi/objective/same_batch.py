"""Whether all ranks are given the same batches, where each is given the whole: seen in a few samples of each."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.sameness import check_same_trees
from apts_mpi.tools.tensors import checksum
from apts_mpi.tools.trees import Tree, Unread, named_leaves

# Samples of a batch that are compared, evenly spread, and numbers up to which all of its samples are.
FEW, SMALL = 8, 1 << 12


def check_same_batch(own: Mapping[str, Tree], rows: torch.Tensor | None, comm: Communicator) -> None:
    """See that all ranks were given the same batch, as far as each was given it. Collective.

    Raises
    ------
    SharedInvalidInput
        Naming the first rank that was given another one.
    """
    remedy = "give all ranks the same, or choose batch shard and give each its own"
    check_same_trees(_held(own), rows, comm, "batch", remedy)


# The halves of a batch, and what a rank says of one that it was not given: less than any checksum or its negative.
NAMES = ("inputs", "targets")
NOTHING = -(1 << 40)


class SameBatches:
    """Compares every batch at small cost, and all of one where that shows a difference.

    Parameters
    ----------
    comm
        The ranks.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        # Ranks whose processors round otherwise have other bits in every batch.
        self._only_rounding = False

    def look(self, own: Mapping[str, Tree], rows: torch.Tensor | None) -> None:
        """See `check_same_batch`. Collective."""
        if self._comm.size == 1 or self._only_rounding:
            return
        held = _held(own)
        told: list[int] = []
        for name in NAMES:
            number = _number(held[name], name, rows) if name in held else None
            told += (NOTHING, NOTHING) if number is None else (number, -number)
        found = self._comm.largest(*told)
        if any(high != NOTHING and high != -low for high, low in zip(found[::2], found[1::2], strict=True)):
            check_same_batch(own, rows, self._comm)
            self._only_rounding = True


def _held(own: Mapping[str, Tree]) -> dict[str, Tree]:
    """Without what is read as it is needed, of which no rank has all: a loss of the same samples tells later."""
    return {name: tree for name, tree in own.items() if not isinstance(tree, Unread)}


def _number(tree: Tree, name: str, rows: torch.Tensor | None) -> int:
    """A checksum of the tensors of a tree, with their places."""
    signatures = [(place, *_signature(data, rows)) for place, data in named_leaves(tree, name).items()]
    return zlib.crc32(repr(signatures).encode())


def _signature(data: torch.Tensor, rows: torch.Tensor | None) -> tuple[object, ...]:
    """Shape, type and a checksum of some samples."""
    count = len(data if rows is None else rows)
    chosen = torch.linspace(0, count - 1, FEW).long() if count and data[:1].numel() * count > SMALL else None
    if rows is not None:
        chosen = rows if chosen is None else rows[chosen.to(rows.device)]
    return count, tuple(data.shape[1:]), str(data.dtype), checksum(data, chosen)
