"""The sum of the ranks' gradients, bucket by bucket while the backward pass still runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from apts_mpi.network.parameters import FlatParameters
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.nonblocking import Pending
from apts_mpi.parallel.transport import BUCKET_BYTES, Mirror


class GradientReduction:
    """Sums `FlatParameters.gradients` over the ranks into `total`.

    A bucket is sent when the backward pass has finished with it, always in the same order, from the end of the vector
    to its start: MPI matches collectives by their order.

    Parameters
    ----------
    vector
        The flat parameters.
    comm
        The ranks.

    Attributes
    ----------
    total : Tensor, shape (n,)
        The summed gradient.
    """

    def __init__(self, vector: FlatParameters, comm: Communicator) -> None:
        self._comm = comm
        self._send = Mirror(vector.gradients)
        self.total = torch.zeros_like(vector.gradients)
        self._receive = Mirror(self.total)
        self._buckets: list[tuple[int, int]] = []
        self._sizes: list[int] = []
        self._bucket_of: list[int] = [0] * len(vector.entries)
        self._pending: Pending | None = None
        self._fill_buckets(vector)
        self._parameters = vector.parameters

    def _fill_buckets(self, vector: FlatParameters) -> None:
        stop = vector.values.numel()
        members = 0
        for index in reversed(range(len(vector.entries))):
            start = vector.entries[index].start
            self._bucket_of[index] = len(self._buckets)
            members += 1
            if (stop - start) * vector.values.element_size() >= BUCKET_BYTES or index == 0:
                self._buckets.append((start, stop))
                self._sizes.append(members)
                stop, members = start, 0

    @contextmanager
    def listening(self, ready: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Send buckets while backward passes in the block run, and call ``ready`` for each parameter that they reach.

        The hooks for that do not stay with the network, which may be copied, saved and compiled between steps.
        """

        def told(index: int) -> None:
            self.ready(index)
            ready()

        hooks = [
            parameter.register_post_accumulate_grad_hook(functools.partial(_call, told, index))
            for index, parameter in enumerate(self._parameters)
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self) -> None:
        """Before the last backward pass of an evaluation."""
        self._pending = self._comm.pending()
        self._missing = list(self._sizes)
        self._next = 0

    @property
    def is_begun(self) -> bool:
        """Whether the last backward pass is under way, or next."""
        return self._pending is not None

    def abandon(self) -> None:
        """After an error within an evaluation: gradients of the user's own are not to be sent."""
        self._pending = None

    def ready(self, index: int) -> None:
        """The backward pass has finished with parameter ``index``."""
        if self._pending is None:
            return
        self._missing[self._bucket_of[index]] -= 1
        while self._next < len(self._buckets) and self._missing[self._next] == 0:
            self._send_next(self._pending)
        self._pending.progress()

    def finish(self) -> Pending:
        """After it: send what is left (parameters that the loss did not reach) and return what is under way."""
        pending = self._pending
        assert pending is not None
        while self._next < len(self._buckets):
            self._send_next(pending)
        self._pending = None
        return pending

    def _send_next(self, pending: Pending) -> None:
        self._comm.start_sum(pending, self._send, self._receive, *self._buckets[self._next])
        self._next += 1


def _call(told: Callable[[int], None], index: int, _: torch.Tensor) -> None:
    told(index)
