"""What a local solver keeps from one iteration to the next, in a form that a checkpoint can hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class LayerState:
    """Tensors that belong to a layer, and the name of the class that made them."""

    kind: str
    tensors: list[torch.Tensor]


@dataclass
class LocalState:
    """State of the local solver of one subdomain.

    Attributes
    ----------
    numbers : dict
        Numbers by name.
    vectors : dict of str to Tensor, shape (stop - start,)
        What has one element a parameter, by name.
    layers : list of LayerState
        One for each layer of the subdomain; empty as long as there are none.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: list[LayerState] = field(default_factory=list)


class Memoryless:
    """A local solver that keeps nothing."""

    def state(self) -> LocalState:
        """See `apts_mpi.local.gradient.LocalSolver`."""
        return LocalState()

    def restore(self, state: LocalState) -> None:
        """See `apts_mpi.local.gradient.LocalSolver`."""
