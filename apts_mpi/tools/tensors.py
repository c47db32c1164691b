"""What values a tensor has, seen piece by piece: a copy of all of them may not fit into memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# A tensor as one message has it: its dtype, shape and bytes; or as it is, where it is not strided.
Packed = Any

# Numbers of a piece.
PIECE = 1 << 22


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Have tensors that are made in the block without a word about it in this floating-point type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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


def packed(tensor: torch.Tensor | None) -> Packed:
    """The tensor, of any dtype and layout, as a message has it; see `unpacked`."""
    if tensor is None or tensor.layout is not torch.strided:
        return tensor if tensor is None else tensor.detach().cpu()
    own = tensor.detach().resolve_conj().cpu().contiguous()
    return own.dtype, tuple(own.shape), own.reshape(-1).view(torch.uint8).numpy()


def unpacked(given: Packed, device: torch.device) -> torch.Tensor | None:
    """The inverse of `packed`."""
    if given is None or isinstance(given, torch.Tensor):
        return given if given is None else given.to(device)
    dtype, shape, content = given
    # Not the message's own memory, which may be read-only.
    return torch.tensor(content, dtype=torch.uint8).view(dtype).reshape(shape).to(device)
