"""Gauss-Newton products: tangents of the outputs along given columns, and the loss's Hessian between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call, jvp, vmap

from apts_mpi.environment import preserved_random_state, seed_stream
from apts_mpi.events import FORWARD, Events
from apts_mpi.objective import Loss, Pass
from apts_mpi.segments import SegmentedNetwork
from apts_mpi.vector import Entry, FlatParameters

# Linear in their inputs and linear in their parameters: a tangent goes through the layer itself.
BILINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

NORMALISING = nn.modules.batchnorm._BatchNorm


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
    tangent is zero and costs nothing.

    Parameters
    ----------
    segmented, vector, loss
        The network's segments and flat parameters, and the loss.
    events
        Where work is counted.
    """

    def __init__(self, segmented: SegmentedNetwork, vector: FlatParameters, loss: Loss, events: Events) -> None:
        _import_what_torch_imports_late()
        self._segmented = segmented
        self._loss = loss
        self._events = events
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
        """
        with self.drawing(part):
            outputs, tangents = self.tangents(part.inputs, columns)
        return self.between(outputs, part.targets, tangents)

    @contextmanager
    def drawing(self, part: Pass) -> Iterator[None]:
        """Run the block for a pass: with its random stream and statistics, without graphs and leaving no trace."""
        device = part.inputs.device
        with preserved_random_state(device), torch.no_grad(), _statistics_of_batch(self._segmented):
            seed_stream(device, *part.stream)
            yield

    def between(self, outputs: torch.Tensor, targets: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
        """The loss's Hessian between tangents of the outputs, shape (m, m), float64."""
        return tangents.flatten(1).double() @ self._curved(outputs, targets, tangents).flatten(1).double().T

    def _curved(self, outputs: torch.Tensor, targets: torch.Tensor, tangents: torch.Tensor) -> torch.Tensor:
        """H times each tangent, by differentiating the gradient of the loss alone."""
        with torch.enable_grad():
            point = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self._loss(point, targets), point, create_graph=True)
            if not slope.requires_grad:  # a loss linear in the outputs
                return torch.zeros_like(tangents)
            return torch.autograd.grad(slope, point, tangents, is_grads_batched=True)[0]

    def tangents(
        self, inputs: torch.Tensor, columns: Sequence[Column], entering: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs, shape (samples, ...), and J S, shape (m, samples, ...).

        ``entering`` has the tangents of the inputs along the first columns, shape (columns, samples, ...).
        """
        activations, tangents = inputs, entering
        joined = list(range(len(entering))) if entering is not None else []
        for index, segment in enumerate(self._segmented.segments):
            moving = [
                number
                for number, column in enumerate(columns)
                if any(column.start < entry.stop and entry.start < column.stop for entry in self._own[index].values())
            ]
            moved = self._along_parameters(index, activations, [columns[number] for number in moving])
            activations, carried = _along_inputs(segment, activations, tangents)
            self._events.count_work(
                len(inputs), self._segmented.share(index, index), FORWARD * (1 + len(joined) + len(moving))
            )
            joined, tangents = _merge(joined, carried, moving, moved)
        order = [joined.index(number) if number in joined else None for number in range(len(columns))]
        zero = torch.zeros_like(activations)
        return activations, torch.stack([zero if place is None else tangents[place] for place in order])

    def _along_parameters(
        self, index: int, activations: torch.Tensor, columns: Sequence[Column]
    ) -> torch.Tensor | None:
        """Tangents of a segment's outputs along its own parameters, shape (columns, samples, ...)."""
        if not columns:
            return None
        segment = self._segmented.segments[index]
        # Copies: forward mode gives a tangent as much memory as its primal's storage has, which for a view of the flat
        # vector is that of all parameters.
        parameters = {name: dict(segment.named_parameters())[name].detach().clone() for name in self._own[index]}
        directions = {
            name: torch.stack([_direction(column, entry).view(parameters[name].shape) for column in columns])
            for name, entry in self._own[index].items()
        }
        if isinstance(segment, BILINEAR):
            frozen = {name: torch.zeros_like(value) for name, value in segment.named_parameters()}
            return torch.stack(
                [
                    functional_call(segment, frozen | {name: d[number] for name, d in directions.items()}, activations)
                    for number in range(len(columns))
                ]
            )

        def outputs(values: dict[str, torch.Tensor]) -> torch.Tensor:
            return functional_call(segment, values, (activations,))

        return vmap(lambda direction: jvp(outputs, (parameters,), (direction,))[1], randomness="same")(directions)


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


def _along_inputs(
    segment: nn.Module, activations: torch.Tensor, tangents: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A segment's outputs and their tangents along its inputs, shape (columns, samples, ...)."""
    if tangents is None:
        return segment(activations), None
    if isinstance(segment, BILINEAR):
        values = {} if segment.bias is None else {"bias": torch.zeros_like(segment.bias)}
        moved = functional_call(segment, values, (tangents.flatten(0, 1),))
        return segment(activations), moved.unflatten(0, tangents.shape[:2])
    if next(segment.parameters(), None) is None:
        return _along_inputs_by_transposes(segment, activations, tangents)
    moved = vmap(lambda tangent: jvp(segment, (activations,), (tangent,))[1], randomness="same")(tangents)
    return segment(activations), moved


def _along_inputs_by_transposes(
    segment: nn.Module, activations: torch.Tensor, tangents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for activation functions and the like: the derivative of ``v -> J^T v``, transposed.

    Forward mode would do as well, but its first use imports for seconds, and it runs the segment once more.
    """
    with torch.enable_grad():
        point = activations.detach().requires_grad_()
        outputs = segment(point)
        weights = torch.zeros_like(outputs, requires_grad=True)
        (transposed,) = torch.autograd.grad(outputs, point, weights, create_graph=True)
        moved = torch.autograd.grad(transposed, weights, tangents, is_grads_batched=True)[0]
    return outputs.detach(), moved


def _merge(
    joined: list[int], carried: torch.Tensor | None, moving: list[int], moved: torch.Tensor | None
) -> tuple[list[int], torch.Tensor | None]:
    """Add the tangents along inputs and along parameters, column by column."""
    if moved is None:
        return joined, carried
    if carried is None:
        return moving, moved
    fresh = [place for place, number in enumerate(moving) if number not in joined]
    for place, number in enumerate(moving):
        if number in joined:
            carried[joined.index(number)] += moved[place]
    if fresh:
        carried = torch.cat([carried, moved[fresh]])
    return joined + [moving[place] for place in fresh], carried


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
