"""Inputs and output gradients of layers, recorded while the global gradient is evaluated."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class LayerRecord:
    """One call of a layer.

    Attributes
    ----------
    module : nn.Module
        The layer.
    inputs : Tensor
        What it was given; samples in the first dimension. In a stage what `apts_mpi.bundle.store` makes of it.
    outputs : Tensor or None
        What it returned, with its graph; dropped once the gradient is known.
    gradient : Tensor or None
        Gradient of the mean loss of the pass with respect to the outputs, kept as the inputs are.
    """

    module: torch.nn.Module
    inputs: Any
    outputs: torch.Tensor | None
    gradient: Any = None

    def complete(self, weight: float) -> None:
        """Take the gradient from the graph, in which the loss was multiplied by ``weight``."""
        if self.outputs is not None and self.outputs.grad is not None:
            self.gradient = self.outputs.grad.to(_dtype_of(self.module)) / weight
        self.outputs = None


class LayerRecorder:
    """Records calls of chosen layers, by hooks that do nothing outside of `recording`.

    Parameters
    ----------
    modules
        The layers.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self._records: list[LayerRecord] | None = None
        # The hooks stay with the network; they must not keep this object alive.
        this = weakref.ref(self)
        for module in modules:
            module.register_forward_hook(lambda module, inputs, outputs: _tell(this, module, inputs, outputs))

    @contextmanager
    def recording(self) -> Iterator[list[LayerRecord]]:
        """Record all calls in the block that take part in a graph."""
        self._records = []
        try:
            yield self._records
        finally:
            self._records = None

    def see(self, module: torch.nn.Module, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """A layer was called."""
        if self._records is not None and outputs.requires_grad:
            outputs.retain_grad()
            inputs = inputs.detach()
            if inputs.is_floating_point():
                inputs = inputs.to(_dtype_of(module))
            self._records.append(LayerRecord(module, inputs, outputs))


def _dtype_of(module: torch.nn.Module) -> torch.dtype:
    """Of its parameters; under autocast it computes in another one, in which statistics would be summed up badly."""
    return next(module.parameters()).dtype


def _tell(
    recorder: weakref.ref[LayerRecorder],
    module: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    outputs: torch.Tensor,
) -> None:
    alive = recorder()
    if alive is not None:
        alive.see(module, inputs[0], outputs)
