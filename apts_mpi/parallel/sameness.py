"""Whether ranks were given the same: told by what is in the messages of one, and of all where they differ."""

from __future__ import annotations

import itertools
import zlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from apts_mpi.errors import SharedInvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.tensors import checksum, pieces
from apts_mpi.tools.trees import Tree, named_leaves

# A tensor, and which of its rows count; None: all.
Rows = tuple[torch.Tensor, torch.Tensor | None]

# Of a machine number, as a power: processors of another kind may round otherwise what a problem computes of its data.
ROUNDING = 0.75


def first_other(values: Sequence[Hashable]) -> tuple[int, int] | None:
    """Places of the first value that differs from the most frequent one, and of that; None if all are equal."""
    usual = Counter(values).most_common(1)[0][0]
    others = [place for place, value in enumerate(values) if value != usual]
    return (others[0], values.index(usual)) if others else None


def fields_in_words(options: Any, prefix: str = "") -> dict[str, list[str]]:
    """The fields of a dataclass and of those in it, for `check_same`."""
    words: dict[str, list[str]] = {}
    for option in fields(options):
        value, name = getattr(options, option.name), prefix + option.name
        words |= fields_in_words(value, f"{name}.") if is_dataclass(value) else {name: [repr(value)]}
    return words


def check_same(own: Mapping[str, Sequence[str]], comm: Communicator, where: str, remedy: str) -> None:
    """See that all ranks that give a name give the same words with it. Collective.

    Raises
    ------
    SharedInvalidInput
        On every rank if one differs from most, naming the first that does and the first word that differs.
    """
    found = comm.collect({name: zlib.crc32(repr(list(words)).encode()) for name, words in own.items()})
    for name in _names(found):
        ranks = [rank for rank, given in enumerate(found) if name in given]
        other = first_other([found[rank][name] for rank in ranks])
        if other is not None:
            rank, usual = (ranks[place] for place in other)
            texts = comm.collect(list(own.get(name, ())))
            pairs = itertools.zip_longest(texts[rank], texts[usual], fillvalue="nothing")
            here, there = next((one, two) for one, two in pairs if one != two)
            raise SharedInvalidInput(
                f"{where}: rank {rank} has another {name} than rank {usual}, {here:.80} and {there:.80}; {remedy}"
            )


def check_same_tensors(own: Mapping[str, Rows], comm: Communicator, where: str, remedy: str) -> None:
    """See that all ranks that give a name give the same tensor with it, up to rounding. Collective.

    Raises
    ------
    SharedInvalidInput
        On every rank if one differs from most, naming the first that does.
    """
    words: dict[str, list[str]] = {}
    for name, (data, rows) in own.items():
        words[f"shape of the {name}"] = [str((len(data if rows is None else rows), *data.shape[1:]))]
        words[f"type of the {name}"] = [str(data.dtype)]
    check_same(words, comm, where, remedy)
    found = comm.collect({name: checksum(*given) for name, given in own.items()})
    for name in _names(found):
        ranks = [rank for rank, given in enumerate(found) if name in given]
        if len({found[rank][name] for rank in ranks}) > 1:
            # Groups of those that have it and those that have not: all ranks have seen the same checksums.
            group = comm.group(int(name in own))
            samples = comm.collect(_first_other_sample(own[name], group) if name in own else None)
            other = first_other([samples[rank] is None for rank in ranks])
            if other is not None:
                rank, usual = (ranks[place] for place in other)
                sample = next(sample for sample in samples if sample is not None)
                raise SharedInvalidInput(
                    f"{where}: rank {rank} has other {name} than rank {usual}, first in sample {sample}; {remedy}"
                )


def check_same_trees(
    own: Mapping[str, Tree], rows: torch.Tensor | None, comm: Communicator, where: str, remedy: str
) -> None:
    """See that all ranks that give a name give the same tree of tensors with it, or ``rows`` of it. Collective.

    Raises
    ------
    SharedInvalidInput
        See `check_same_tensors`; or if one has other leaves in its tree.
    """
    leaves = {name: named_leaves(tree, name) for name, tree in own.items()}
    check_same({f"tree of {name}": sorted(found) for name, found in leaves.items()}, comm, where, remedy)
    tensors = {place: (leaf, rows) for found in leaves.values() for place, leaf in found.items()}
    check_same_tensors(tensors, comm, where, remedy)


def _names(found: Sequence[Mapping[str, int]]) -> list[str]:
    return list(dict.fromkeys(name for given in found for name in given))


def _first_other_sample(given: Rows, comm: Communicator) -> int | None:
    """The first row that differs by more than rounding from that of rank 0; None if none does. Collective."""
    first = None
    for start, piece in pieces(*given):
        here = piece.cpu().contiguous()
        there = here.clone()
        comm.share_tensors([there.reshape(-1).view(torch.uint8)])  # in place, of any type
        if first is None and not torch.equal(here, there):
            tolerance = 0.0
            if here.is_floating_point():
                scale = float(torch.nan_to_num(there, 0.0, 0.0, 0.0).abs().max())
                tolerance = torch.finfo(here.dtype).eps ** ROUNDING * scale
            same = torch.isclose(here, there, rtol=0.0, atol=tolerance, equal_nan=True)
            if not same.all():
                first = start + int(torch.nonzero(~same)[0, 0])
    return first
