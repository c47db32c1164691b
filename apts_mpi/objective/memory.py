"""How many samples a rank runs the network over at a time: as the options say, or as there is memory for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from apts_mpi.errors import lacks_memory
from apts_mpi.objective.batch import Batch, check_micro_batches
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Pass
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.environment import host, kept_generators
from apts_mpi.tools.memory import free_memory
from apts_mpi.tools.schema import Check, record, whole
from apts_mpi.tools.trees import take, tensors_of

# Samples whose graph is measured.
FEW = 8

# Memory of an iteration in units of what a graph keeps, with gradients and tangents of the activations; and share of
# the free memory that all of it may take.
BESIDE, SHARE = 4.0, 0.5


class MicroBatches:
    """The size of micro-batches, a part of the solver that is saved: a run that goes on cuts its batches alike.

    Parameters
    ----------
    most
        The size; None for ``auto``: then a batch for which the memory does not do decides it, for good.
    group
        Number of consecutive samples that belong together; None: all, which are never divided.
    comm
        The ranks.

    Attributes
    ----------
    most : int or None
        Samples of a micro-batch, at most; None: all that a rank has.
    """

    def __init__(self, most: int | None, group: int | None, comm: Communicator) -> None:
        self.most = most
        self._is_open = most is None and group is not None
        self._is_decided = False
        self._comm = comm
        self._largest = 0
        self._bytes = 0.0
        self._sharing = 0

    def cut(self, batch: Batch, least: int) -> None:
        """Have the passes of a batch in micro-batches of the size that is known. Collective.

        Raises
        ------
        InvalidInput
            On every rank, where one may have less than ``least`` samples.
        """
        if self.most is not None:  # the same on all ranks
            with self._comm.shared_errors():
                check_micro_batches(self.most, least, batch.passes[0].group)
        for part in batch.passes:
            part.most = self.most

    def fit(self, batch: Batch, objective: Objective) -> None:
        """Have the passes of a batch in micro-batches, if the memory does not do for it. Collective."""
        if not self._is_open or batch.size <= self._largest:
            return
        self._largest = batch.size
        device = objective.vector.values.device
        if not self._sharing:
            self._sharing = self._comm.collect((host(), str(device))).count((host(), str(device)))
            self._bytes = bytes_of_sample(objective, batch.passes[0])
        samples = sum(part.samples for part in batch.passes)
        room = SHARE * free_memory(device) / self._sharing / BESIDE
        (most,) = self._comm.agree([samples, self._bytes, room], lambda table: [size_for(table)])
        if most:
            self._take(int(most))
            for part in batch.passes:
                part.most = self.most
            self._comm.events.notes.add(
                f"micro_batch_size auto: {self.most}, as there is no memory for the graphs of {batch.size} samples"
            )

    def _take(self, most: int) -> None:
        self.most, self._is_open, self._is_decided = most, False, True

    def state(self) -> dict[str, Any]:
        """See `apts_mpi.state.solver.Part`; the size that the memory has decided."""
        return {"most": self.most} if self._is_decided else {}

    def saved(self, vector: Check, vector_or_empty: Check) -> Check:
        """See `apts_mpi.state.solver.Part`."""
        return record({}, {"most": whole(1)})

    def restore(self, state: dict[str, Any]) -> list[str]:
        """See `apts_mpi.state.solver.Part`; a size that the options give stays."""
        if self._is_open and "most" in state:
            self._take(state["most"])
        return []


def size_for(table: np.ndarray) -> int:
    """Samples of a micro-batch for which the memory of all ranks does; 0 where it does for all samples.

    Of ranks that differ it is the least, and a power of two, which depends on chance less. Three at least: batch
    normalisation takes no statistics of a single sample.

    Parameters
    ----------
    table : ndarray, shape (ranks, 3)
        Of each rank its samples, the bytes of one, and the bytes that there are.
    """
    samples, of_sample, room = table.T
    if (samples * of_sample <= room).all():
        return 0
    return max(2 ** int(math.log2(max((room / np.maximum(of_sample, 1.0)).min(), 1.0))), 4)


def bytes_of_sample(objective: Objective, part: Pass) -> float:
    """Bytes that a graph of the loss keeps for a sample, as a few samples show; 0 where torch cannot tell.

    Leaves no trace.
    """
    count = min(max(FEW // part.group, 1) * part.group, part.samples)
    few = replace(part, inputs=take(part.inputs, slice(count)), targets=take(part.targets, slice(count)))
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    unpack: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, unpack)
    try:
        with (
            kept_generators(objective.vector.values.device),
            objective.replayed(few.stream),
            torch.enable_grad(),
            hooks,
        ):
            outputs, _ = objective.run_segments(few, few.inputs, cached=False)
            loss = objective.loss(outputs, few.targets)
    except RuntimeError as error:  # derivatives by torch.func within allow no such hooks
        if lacks_memory(error):
            raise
        return 0.0
    for known in _known(objective, few):
        kept.pop(known.untyped_storage().data_ptr(), None)
    # Held until here: memory that is free again would be counted once for two.
    del loss
    return sum(kept.values()) / count


def _known(objective: Objective, few: Pass) -> Sequence[torch.Tensor]:
    """Tensors that are there without a graph."""
    own = [objective.vector.values, *objective.network.parameters(), *objective.network.buffers()]
    given = (*tensors_of(few.inputs), *tensors_of(few.targets))
    return [tensor for tensor in (*own, *given) if tensor.layout is torch.strided]
