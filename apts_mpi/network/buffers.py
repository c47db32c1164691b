"""The network's buffers (running statistics) across evaluations that must not see each other's updates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror


class Buffers:
    """Buffers of a network: every pass runs on copies of them; they move once, when a step is accepted.

    The change of a floating-point buffer is the mean over all passes of all ranks, weighted by their samples; a
    counter moves by one pass.

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
        self._places = [
            (module, name)
            for module in network.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.numel()
        ]
        floating = [buffer for buffer in self._buffers() if buffer.is_floating_point()]
        size = sum(buffer.numel() for buffer in floating)
        self._change = Mirror(torch.zeros(size, dtype=like.dtype, device=like.device)) if size else None
        self._counts: list[torch.Tensor] = []

    def _buffers(self) -> list[torch.Tensor]:
        return [getattr(module, name) for module, name in self._places]

    def _install(self, buffers: list[torch.Tensor]) -> None:
        for (module, name), buffer in zip(self._places, buffers, strict=True):
            setattr(module, name, buffer)

    @contextmanager
    def copied(self) -> Iterator[None]:
        """Let the network use copies in the block.

        Saving and restoring in place would not do: a graph that is kept refers to the buffers that it saw.
        """
        originals = self._buffers()
        self._install([buffer.clone() for buffer in originals])
        try:
            yield
        finally:
            self._install(originals)

    def begin(self) -> None:
        """Before the passes of an evaluation."""
        if self._change is not None:
            self._change.tensor.zero_()

    @contextmanager
    def noted(self, weight: float) -> Iterator[None]:
        """Like `copied`, for a pass with this share of all samples, whose change `accept` may want."""
        originals = self._buffers()
        with self.copied():
            yield
            copies = self._buffers()
        pairs = list(zip(copies, originals, strict=True))
        self._counts = [copy for copy in copies if not copy.is_floating_point()]
        if self._change is not None:
            changes = [(copy - buffer).flatten() for copy, buffer in pairs if buffer.is_floating_point()]
            self._change.tensor.add_(torch.cat(changes), alpha=weight)

    def accept(self, *also: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Move the buffers by the change of the last evaluation, and copy the second of each two tensors to the first.

        All in one call, which an interrupt does not divide. Collective.
        """
        if self._change is not None:
            self._comm.sum(self._change)
        counts, start, new = iter(self._counts), 0, []
        for buffer in self._buffers():
            if not buffer.is_floating_point():
                new.append(next(counts))
                continue
            assert self._change is not None  # there is one
            change = self._change.tensor[start : start + buffer.numel()]
            new.append(buffer + change.view(buffer.shape))
            start += buffer.numel()
        places = [*self._buffers(), *(place for place, _ in also)]
        if places:
            torch._foreach_copy_(places, [*new, *(values for _, values in also)])
