"""A network as a sequence of segments, and the layers and the shares of work that follow from it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from apts_mpi.errors import InvalidInput, lacks_memory
from apts_mpi.network.activations import Bundle, detached, differentiable
from apts_mpi.network.parameters import Entry, FlatParameters
from apts_mpi.network.partition import Layer
from apts_mpi.tools.environment import random_state, set_random_state
from apts_mpi.tools.trees import map_tensors, tensors_of

Forward = Callable[[torch.nn.Module, Any], Any]


def lower_precision(autocast: str) -> torch.dtype | None:
    """What option ``autocast`` stands for."""
    return None if autocast == "none" else getattr(torch, autocast)


class SegmentedNetwork:
    """The modules that a network runs one after another.

    Modules that may work in place are set not to: what they would overwrite is recorded, cached and differentiated
    again. Nested ``nn.Sequential`` are flattened. Any other network, and one that is called through ``forward``, is one
    segment: its subdomains then have nothing to leave out, and every local evaluation runs all of it.

    Parameters
    ----------
    network
        The network.
    forward
        Function of (network, inputs) that returns the outputs; None stands for ``network(inputs)``.
    autocast
        Lower precision that `run` uses where torch holds it to be safe; None: that of the parameters.

    Raises
    ------
    InvalidInput
        For a network that changes its parameters while it is evaluated, or that cannot be in the lower precision.

    Attributes
    ----------
    segments : tuple of nn.Module
        Each takes what the one before returned, as one argument; the first takes the samples, see `FirstSegment`.
    multiplications : float
        What `share` is a share of; those of `measure`, unless these are segments of a larger network.
    autocast : torch.dtype or None
        As given.
    ran : callable
        Called when `run` has run a segment.
    """

    def __init__(self, network: torch.nn.Module, forward: Forward | None, autocast: torch.dtype | None = None) -> None:
        self.segments = segments_of(network, forward)
        for name, module in network.named_modules():
            if getattr(module, "inplace", False) is True:
                module.inplace = False
            if getattr(module, "max_norm", None) is not None:
                raise InvalidInput(
                    f"network: {name or type(module).__name__} with max_norm={module.max_norm} changes its parameters "
                    "while it is evaluated, on each rank others; make it without max_norm"
                )
        self._counts: list[float] | None = None
        self.multiplications = 0.0
        self.autocast = autocast
        self.ran: Callable[[], None] = lambda: None
        others = {parameter.dtype for parameter in network.parameters()} - {torch.float32}
        if autocast is not None and others:
            raise InvalidInput(
                f"autocast: '{str(autocast).removeprefix('torch.')}' is for a network of float32, and this one has "
                f"parameters of {others.pop()}; choose none, or convert it by network.float()"
            )

    def run(self, segment: torch.nn.Module, activations: Bundle) -> Bundle:
        """What a segment returns, which is in float32 also where it is computed in a lower precision.

        Raises
        ------
        InvalidInput
            For a segment that overwrites what it is given: data of the user's, or what a cache keeps.
        """
        versions = [tensor._version for tensor in tensors_of(activations)]
        outputs = self._run(segment, activations)
        if [tensor._version for tensor in tensors_of(activations)] != versions:
            raise InvalidInput(
                f"network: {class_of(segment)} overwrites its inputs; use operations that are not in place (relu "
                "for relu_, x + y for x += y) on what it is given"
            )
        self.ran()
        return outputs

    def _run(self, segment: torch.nn.Module, activations: Bundle) -> Bundle:
        if self.autocast is None:
            return segment(activations)
        with torch.autocast(tensors_of(activations)[0].device.type, self.autocast):
            outputs = segment(activations)
        return map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, outputs)

    def __len__(self) -> int:
        return len(self.segments)

    def layers(self, vector: FlatParameters) -> tuple[Layer, ...]:
        """The layers of the network whose parameters are in a vector, see `layers_of`."""
        return layers_of(self.segments, list(zip(vector.entries, vector.parameters, strict=True)))

    @property
    def is_measured(self) -> bool:
        """Whether `measure` has counted."""
        return self._counts is not None

    def measure(self, inputs: Bundle, part: bool = False) -> None:
        """Count the multiplications of each segment on a few samples, once, for `share`.

        Those with weights count, whose number is the outputs' times the weights of one output. (torch's own counter
        of floating-point operations takes seconds to import.) ``part`` says that they are of a larger network: then
        those of a single segment count as well.
        """
        if self._counts is not None:
            return
        counts = [0.0] * len(self)
        handles = [
            module.register_forward_hook(functools.partial(_count_multiplications, counts, index))
            for index, segment in enumerate(self.segments)
            for module in segment.modules()
            if (part or len(self) > 1) and _is_matrix(getattr(module, "weight", None))
        ]
        try:
            if handles:
                with torch.no_grad():
                    for segment in self.segments:
                        inputs = segment(inputs)
        finally:
            for handle in handles:
                handle.remove()
        self._counts = counts if sum(counts) else [1.0] * len(counts)
        self.multiplications = sum(self._counts)

    def share(self, first: int, last: int) -> float:
        """Share of the network's multiplications in segments ``first`` to ``last``."""
        assert self._counts is not None
        return sum(count / self.multiplications for count in self._counts[first : last + 1])


