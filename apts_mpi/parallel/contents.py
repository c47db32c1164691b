"""The contents of tensors on one rank given to the others, without a copy of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mpi4py import MPI

# Bytes from which on a tensor has messages of its own, and of the longest: MPI counts in 32 bits.
LONG, LONGEST = 1 << 16, 1 << 30


def share_contents(tensors: Sequence[torch.Tensor], mpi: MPI.Intracomm) -> None:
    """Give every rank rank 0's contents of ``tensors``, of the same shape, dtype and layout there. Collective."""
    short: list[torch.Tensor] = []
    for tensor in tensors:
        if tensor.layout is not torch.strided:
            _share_object(tensor, mpi)
        elif tensor.numel() * tensor.element_size() < LONG:
            short.append(tensor)
        else:
            _share_each([tensor], mpi)
    _share_each(short, mpi)


def _share_object(tensor: torch.Tensor, mpi: MPI.Intracomm) -> None:
    """Of a layout whose memory is not one piece, pickled."""
    content = mpi.bcast(tensor.detach().cpu() if mpi.rank == 0 else None)
    if mpi.rank > 0:
        tensor.copy_(content)


def _share_each(tensors: Sequence[torch.Tensor], mpi: MPI.Intracomm) -> None:
    """One after the other as the bytes of one message."""
    if not tensors:
        return
    flat = [_bytes(tensor) for tensor in tensors]
    memory = flat[0] if len(flat) == 1 else torch.cat(flat)
    there = memory.numpy()
    for start in range(0, len(there), LONGEST):
        mpi.Bcast([there[start : start + LONGEST], MPI.BYTE])
    if mpi.rank == 0:
        return
    for tensor, other in zip(tensors, memory.split([len(own) for own in flat]), strict=True):
        if other.data_ptr() == tensor.data_ptr():
            continue
        content = other.clone().view(tensor.dtype).view(tensor.shape)
        # An expanded tensor cannot be written to.
        if not torch.equal(tensor.cpu(), content):
            tensor.copy_(content)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor on the processor without gaps its own memory, of others a copy; uint8."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.view(-1).view(torch.uint8)
