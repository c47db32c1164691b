"""Calls of layers, recorded while the user runs the network: nothing is put on the network itself."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from apts_mpi.network.recorder import LayerRecord, record_of


class Calls:
    """Records the calls of chosen layers from `begin` to `end`, whoever makes them.

    By a hook of torch's for all modules: one of a layer's own would be pickled, copied and compiled with it.

    Attributes
    ----------
    records : list of LayerRecord
        Those since `begin`, or `clear`.
    """

    def __init__(self) -> None:
        self.records: list[LayerRecord] = []
        self._layers: set[int] = set()
        self._handle: RemovableHandle | None = None
        self._is_compiled = False

    def begin(self, layers: Iterable[nn.Module]) -> None:
        """Record the calls of these layers from now on, unless they are known to be in a graph."""
        self.end()
        self._layers = {id(layer) for layer in layers}
        if self._layers and not self._is_compiled:
            # Torch keeps the hook; that must not keep this object and its optimizer.
            this = weakref.ref(self)
            self._handle = register_module_forward_hook(functools.partial(_tell, this))
            self._unlisten = weakref.finalize(self, self._handle.remove)

    def clear(self) -> None:
        """Forget what was recorded."""
        self.records = []

    def forget_reached(self) -> None:
        """Forget calls whose gradients are there already, as the gradients of the parameters are set to zero."""
        self.records = [record for record in self.records if record.gradient is None]

    def end(self) -> None:
        """Record nothing any more, and forget what was recorded."""
        if self._handle is not None:
            self._unlisten()
            self._handle = None
        self.clear()

    def leave_out_compiled(self, network: nn.Module) -> None:
        """Record nothing of a network that torch compiles: a hook would be traced, and its graph thrown away."""
        self._is_compiled |= any(map(_is_compiled, network.modules()))

    def see(self, module: nn.Module, given: tuple[Any, ...], outputs: Any) -> None:
        """A module was called."""
        if _is_compiled(module):
            self._is_compiled = True
        elif id(module) in self._layers and not torch.compiler.is_compiling():
            record = record_of(module, given, outputs)
            if record is not None:
                self.records.append(record)


def _tell(calls: weakref.ref[Calls], module: nn.Module, given: tuple[Any, ...], outputs: Any) -> None:
    alive = calls()
    if alive is not None:
        alive.see(module, given, outputs)


def _is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` or ``module.compile`` made it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