def layers_of(
    segments: Sequence[torch.nn.Module], trained: Sequence[tuple[Entry, torch.nn.Parameter]]
) -> tuple[Layer, ...]:
    """The layers that `make_subdomains` cuts between: modules that hold parameters of their own.

    A layer extends over the segments without parameters that follow it. A tensor that several segments share makes its
    layer extend to the last of them.

    Parameters
    ----------
    segments
        Of a network.
    trained
        Its `trained_parameters`.
    """
    users: dict[int, list[int]] = {}
    for index, module in enumerate(segments):
        for parameter in module.parameters():
            users.setdefault(id(parameter), []).append(index)
    layers: list[Layer] = []
    for entry, parameter in trained:
        owner = entry.name.rpartition(".")[0]
        used = users[id(parameter)]
        if layers and layers[-1].name == owner:
            before = layers.pop()
            used = [*used, before.first_segment, before.last_segment]
            layers.append(Layer(before.start, entry.stop, min(used), max(used), owner))
        else:
            layers.append(Layer(entry.start, entry.stop, min(used), max(used), owner))
    nexts = [layer.first_segment for layer in layers[1:]] + [len(segments)]
    return tuple(
        dataclasses.replace(layer, last_segment=max(layer.last_segment, following - 1))
        for layer, following in zip(layers, nexts, strict=True)
    )


class CalledNetwork(torch.nn.Module):
    """A network as a function of (network, inputs) calls it.

    That may ask for gradients of the inputs it is given, and differentiate with ``torch.autograd.grad`` also where no
    graph is to be made.

    Attributes
    ----------
    may_differentiate : bool
        Whether it may take derivatives itself, which tensors that are none of torch's own cannot follow.
    """

    may_differentiate = True

    def __init__(self, network: torch.nn.Module, forward: Forward) -> None:
        super().__init__()
        self.network = network
        self._function = forward
        self._needs_graph = False

    def forward(self, inputs: Bundle) -> Any:
        inputs = detached(inputs)
        if torch.is_grad_enabled():
            return self._function(self.network, inputs)
        if not self._needs_graph:
            device = tensors_of(inputs)[0].device
            state = random_state(device)
            try:
                return self._function(self.network, inputs)
            except RuntimeError as error:  # if for another reason, it comes again
                if lacks_memory(error):
                    raise
                self._needs_graph = True
                set_random_state(state, device)
        with torch.enable_grad():
            outputs = self._function(self.network, inputs)
        return detached(outputs)


class FirstSegment(torch.nn.Module):
    """The module that is given the samples: a mapping of them as keyword arguments, anything else as one argument.

    A mapping is one argument too where the module has no arguments of these names. A tuple never is several: which
    argument each would be is for the user to say.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Bundle) -> Any:
        if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs) and self._takes(**inputs):
            return self.network(**inputs)
        if not isinstance(inputs, torch.Tensor) and not self._takes(inputs):
            raise InvalidInput(f"network: {type(self.network).__name__} has {self._why_not(inputs)}")
        return self.network(inputs)

    def _takes(self, *args: Any, **kwargs: Any) -> bool:
        try:
            inspect.signature(self.network.forward).bind(*args, **kwargs)
        except TypeError:
            return False
        return True

    def _why_not(self, inputs: Bundle) -> str:
        arguments = f"the arguments {inspect.signature(self.network.forward)}"
        if isinstance(inputs, Mapping):
            return f"{arguments}, and the inputs are {', '.join(map(str, inputs))}; give them these names"
        return (
            f"{arguments}, and the inputs are one {type(inputs).__name__}; give a mapping with these names, or "
            "forward=lambda network, inputs: network(*inputs)"
        )


def class_of(segment: torch.nn.Module) -> str:
    """Name of a segment's class as the user knows it, without what calls it here."""
    while isinstance(segment, CalledNetwork | FirstSegment):
        segment = segment.network
    return type(segment).__name__


def segments_of(network: torch.nn.Module, forward: Forward | None) -> tuple[torch.nn.Module, ...]:
    """The modules that a network runs one after another, see `SegmentedNetwork`."""
    if forward is not None:
        return (CalledNetwork(network, forward),)
    first, *others = _flatten(network)
    return (first if _takes_one_tensor(first) else FirstSegment(first), *others)


def _takes_one_tensor(module: torch.nn.Module) -> bool:
    """Whether a module is of torch's own, with one argument."""
    is_of_torch = type(module).__module__.startswith("torch.nn.modules.")
    return is_of_torch and len(inspect.signature(module.forward).parameters) == 1


def _flatten(module: torch.nn.Module) -> list[torch.nn.Module]:
    if type(module) is not torch.nn.Sequential:
        return [module]
    return [segment for child in module for segment in _flatten(child)]


def _is_matrix(weight: object) -> bool:
    return isinstance(weight, torch.Tensor) and weight.dim() > 0 and len(weight) > 0


def _count_multiplications(
    counts: list[float], index: int, module: torch.nn.Module, inputs: object, outputs: Bundle
) -> None:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    counts[index] += sum(tensor.numel() for tensor in differentiable(outputs)) * weight[0].numel()
