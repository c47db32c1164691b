"""Memory of a tensor that MPI may read and write; the only file where CUDA meets MPI."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from apts_mpi.errors import InvalidInput

# mpi4py silently reduces bfloat16 to garbage, refuses float16, and misreads a tensor that is not C-contiguous.
ADMITTED_DTYPES = (torch.float32, torch.float64)


class Mirror:
    """What MPI sees of a flat tensor: the tensor itself on a CPU, pinned host memory beside it on a GPU.

    Iallreduce on GPU memory crashes in current Open MPI, GPU-aware or not (open-mpi/ompi#9845), hence the staging.

    Parameters
    ----------
    tensor
        Flat, contiguous, float32 or float64, not requiring a gradient.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.dtype not in ADMITTED_DTYPES or not tensor.is_contiguous() or tensor.requires_grad:
            raise InvalidInput(
                f"a tensor of {tensor.dtype}, contiguous={tensor.is_contiguous()}, "
                f"requires_grad={tensor.requires_grad} cannot be reduced; give a contiguous float32 or float64 tensor"
            )
        self.tensor = tensor
        self._host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu").pin_memory()
        self._array = self._host.numpy()

    def memory(self, start: int, stop: int) -> np.ndarray:
        """Host memory of elements ``start`` to ``stop``, shape (stop - start,)."""
        return self._array[start:stop]

    def push(self, start: int, stop: int) -> None:
        """Bring elements ``start`` to ``stop`` to where MPI reads them; returns when they are there."""
        if self._host is not self.tensor:
            self._host[start:stop].copy_(self.tensor[start:stop])

    def pull(self, start: int, stop: int) -> None:
        """Bring elements ``start`` to ``stop`` from where MPI wrote them into the tensor."""
        if self._host is not self.tensor:
            self.tensor[start:stop].copy_(self._host[start:stop], non_blocking=True)


class HostBytes:
    """What MPI sees of a tensor in a message between two ranks, where nothing is summed: its bytes, of any dtype.

    Parameters
    ----------
    tensor
        Contiguous, not requiring a gradient.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._host = tensor if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu").pin_memory()
        self.memory = self._host.reshape(-1).view(torch.uint8).numpy()

    def push(self) -> None:
        """Bring the tensor to where MPI reads it; returns when it is there."""
        if self._host is not self._tensor:
            self._host.copy_(self._tensor)

    def pull(self) -> None:
        """Bring what MPI wrote into the tensor."""
        if self._host is not self._tensor:
            self._tensor.copy_(self._host, non_blocking=True)


def choose_device(kind: str, local_rank: int) -> torch.device:
    """Device of this rank: one GPU a rank, in the order of the ranks on the host.

    Parameters
    ----------
    kind
        ``cpu``, ``cuda``, or ``auto``: a GPU where there is one.
    local_rank
        Number of this rank among those on its host.

    Raises
    ------
    InvalidInput
        For ``cuda`` where there is none.
    """
    count = torch.cuda.device_count() if kind != "cpu" else 0
    if kind == "cuda" and count == 0:
        raise InvalidInput("device: 'cuda' was asked for, but torch finds no GPU here; give --device cpu or auto")
    if count == 0:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % count)
    # Before anything touches CUDA: the first context made is the one that stays (pytorch/pytorch#21922).
    torch.cuda.set_device(device)
    return device


def describe_transport(device: torch.device) -> str:
    """How `Mirror` brings tensors of a device to MPI, in words."""
    return "the tensors' own memory" if device.type == "cpu" else "staging through pinned host memory"


def identity_of(device: torch.device) -> str:
    """What tells a GPU from all others of its host, also where processes see them under other numbers; "" for a CPU."""
    if device.type == "cpu":
        return ""
    properties = torch.cuda.get_device_properties(device)
    # Older releases of torch have no uuid.
    return str(getattr(properties, "uuid", device))


def sums_directly(comm: Any, device: torch.device, elements: int = 2**20) -> bool:
    """Whether ``Iallreduce`` of an MPI communicator on memory of ``device`` gives right sums. Collective.

    Libraries without it do not say so but crash, or never return: call it in a process that may be lost.
    """
    right = True
    for dtype in ADMITTED_DTYPES:
        send = torch.full((elements,), comm.rank + 1, dtype=dtype, device=device)
        receive = torch.zeros_like(send)
        if device.type == "cuda":
            # mpi4py does not wait for the stream.
            torch.cuda.synchronize(device)
        comm.Iallreduce(send, receive).Wait()
        right = right and bool((receive == comm.size * (comm.size + 1) // 2).all())
    return right
