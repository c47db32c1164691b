"""Gauss-Newton products: tangents of the outputs along given columns, and the loss's Hessian between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import torch
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from apts_mpi.curvature.transposes import by_transposes
from apts_mpi.errors import InvalidInput, named_failures
from apts_mpi.network.activations import Bundle, differentiable, tensors_of, with_differentiable
from apts_mpi.network.parameters import Entry
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Pass
from apts_mpi.tools.environment import random_state, set_random_state
from apts_mpi.tools.events import BACKWARD, FORWARD

# Linear in their inputs and linear in their parameters: a tangent goes through the layer itself.
BILINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Bilinear = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d

# Batch and instance normalisation.
NORMALISING = nn.modules.batchnorm._NormBase

# What is said where these derivatives do not exist.
WITHOUT_TANGENTS = (
    "coarse.model: 'gauss-newton' differentiates the network and the loss twice",
    "choose --coarse none, or a network and a loss of operations that have second derivatives",
)

T = TypeVar("T")


@dataclass(frozen=True)
class Column:
    """A direction in parameter space that is zero outside of a range.

    Attributes
    ----------
    start, stop : int
        The range of the flat vector.
    values : Tensor, shape (stop - start,)
        The direction there.
    """

    start: int
    stop: int
    values: torch.Tensor


class Linearisation:
    """The network linearised at the present parameters, along several columns at once.

    Columns share one forward pass. A column joins at the first segment in which it has parameters; before that its
    tangent is zero and costs nothing. A segment without forward mode (``torch.autograd.grad`` within, operations that
    torch has none for) is differentiated backwards, twice.

    Parameters
    ----------
    objective
        Of the network: its segments, parameters and loss.
    """

    def __init__(self, objective: Objective) -> None:
        _import_what_torch_imports_late()
        self._objective = objective
        self._segmented = segmented = objective.segmented
        self._loss = objective.loss
        self._events = objective.events
        vector = objective.vector
        self._without_forward_mode: set[int] = set()
        entries = {id(parameter): entry for parameter, entry in zip(vector.parameters, vector.entries, strict=True)}
        self._own: list[dict[str, Entry]] = [
            {name: entries[id(value)] for name, value in segment.named_parameters() if id(value) in entries}
            for segment in segmented.segments
        ]

    def reduced(self, part: Pass, columns: Sequence[Column]) -> torch.Tensor:
        """``S^T J^T H J S`` of the mean loss over the samples of a pass.

        Returns
        -------
        Tensor, shape (m, m), float64
            J is the Jacobian of the outputs, H the Hessian of the loss with respect to them.

        Raises
        ------
        InvalidInput
            Where the network or the loss has no derivatives of the kinds that this takes.
        """
        with self.drawing(part), named_failures(*WITHOUT_TANGENTS):
            outputs, tangents = self.tangents(part.inputs, columns)
            if not isinstance(outputs, torch.Tensor):
                raise InvalidInput(
                    f"coarse.model: 'gauss-newton' needs a network that returns one tensor, not a "
                    f"{type(outputs).__name__}; choose --coarse none"
                )
            return self.between(outputs, part.targets, tangents[0])

    @contextmanager
    def drawing(self, part: Pass) -> Iterator[None]:
        """Run the block for a pass: with its random stream and statistics, without graphs and leaving no trace."""
        with (
            torch.no_grad(),
            _statistics_of_batch(self._segmented),
            self._objective.replayed(part.stream),
            # The fused kernels of attention have neither forward mode nor second derivatives.
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield

    def between(self, outputs: Any, targets: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
        """The loss's Hessian between tangents of the outputs, shape (m, m), float64."""
        return tangents.flatten(1).double() @ self._curved(outputs, targets, tangents).flatten(1).double().T

    def _curved(self, outputs: Any, targets: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
        """H times each tangent, by differentiating the gradient of the loss alone."""
        with torch.enable_grad():
            point = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._loss(point, targets), point, create_graph=True)
            if not slope.requires_grad:  # a loss linear in the outputs
                return torch.zeros_like(tangents)
            return torch.autograd.grad(slope, point, tangents, is_grads_batched=True)[0]

    def tangents(
        self, inputs: Bundle, columns: Sequence[Column], entering: tuple[torch.Tensor, ...] = ()
    ) -> tuple[Bundle, tuple[torch.Tensor, ...]]:
        """The outputs, and J S of each of their differentiable tensors, shape (m, samples, ...).

        ``entering`` has the tangents of the differentiable inputs along the first columns, shape (columns, samples,
        ...).
        """
        activations, tangents = inputs, entering
        joined = list(range(len(entering[0]))) if entering else []
        for index in range(len(self._segmented)):
            moving = [
                number
                for number, column in enumerate(columns)
                if any(column.start < entry.stop and entry.start < column.stop for entry in self._own[index].values())
            ]
            samples, device = len(tensors_of(activations)[0]), tensors_of(activations)[0].device
            # Both run the segment, with the same dropout masks.
            state = random_state(device)
            moved = self._along_parameters(index, activations, [columns[number] for number in moving])
            set_random_state(state, device)
            activations, carried = self._along_inputs(index, activations, tangents)
            once, each = (FORWARD + BACKWARD, BACKWARD) if index in self._without_forward_mode else (FORWARD, FORWARD)
            self._events.count_work(
                samples, self._segmented.share(index, index), once + each * (len(joined) + len(moving))
            )
            joined, tangents = _merge(joined, carried, moving, moved)
        order = [joined.index(number) if number in joined else None for number in range(len(columns))]
        found = []
        for place, tensor in enumerate(differentiable(activations)):
            zero = torch.zeros_like(tensor)
            found.append(torch.stack([zero if number is None else tangents[place][number] for number in order]))
        return activations, tuple(found)

    def _along_parameters(self, index: int, activations: Bundle, columns: Sequence[Column]) -> tuple[torch.Tensor, ...]:
        """Tangents of a segment's outputs along its own parameters, shape (columns, samples, ...); empty: none move."""
        if not columns:
            return ()
        segment = self._segmented.segments[index]
        # Copies: forward mode gives a tangent as much memory as its primal's storage has, which for a view of the flat
        # vector is that of all parameters.
        parameters = {name: dict(segment.named_parameters())[name].detach().clone() for name in self._own[index]}
        directions = {
            name: torch.stack([_direction(column, entry).view(parameters[name].shape) for column in columns])
            for name, entry in self._own[index].items()
        }
        if is_bilinear(segment):
            frozen = {name: torch.zeros_like(value) for name, value in segment.named_parameters()}
            moved = [
                functional_call(segment, frozen | {name: d[number] for name, d in directions.items()}, activations)
                for number in range(len(columns))
            ]
            return (torch.stack(moved),)

        def outputs(values: dict[str, torch.Tensor]) -> Bundle:
            return functional_call(segment, values, (activations,))

        def parts(values: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return differentiable(outputs(values))

        def forwards() -> tuple[torch.Tensor, ...]:
            return vmap(lambda direction: jvp(parts, (parameters,), (direction,))[1], randomness="same")(directions)

        def backwards() -> tuple[torch.Tensor, ...]:
            def run(values: Sequence[torch.Tensor]) -> Bundle:
                return outputs(dict(zip(parameters, values, strict=True)))

            return by_transposes(run, tuple(parameters.values()), tuple(directions.values()))[1]

        return self._either(index, forwards, backwards, tensors_of(activations)[0].device)

    def _along_inputs(
        self, index: int, activations: Bundle, tangents: tuple[torch.Tensor, ...]
    ) -> tuple[Bundle, tuple[torch.Tensor, ...]]:
        """A segment's outputs and their tangents along its inputs, shape (columns, samples, ...); empty: none move."""
        segment = self._segmented.segments[index]
        if not tangents:
            return segment(activations), ()
        if is_bilinear(segment):
            values = {} if segment.bias is None else {"bias": torch.zeros_like(segment.bias)}
            moved = functional_call(segment, values, (tangents[0].flatten(0, 1),))
            return segment(activations), (moved.unflatten(0, tangents[0].shape[:2]),)
        point, device = differentiable(activations), tensors_of(activations)[0].device

        def outputs(values: Sequence[torch.Tensor]) -> Bundle:
            return segment(with_differentiable(activations, values))

        def parts(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return differentiable(outputs(values))

        def forwards() -> tuple[Bundle, tuple[torch.Tensor, ...]]:
            state = random_state(device)
            moved = vmap(lambda *directions: jvp(parts, point, directions)[1], randomness="same")(*tangents)
            set_random_state(state, device)
            return segment(activations), moved

        def backwards() -> tuple[Bundle, tuple[torch.Tensor, ...]]:
            return by_transposes(outputs, point, tangents)

        # For activation functions and the like forward mode would do as well, but its first use imports for seconds,
        # and it runs the segment once more.
        if next(segment.parameters(), None) is None:
            return backwards()
        return self._either(index, forwards, backwards, device)

    def _either(self, index: int, forwards: Callable[[], T], backwards: Callable[[], T], device: torch.device) -> T:
        """Differentiate a segment in forward mode, or, where there is none, backwards."""
        if index not in self._without_forward_mode:
            state = random_state(device)
            try:
                return forwards()
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError):  # if for another reason, it comes again
                self._without_forward_mode.add(index)
                set_random_state(state, device)
        return backwards()


def _import_what_torch_imports_late() -> None:
    """The first batched gradient imports for a second: better here, with all imports, than in an iteration."""
    point = torch.ones(1, requires_grad=True)
    torch.autograd.grad(2.0 * point, point, torch.ones(1, 1), is_grads_batched=True)


def _direction(column: Column, entry: Entry) -> torch.Tensor:
    """The part of a column that lies in a parameter, flat, with zeros around it."""
    start, stop = max(column.start, entry.start), min(column.stop, entry.stop)
    if start >= stop:
        return column.values.new_zeros(entry.stop - entry.start)
    inside = column.values[start - column.start : stop - column.start]
    return nn.functional.pad(inside, (start - entry.start, entry.stop - stop))


def is_bilinear(segment: nn.Module) -> TypeGuard[Bilinear]:
    """Whether a module is linear in its inputs and in its parameters but for a bias.

    A subclass, which a parametrised layer is of, and one with a hook may do anything.
    """
    hooks = [*segment._forward_pre_hooks.values(), *segment._forward_hooks.values()]
    return type(segment) in BILINEAR and all(getattr(hook, "observes_only", False) for hook in hooks)


def _merge(
    joined: list[int], carried: tuple[torch.Tensor, ...], moving: list[int], moved: tuple[torch.Tensor, ...]
) -> tuple[list[int], tuple[torch.Tensor, ...]]:
    """Add the tangents along inputs and along parameters, column by column."""
    if not moved:
        return joined, carried
    if not carried:
        return moving, moved
    fresh = [place for place, number in enumerate(moving) if number not in joined]
    merged = []
    for along_inputs, along_parameters in zip(carried, moved, strict=True):
        if len(carried) > 1:  # a module may hand on one tensor in two places, with one tangent
            along_inputs = along_inputs.clone()
        for place, number in enumerate(moving):
            if number in joined:
                along_inputs[joined.index(number)] += along_parameters[place]
        if fresh:
            # Indexed by a list, torch would copy the list to the device, and wait.
            new = along_parameters if len(fresh) == len(moving) else torch.stack([along_parameters[p] for p in fresh])
            along_inputs = torch.cat([along_inputs, new])
        merged.append(along_inputs)
    return joined + [moving[place] for place in fresh], tuple(merged)


@contextmanager
def _statistics_of_batch(segmented: SegmentedNetwork) -> Iterator[None]:
    """Batch normalisation in training uses the batch's statistics; let it not move its running ones in the block."""
    modules = [
        module
        for segment in segmented.segments
        for module in segment.modules()
        if isinstance(module, NORMALISING) and module.training and module.track_running_stats
    ]
    for module in modules:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in modules:
            module.track_running_stats = True
