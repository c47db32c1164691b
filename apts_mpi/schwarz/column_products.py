"""Inner products of columns, of which few share an index."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch

from apts_mpi.curvature.linearisation import Column

# Elements of columns that are copied beside each other at a time.
PIECE = 1 << 20


def inner_products(columns: Sequence[Column]) -> torch.Tensor:
    """Inner products of columns, shape (m, m), float64; zero for those that share no index.

    Between two neighbouring ends of columns the same ones are present: there one product of matrices has all of theirs.
    So the work grows with what overlaps, and not with the square of m.
    """
    begin, end = defaultdict(list), defaultdict(list)
    for number, column in enumerate(columns):
        if column.start < column.stop:
            begin[column.start].append(number)
            end[column.stop].append(number)
    device = columns[0].values.device
    gram = torch.zeros(len(columns), len(columns), dtype=torch.float64, device=device)
    present: set[int] = set()
    for start, stop in itertools.pairwise(sorted({*begin, *end})):
        present = (present - set(end[start])) | set(begin[start])
        if present:
            numbers = sorted(present)
            place = torch.tensor(numbers, device=device)
            gram[place[:, None], place] += _between(start, stop, [columns[number] for number in numbers])
    return 0.5 * (gram + gram.T)


def _between(start: int, stop: int, columns: Sequence[Column]) -> torch.Tensor:
    """Inner products of the parts of columns that all lie there, shape (k, k), float64."""
    parts = [column.values[start - column.start : stop - column.start] for column in columns]
    step = max(1, PIECE // len(columns))
    pieces = (torch.stack([part[first : first + step] for part in parts]) for first in range(0, stop - start, step))
    return torch.stack([(piece @ piece.T).double() for piece in pieces]).sum(dim=0)
