"""Inputs and output gradients of layers, recorded while the global gradient is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from apts_mpi.tools.environment import uncompiled

# Layers that an ``nn.MultiheadAttention`` holds and does not call.
UNCALLED = (nn.modules.linear.NonDynamicallyQuantizableLinear,)


@dataclass
class LayerRecord:
    """One call of a layer.

    Attributes
    ----------
    module : nn.Module
        The layer.
    inputs : Tensor
        What it was given, of any order of samples and positions. In a stage what `apts_mpi.network.activations.store`
        makes of it.
    gradient : Tensor or None
        Gradient of the mean loss of the pass with respect to what the layer returned, kept as the inputs are; None
        where the loss does not depend on it.
    ready : callable or None
        Called with the record when it has its gradient, in the backward pass.
    """

    module: nn.Module
    inputs: Any
    gradient: Any = None
    ready: Callable[[LayerRecord], None] | None = None

    def complete(self, weight: float) -> None:
        """Divide the gradient by ``weight``, which the loss was multiplied by."""
        if self.gradient is not None:
            self.gradient = self.gradient.to(_dtype_of(self.module)) / weight

    def follow(self, outputs: torch.Tensor) -> None:
        """Take the gradient with respect to the present values of ``outputs``, whatever overwrites them later."""

        def take(gradient: torch.Tensor) -> None:
            self.gradient = gradient.detach().reshape(shape)
            if self.ready is not None:
                self.ready(self)

        shape = outputs.shape
        _whole(outputs).register_hook(take)


class LayerRecorder:
    """Records calls of chosen layers, by hooks that are on them in `recording` alone.

    Calls with anything but one tensor, or that return anything else, are not recorded; nor are those that a network
    differentiates by ``torch.func``, whose tensors mean nothing outside. Of ``nn.MultiheadAttention``, which calls no
    layers, the products with its weights are recorded.

    Parameters
    ----------
    modules
        The layers.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._records: list[LayerRecord] = []
        self._multiplied: list[tuple[nn.Module, str]] = []
        self._called: list[nn.Module] = []
        for module in modules:
            if isinstance(module, nn.MultiheadAttention):
                self._multiplied.append((module, "in_proj_weight"))
            elif isinstance(module, UNCALLED):
                self._multiplied.append((module, "weight"))
            else:
                self._called.append(module)

    @contextmanager
    def recording(self) -> Iterator[list[LayerRecord]]:
        """Record all calls in the block that take part in a graph."""
        records = self._records = []
        with ExitStack() as stack:
            if self._called or self._multiplied:
                # A compiled graph would be cut at each layer, or keep the hooks.
                stack.enter_context(uncompiled())
            for module in self._called:
                # The first of the hooks: others may return something else than the layer did.
                hook = module.register_forward_hook(self._see_call, prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            if self._multiplied:
                stack.enter_context(_products_seen_by(self._see_product))
            yield records
        for record in records:
            record.gradient = None  # of a derivative that the network itself took

    def _see_call(
        self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], outputs: torch.Tensor
    ) -> None:
        self.see(module, (*given, *named.values()), outputs)

    def see(self, module: nn.Module, given: tuple[Any, ...], outputs: Any) -> None:
        """A layer was called with ``given``, by position or by keyword."""
        record = record_of(module, given, outputs)
        if record is not None:
            self._records.append(record)

    def _see_product(self, inputs: torch.Tensor, weight: torch.Tensor, outputs: torch.Tensor) -> None:
        """A weight was multiplied by."""
        for module, name in self._multiplied:
            if getattr(module, name) is weight:
                self.see(module, (inputs,), outputs)


def record_of(module: nn.Module, given: tuple[Any, ...], outputs: Any) -> LayerRecord | None:
    """The record of a layer's call; None for a call that is not recorded, see `LayerRecorder`."""
    if len(given) != 1 or not (_is_plain(given[0]) and _is_plain(outputs)):
        return None
    if not _whole(outputs).requires_grad or _whole(outputs).numel() != outputs.numel():
        return None
    inputs = given[0].detach()
    if inputs.is_floating_point():
        inputs = inputs.to(_dtype_of(module))
    record = LayerRecord(module, inputs)
    record.follow(outputs)
    return record


@contextmanager
def _products_seen_by(see: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """Tell of each ``linear(inputs, weight)`` of ``torch.nn.functional`` in the block.

    torch hands the whole of attention to its function modes as one call, in which they are off.
    """
    linear = functional.linear

    def told(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        outputs = linear(input, weight, bias)
        see(input, weight, outputs)
        return outputs

    functional.linear = told
    try:
        yield
    finally:
        functional.linear = linear


def _is_plain(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not torch._C._functorch.is_functorch_wrapped_tensor(value)


def _whole(outputs: torch.Tensor) -> torch.Tensor:
    """What ``outputs`` are a view of, or they themselves.

    A view that is changed in place moves in the graph, and its hooks then see nothing; its base keeps them.
    """
    base = outputs._base
    return outputs if base is None else base


def _dtype_of(module: nn.Module) -> torch.dtype:
    """Of its parameters; under autocast it computes in another one, in which statistics would be summed up badly."""
    return next(module.parameters()).dtype
