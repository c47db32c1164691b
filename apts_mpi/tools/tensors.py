"""What values a tensor has, seen piece by piece: a copy of all of them may not fit into memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import torch

# Numbers of a piece.
PIECE = 1 << 22


def pieces(tensor: torch.Tensor, rows: torch.Tensor | None = None) -> Iterator[tuple[int, torch.Tensor]]:
    """Parts of a tensor along its first dimension, or of some of its rows, each with the place where it begins."""
    tensor = tensor.detach()
    if tensor.dim() == 0:
        tensor = tensor[None]
    step = max(1, PIECE // max(1, tensor[:1].numel()))
    for start in range(0, len(tensor if rows is None else rows), step):
        stop = start + step
        yield start, tensor[start:stop] if rows is None else tensor[rows[start:stop]]


def first_not_finite(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Place of the first number that is nan or inf; None where all are finite, as integers are."""
    if not tensor.is_floating_point():
        return None
    for start, piece in pieces(tensor):
        finite = torch.isfinite(piece)
        if not finite.all():
            first, *rest = torch.nonzero(~finite)[0].tolist()
            return start + first, *rest
    return None


def checksum(tensor: torch.Tensor, rows: torch.Tensor | None = None) -> int:
    """CRC-32 of the bytes of a tensor, or of those of some of its rows."""
    result = 0
    for _, piece in pieces(tensor, rows):
        # As bytes: numpy has not all dtypes.
        result = zlib.crc32(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, result)
    return result
