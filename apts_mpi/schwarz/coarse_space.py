"""The coarse space: the columns in whose span the coarse level looks for the step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apts_mpi.curvature.linearisation import Column
from apts_mpi.errors import InvalidInput
from apts_mpi.options import SUBDOMAINS, CoarseOptions
from apts_mpi.tools.user_code import class_of


@dataclass(frozen=True)
class CoarseState:
    """What columns can be made of, of the parameters that this rank holds.

    Attributes
    ----------
    parts : list of (int, int)
        The ranges of the flat vector that the subdomains own. A column that lies in one of them is the same in both
        layouts; one across several is cut in layout ``staged``, where a rank has those of its stage.
    corrections : sequence of Column
        That of each subdomain.
    gradient, last_step, last_correction : Tensor, shape (n,)
        The global gradient, the last accepted step, and the corrections of which it was made; the last one is empty
        unless the space asks for it.
    """

    parts: Sequence[tuple[int, int]]
    corrections: Sequence[Column]
    gradient: torch.Tensor
    last_step: torch.Tensor
    last_correction: torch.Tensor


class CoarseSpace(ABC):
    """Makes the columns of an iteration; one instance a rank, made from the options of the coarse level.

    Ranks that hold the same parameters have to make the same columns, to the bit, and as many at every iteration.

    Attributes
    ----------
    needs_last_correction : bool
        Whether `CoarseState.last_correction` is wanted, which takes one more vector.
    """

    needs_last_correction = False

    def __init__(self, options: CoarseOptions) -> None:
        self.options = options

    @abstractmethod
    def columns(self, state: CoarseState) -> Sequence[Column]:
        """The columns; zero and dependent ones may be among them. What the space keeps changes in `follow` alone."""

    def follow(self, state: CoarseState, step: torch.Tensor) -> None:
        """Take note of an accepted step, shape (n,)."""

    def state(self) -> dict[str, Any]:
        """What it keeps from one iteration to the next, by name: numbers, and tensors of shape (n,)."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` has returned."""


class SubdomainColumns(CoarseSpace):
    """Of each subdomain its correction, and its parts of the vectors that ``coarse.columns`` names."""

    def __init__(self, options: CoarseOptions) -> None:
        super().__init__(options)
        self.needs_last_correction = "last_correction" in options.columns

    def columns(self, state: CoarseState) -> Sequence[Column]:
        """See `CoarseSpace`."""
        return list(state.corrections) + [
            Column(start, stop, getattr(state, name)[start:stop])
            for name in self.options.columns
            if name != "correction"
            for start, stop in state.parts
        ]


def make_coarse_space(options: CoarseOptions) -> CoarseSpace:
    """The space of the options.

    Raises
    ------
    InvalidInput
        For a class of the user's that cannot be imported, or is no `CoarseSpace`.
    """
    if options.space == SUBDOMAINS:
        return SubdomainColumns(options)
    return class_of("coarse.space", options.space, CoarseSpace)(options)


def check_columns(columns: Sequence[Column], size: int, space: str) -> None:
    """Raise `InvalidInput` unless a space has columns, each of which lies in a flat vector of ``size`` elements."""
    if not columns:
        raise InvalidInput(f"coarse.space: {space!r} made no columns; make one at least, be it zero")
    for number, column in enumerate(columns):
        if not 0 <= column.start < column.stop <= size or column.values.shape != (column.stop - column.start,):
            raise InvalidInput(
                f"coarse.space: column {number} of {space!r} has values of shape {tuple(column.values.shape)} for "
                f"{column.start} to {column.stop} of {size} parameters; give 0 <= start < stop <= {size}, and a value "
                "for each parameter between them"
            )
