"""Lazy copies of single buffers, and whether a pass has changed one."""

from __future__ import annotations

import torch

# Numbers of a buffer on a GPU up to which a message costs less than to wait for the device to compare it.
NOT_COMPARED = 1 << 16


def copy_of(buffer: torch.Tensor) -> torch.Tensor:
    """A copy that takes memory and time only once it, or the buffer, is written to."""
    if buffer.layout is torch.strided:
        try:
            return torch._lazy_clone(buffer)
        except RuntimeError:  # memory that is not torch's own, such as numpy's
            pass
    return buffer.clone()


def has_moved(original: torch.Tensor | None, copy: torch.Tensor | None, now: torch.Tensor | None) -> bool:
    """Whether ``now``, which is where ``copy`` was before the pass, has other values than the original.

    Counters of changes would not tell: batch normalisation writes without counting. Who writes to a lazy copy gets
    memory of its own, and so do some who only read.
    """
    if original is None or copy is None or now is None:
        return original is not now
    if original.layout is not torch.strided or now.layout is not torch.strided:
        return now is not copy or now._version > 0
    if now is copy and torch._C._is_cow_tensor(now):  # type: ignore[attr-defined]
        return False
    if now.shape != original.shape or now.dtype != original.dtype or now.device != original.device:
        return True
    return (now.device.type != "cpu" and now.numel() <= NOT_COMPARED) or not torch.equal(now, original)


def is_averaged(original: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether the mean over passes is taken."""
    return (original.is_floating_point() or original.is_complex()) and fits(original, now)


def fits(original: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether a buffer can take these values in place."""
    strided = original.layout is torch.strided and now.layout is torch.strided
    alike = strided and original.shape == now.shape and original.dtype == now.dtype
    return alike and all(stride or size == 1 for size, stride in zip(original.shape, original.stride(), strict=True))
