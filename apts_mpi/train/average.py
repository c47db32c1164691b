"""An exponential average of the iterates, evaluated and saved beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.checkpoint.format import Checkpoint
from apts_mpi.checkpoint.values import check_finite
from apts_mpi.errors import InvalidInput
from apts_mpi.state.tensors import PARAMETERS, named_tensors, to_numpy

# Before the names that the tensors of the network have in a checkpoint.
AVERAGE = "average/"

# Makes arrays of named tensors of a network, of which ranks may hold parts. Collective.
TensorArrays = Callable[[Mapping[str, torch.Tensor]], list[Array]]


class Average:
    """The average of a network's parameters and buffers over its accepted steps.

    After k steps the iterate j has the weight ``decay^(k - j) (1 - decay) / (1 - decay^k)``: an exponential average
    with the usual correction of its bias, in which the point where it began has none. Running statistics of batch
    normalisation, as all floating-point buffers, are averaged like parameters, and others are copied. Tensors that
    all ranks share keep having the same bits, as each rank computes with the same numbers.

    Parameters
    ----------
    network
        What is trained: all of it, or the stage that this rank holds.
    decay
        From 0, which is the iterate itself, to below 1.
    arrays
        Makes arrays of a checkpoint of its tensors.

    Attributes
    ----------
    steps : int
        In the average.
    tensors : dict of str to Tensor
        The average, by the names of the network's tensors in a checkpoint; the network itself before the first step.
    """

    def __init__(self, network: torch.nn.Module, decay: float, arrays: TensorArrays) -> None:
        self._network = network
        self._decay = decay
        self._arrays = arrays
        self.begin()

    def begin(self) -> None:
        """Forget all steps."""
        self.steps = 0
        self.tensors = {name: tensor.detach().clone() for name, tensor in named_tensors(self._network).items()}

    @torch.no_grad()
    def follow(self) -> None:
        """Take in the network after an accepted step."""
        self.steps += 1
        weight = (1.0 - self._decay) / (1.0 - self._decay**self.steps)
        for name, tensor in named_tensors(self._network).items():
            average = self.tensors[name]
            if average.is_floating_point():
                mixed = average.lerp(tensor, weight)
                # Of an infinity, as masks have, the difference from itself is no number.
                average.copy_(torch.where(mixed.isfinite(), mixed, tensor))
            else:
                average.copy_(tensor)

    @contextmanager
    def in_network(self) -> Iterator[None]:
        """Have the average in the network in the block, and the iterate with all its bits afterwards."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        tensors = named_tensors(self._network)
        kept: dict[int, torch.Tensor] = {}
        for name, tensor in tensors.items():
            # A tensor with two names has one value, and two averages of the same bits.
            own = kept.setdefault(id(tensor), tensor.detach().clone())
            # Not in place through the tensor itself: a solver takes that for a change by the user.
            tensor.data.copy_(self.tensors[name])
            self.tensors[name].copy_(own)

    def save(self) -> tuple[list[Array], dict[str, int]]:
        """Arrays and metadata of a checkpoint. Collective."""
        return self._arrays({AVERAGE + name: tensor for name, tensor in self.tensors.items()}), {"steps": self.steps}

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise `InvalidInput` unless a checkpoint has the average of such a network."""
        for name, tensor in self.tensors.items():
            saved = AVERAGE + name
            there = (checkpoint.shape(saved), checkpoint.dtype(saved)) if saved in checkpoint.names else None
            here = (tuple(tensor.shape), to_numpy(tensor).dtype)
            if there != here:
                words = "is missing" if there is None else f"has shape and type {there}, in the network it has {here}"
                raise InvalidInput(f"{checkpoint.path}: {saved} {words}; give the checkpoint of the same network")
            if name.startswith(PARAMETERS):
                check_finite(checkpoint.path, saved, checkpoint.read(saved))

    def load(self, checkpoint: Checkpoint, steps: int) -> None:
        """Take over what `save` has saved, on any number of ranks; see `check`."""
        self.steps = steps
        for name, tensor in self.tensors.items():
            tensor.copy_(torch.from_numpy(checkpoint.read(AVERAGE + name)))


def restore_average(average: Average | None, checkpoint: Checkpoint, saved: Mapping[str, int] | None) -> list[str]:
    """Take over the average of a run that goes on, in the network as it is; return what cannot be, in a sentence."""
    if average is None:
        return [] if saved is None else ["average: the one of the checkpoint ends here, as --average asks for none"]
    if saved is None:
        average.begin()
        return ["average: the checkpoint has none, so it begins with the steps that follow"]
    average.load(checkpoint, saved["steps"])
    return []
