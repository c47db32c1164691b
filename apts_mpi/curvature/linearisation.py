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

from apts_mpi.curvature import closed_forms  # noqa: F401 (for the forms that it registers)
from apts_mpi.curvature.carrying import CarriedSegments, Carrying, along, columns_of, value_of
from apts_mpi.curvature.differences import by_differences
from apts_mpi.curvature.loss_curvature import curved
from apts_mpi.curvature.transposes import by_transposes
from apts_mpi.errors import InvalidInput, lacks_memory, named_failures
from apts_mpi.network.activations import Bundle, differentiable, with_differentiable, with_tensors
from apts_mpi.network.parameters import Entry, shaped_like
from apts_mpi.network.segments import SegmentedNetwork, class_of
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Pass
from apts_mpi.tools.environment import random_state, set_random_state, uncompiled
from apts_mpi.tools.events import BACKWARD, FORWARD
from apts_mpi.tools.trees import Tree, count_samples, map_tensors, tensors_of

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

# Work of a segment by each way to differentiate it, once and for each column: forwards, backwards, by differences.
COSTS = ((FORWARD, FORWARD), (FORWARD + BACKWARD, BACKWARD), (FORWARD, 2.0 * FORWARD))

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
    approximates
        Whether a segment, or a loss, that cannot be differentiated twice may have differences of its values in the
        place of derivatives. That is noted in the events.
    """

    def __init__(self, objective: Objective, approximates: bool = False) -> None:
        _import_what_torch_imports_late()
        self._objective = objective
        self._segmented = segmented = objective.segmented
        self._loss = objective.loss
        self._events = objective.events
        vector = objective.vector
        self._by_forms = CarriedSegments()
        self._approximates = approximates
        # Of each segment, the first of its ways to be differentiated that has not failed.
        self._ways: dict[int, int] = {}
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
            if not tangents:
                raise InvalidInput(
                    f"coarse.model: 'gauss-newton' needs a network that returns tensors, and this one returns a "
                    f"{type(outputs).__name__} in which there are none; return them in a tuple, a mapping or a "
                    "dataclass, or choose --coarse none"
                )
            return self.between(outputs, part.targets, tangents)

    @contextmanager
    def drawing(self, part: Pass) -> Iterator[None]:
        """Run the block for a pass: with its random stream and statistics, without graphs and leaving no trace."""
        with (
            torch.no_grad(),
            _statistics_of_batch(self._segmented),
            self._objective.replayed(part.stream),
            # The fused kernels of attention have neither forward mode nor second derivatives.
            sdpa_kernel(SDPBackend.MATH),
            uncompiled(),
        ):
            yield

    def between(self, outputs: Bundle, targets: Tree, tangents: Sequence[torch.Tensor]) -> torch.Tensor:
        """The loss's Hessian between tangents of the differentiable outputs, shape (m, m), float64."""
        count = len(tangents[0])
        total = tangents[0].new_zeros(count, count, dtype=torch.float64)
        products = curved(self._loss, outputs, targets, tangents, self._differs)
        for tangent, product in zip(tangents, products, strict=True):
            if product is not None:
                total += tangent.reshape(count, -1).double() @ product.reshape(count, -1).double().T
        return total

    def _differs(self, error: Exception) -> None:
        """Tell that the loss has differences in the place of derivatives, or raise the error where it may not."""
        if not self._approximates:
            raise error
        self._tell("the loss", error)

    def _tell(self, what: str, error: Exception) -> None:
        reason = str(error).strip().partition("\n")[0]
        self._events.notes.add(
            f"coarse.model auto: {what} has no second derivatives ({reason}); differences are taken in their place"
        )

    def tangents(
        self, inputs: Bundle, columns: Sequence[Column], entering: tuple[torch.Tensor, ...] = ()
    ) -> tuple[Bundle, tuple[torch.Tensor, ...]]:
        """The outputs, and J S of each of their differentiable tensors, shape (m, samples, ...).

        ``entering`` has the tangents of the differentiable inputs along the first columns, shape (columns, samples,
        ...).
        """
        first = tuple(range(len(entering[0]))) if entering else ()
        moving = zip(differentiable(inputs), entering, strict=False)
        carried = with_differentiable(inputs, [Carrying(*pair, first) for pair in moving]) if entering else inputs
        for index in range(len(self._segmented)):
            carried = self._through(index, carried, columns)
        everything = tuple(range(len(columns)))
        return map_tensors(value_of, carried), tuple(along(tensor, everything) for tensor in differentiable(carried))

    def _through(self, index: int, carried: Bundle, columns: Sequence[Column]) -> Bundle:
        """What a segment makes of tensors, `Carrying` those that move."""
        segment, own = self._segmented.segments[index], self._own[index]
        moving = {name: _reached(entry, columns) for name, entry in own.items()}
        values = dict(segment.named_parameters()) if any(moving.values()) else {}
        parameters = {
            name: Carrying(values[name].detach(), _directions(own[name], columns, numbers, values[name]), numbers)
            for name, numbers in moving.items()
            if numbers
        }
        outputs = self._by_forms.run(index, segment, carried, parameters)
        if outputs is None:
            outputs = self._by_autograd(index, carried, parameters)
        once, each = COSTS[self._ways.get(index, 0)]
        count = len(columns_of(differentiable(carried))) + len(columns_of(parameters.values()))
        samples = count_samples(carried)
        self._events.count_work(samples, self._segmented.share(index, index), once + each * count)
        return outputs

    def _by_autograd(self, index: int, carried: Bundle, parameters: dict[str, Carrying]) -> Bundle:
        """The same by differentiation as torch does it: of the inputs alone for the columns that move no parameter."""
        segment, plain, entering = (
            self._segmented.segments[index],
            map_tensors(value_of, carried),
            differentiable(carried),
        )
        joined, moving = columns_of(entering), columns_of(parameters.values())
        resting = tuple(number for number in joined if number not in moving)
        device = tensors_of(plain)[0].device
        state = random_state(device)
        outputs = plain if moving or resting else segment(plain)
        tangents = []
        for columns, names in ((moving, list(parameters)), (resting, [])):
            if columns:
                set_random_state(state, device)  # with the same dropout masks
                variables = [*(entering if joined else ()), *(parameters[name] for name in names)]
                outputs, found = self._differentiate(index, plain, variables, names, columns)
                tangents.append(found)
        moved = [torch.cat(parts) for parts in zip(*tangents, strict=True)]
        if not moved:
            return outputs
        # Forward mode of a single number times one of Python's, along several columns, is float64.
        pairs = [(value, found.to(value.dtype)) for value, found in zip(differentiable(outputs), moved, strict=True)]
        return with_differentiable(outputs, [Carrying(*pair, moving + resting) for pair in pairs])

    def _differentiate(
        self,
        index: int,
        plain: Bundle,
        variables: Sequence[torch.Tensor],
        names: Sequence[str],
        columns: tuple[int, ...],
    ) -> tuple[Bundle, tuple[torch.Tensor, ...]]:
        """A segment's outputs and their tangents along columns of its variables: its inputs, and parameters by name."""
        segment = self._segmented.segments[index]
        inputs = len(variables) - len(names)
        tangents = tuple(along(variable, columns) for variable in variables)
        # Copies: forward mode gives a tangent as much memory as its primal's storage has, which for a view of the flat
        # vector is that of all parameters.
        point = tuple(value_of(variable).clone() for variable in variables)

        def run(values: Sequence[torch.Tensor]) -> Bundle:
            given = with_differentiable(plain, values[:inputs]) if inputs else plain
            return functional_call(segment, dict(zip(names, values[inputs:], strict=True)), (given,))

        returned: list[Bundle] = []

        def parts(*values: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
            outputs = run(values)
            returned[:] = [outputs]
            return differentiable(outputs), tensors_of(outputs)

        def forwards() -> tuple[Bundle, tuple[torch.Tensor, ...]]:
            def of_column(*directions: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
                found: Any = jvp(parts, point, directions, has_aux=True)
                return found[1:]

            places: Any = (0, None)  # the outputs are the same for all
            moved, values = vmap(of_column, out_dims=places, randomness="same")(*tangents)
            return with_tensors(returned[0], values), moved

        def backwards() -> tuple[Bundle, tuple[torch.Tensor, ...]]:
            return by_transposes(run, point, tangents)

        def differences() -> tuple[Bundle, tuple[torch.Tensor, ...]]:
            return by_differences(run, point, tangents)

        # For activation functions and the like forward mode would do as well, but its first use imports for seconds.
        ways = {0: forwards, 1: backwards} if next(segment.parameters(), None) is not None else {1: backwards}
        if self._approximates:
            ways[2] = differences
        return self._first_of(ways, index, tensors_of(plain)[0].device)

    def _first_of(self, ways: dict[int, Callable[[], T]], index: int, device: torch.device) -> T:
        """Differentiate a segment in the first way that it has: in forward mode, backwards, or by differences."""
        state, last = random_state(device), max(ways)
        for way in range(max(min(ways), self._ways.get(index, 0)), last):
            try:
                return ways[way]()
            except (RuntimeError, NotImplementedError, ValueError) as error:  # if for another reason, it comes again
                if lacks_memory(error):
                    raise
                self._ways[index] = way + 1
                set_random_state(state, device)
                if way > 0:
                    self._tell(class_of(self._segmented.segments[index]), error)
        return ways[last]()


def _import_what_torch_imports_late() -> None:
    """The first batched gradient imports for a second: better here, with all imports, than in an iteration."""
    point = torch.ones(1, requires_grad=True)
    torch.autograd.grad(2.0 * point, point, torch.ones(1, 1), is_grads_batched=True)


def _reached(entry: Entry, columns: Sequence[Column]) -> tuple[int, ...]:
    """The columns in which a parameter moves."""
    return tuple(
        number for number, column in enumerate(columns) if column.start < entry.stop and entry.start < column.stop
    )


def _directions(
    entry: Entry, columns: Sequence[Column], numbers: Sequence[int], parameter: torch.Tensor
) -> torch.Tensor:
    """The parts of columns that lie in a parameter, with zeros around them."""
    found = []
    for column in (columns[number] for number in numbers):
        start, stop = max(column.start, entry.start), min(column.stop, entry.stop)
        inside = column.values[start - column.start : stop - column.start]
        whole = (start, stop) == (entry.start, entry.stop)
        found.append(inside if whole else nn.functional.pad(inside, (start - entry.start, entry.stop - stop)))
    return shaped_like(torch.stack(found), parameter)


def is_bilinear(segment: nn.Module) -> TypeGuard[Bilinear]:
    """Whether a module is linear in its inputs and in its parameters but for a bias.

    A subclass, which a parametrised layer is of, and one with a hook may do anything.
    """
    hooks = [*segment._forward_pre_hooks.values(), *segment._forward_hooks.values()]
    return type(segment) in BILINEAR and not hooks


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
