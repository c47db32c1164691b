"""Tensors that carry their tangents along several columns through a network, by the closed form of each operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from apts_mpi.curvature.transposes import has_functions_of_users, transposed, waves_like
from apts_mpi.network.activations import Bundle, differentiable, with_differentiable
from apts_mpi.tools.environment import random_state, set_random_state
from apts_mpi.tools.trees import map_tensors, tensors_of

Form = Callable[..., Any]

# Of functions of torch, each called with the function itself and its arguments; see `apts_mpi.curvature.closed_forms`.
FORMS: dict[Any, Form] = {}


class Carrying(torch.Tensor):
    """A tensor with its tangents, which functions of torch that have a form take along.

    It has no storage: what reaches torch's kernels past its functions fails, and so does a function without a form.

    Parameters
    ----------
    value : Tensor, shape (...)
        The point.
    tangents : Tensor, shape (m, ...)
        Along each column.
    columns : tuple of int
        Which columns these are, of different numbers; along all others it does not move.
    """

    value: torch.Tensor
    tangents: torch.Tensor
    columns: tuple[int, ...]

    @staticmethod
    def __new__(cls, value: torch.Tensor, tangents: torch.Tensor, columns: tuple[int, ...]) -> Carrying:
        """See the class."""
        if tangents.shape != (len(columns), *value.shape) or tangents.dtype != value.dtype:
            raise NotImplementedError("tangents of another shape or dtype")
        made = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        made.value, made.tangents, made.columns = value, tangents, columns
        return made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What torch calls in the place of its functions."""
        form = FORMS.get(function)
        if form is None:
            raise NotImplementedError(f"{function} has no closed form")
        return form(function, *args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What torch calls in the place of its kernels."""
        raise NotImplementedError(f"{function} would lose the tangents")


class CarriedSegments:
    """Runs segments by closed forms, those in which all is known.

    At its first tangents that are finite and not zero a segment is compared with its backward pass, and one that
    differs, or calls a function without a form, is not tried again.
    """

    def __init__(self) -> None:
        self._known: dict[int, bool] = {}

    def run(
        self, index: int, segment: nn.Module, activations: Bundle, parameters: dict[str, Carrying]
    ) -> Bundle | None:
        """What a segment returns, with tangents where it moves; None without closed forms.

        Parameters
        ----------
        index
            Of the segment.
        segment
            The module.
        activations
            What it is given, `Carrying` where that moves.
        parameters
            Its parameters that move, by name.
        """
        # A function that calls the network may differentiate it, which no tangents can be carried through.
        if not self._known.get(index, True) or getattr(segment, "may_differentiate", False):
            return None
        state = random_state(_device(activations))
        try:
            outputs = functional_call(segment, dict(parameters), (activations,)) if parameters else segment(activations)
            known = self._known.get(index) or _agrees(segment, activations, parameters, outputs, state)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # if for another reason, it comes again
            known = False
        if known is not None:
            self._known[index] = known
        if not known:
            set_random_state(state, _device(activations))
        return outputs if known else None


def _device(bundle: Bundle) -> torch.device:
    return tensors_of(bundle)[0].device


def _agrees(
    segment: nn.Module, activations: Bundle, parameters: dict[str, Carrying], outputs: Bundle, state: Any
) -> bool | None:
    """See `holds`, for what a segment has returned where the random state was ``state``."""
    plain = map_tensors(value_of, activations)
    entering = differentiable(activations)

    def run(values: Sequence[torch.Tensor]) -> Bundle:
        given = with_differentiable(plain, values[: len(entering)])
        return functional_call(segment, dict(zip(parameters, values[len(entering) :], strict=True)), (given,))

    moving = [*entering, *parameters.values()]
    after = random_state(_device(activations))
    set_random_state(state, _device(activations))
    columns = columns_of(moving)
    tangents = [[along(tensor, columns) for tensor in tensors] for tensors in (moving, differentiable(outputs))]
    found = holds(run, [value_of(tensor) for tensor in moving], *tangents)
    set_random_state(after, _device(activations))
    return found


def plain(*given: Any) -> None:
    """Raise if there are tangents among arguments that a form has none for."""
    for value in given:
        if isinstance(value, Carrying) or (isinstance(value, tuple | list) and any(map(_is_carrying, value))):
            raise NotImplementedError("tangents of another argument")


def _is_carrying(value: Any) -> bool:
    return isinstance(value, Carrying)


def only_first(given: Any, *others: Any) -> Carrying:
    """The first argument, which alone may have tangents."""
    plain(*others)
    if not isinstance(given, Carrying):
        raise NotImplementedError("tangents of another argument")
    return given


def value_of(given: Any) -> Any:
    """A tensor without its tangents; anything else as it is."""
    return given.value if isinstance(given, Carrying) else given


def united(value: torch.Tensor, parts: Sequence[tuple[torch.Tensor, tuple[int, ...]]]) -> torch.Tensor:
    """``value`` with the sum of tangents, each with its columns."""
    (tangents, columns), *others = parts
    for more, moving in others:
        tangents, columns = _sum(tangents, columns, more, moving)
    return Carrying(value, tangents, columns)


def _sum(
    tangents: torch.Tensor, columns: tuple[int, ...], more: torch.Tensor, moving: tuple[int, ...]
) -> tuple[torch.Tensor, tuple[int, ...]]:
    if moving == columns:
        return tangents + more, columns
    fresh = [place for place, number in enumerate(moving) if number not in columns]
    # Indexed by a list, torch would copy the list to the device, and wait.
    new = [more] if len(fresh) == len(moving) else [more[place : place + 1] for place in fresh]
    joint = torch.cat([tangents, *new])
    for place, number in enumerate(moving):
        if number in columns:
            joint[columns.index(number)] += more[place]
    return joint, columns + tuple(moving[place] for place in fresh)


def columns_of(tensors: Iterable[torch.Tensor]) -> tuple[int, ...]:
    """The columns along which some of the tensors move."""
    return tuple(dict.fromkeys(number for tensor in tensors for number in getattr(tensor, "columns", ())))


def along(tensor: torch.Tensor, columns: tuple[int, ...]) -> torch.Tensor:
    """Tangents of a tensor along all of some columns, zero where it does not move, shape (columns, ...)."""
    if not isinstance(tensor, Carrying):
        return tensor.new_zeros(len(columns), *tensor.shape)
    if tensor.columns == columns:
        return tensor.tangents
    found = tensor.value.new_zeros(len(columns), *tensor.value.shape)
    for place, number in enumerate(columns):
        if number in tensor.columns:
            found[place] = tensor.tangents[tensor.columns.index(number)]
    return found


def holds(
    run: Callable[[Sequence[torch.Tensor]], Bundle],
    point: Sequence[torch.Tensor],
    directions: Sequence[torch.Tensor],
    found: Sequence[torch.Tensor],
) -> bool | None:
    """Whether tangents are those that the backward pass has: ``<J^T w, t> = <w, J t>`` up to rounding.

    Never where a backward pass is the user's, which need not be the derivative of what is computed.

    Parameters
    ----------
    run
        Function of tensors.
    point
        Its arguments.
    directions
        Tangents t of each argument, shape (columns, ...).
    found
        J t of each differentiable output, shape (columns, ...).

    Returns
    -------
    bool or None
        None where that cannot be told, of values that are not finite or zero.
    """
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in point]
        outputs = differentiable(run(leaves))
        if has_functions_of_users(outputs):
            return False
        weights = [waves_like(tensor) for tensor in outputs]
        pulled = transposed(outputs, leaves, weights)
    pairs = [*zip(directions, pulled, strict=True)], [*zip(found, weights, strict=True)]
    left, right = (
        torch.stack([t.flatten(1).double() @ w.flatten().double() for t, w in of_side]).sum(0) for of_side in pairs
    )
    size = sum(float(t.double().norm()) * float(w.double().norm()) for of_side in pairs for t, w in of_side)
    difference = float((left - right).norm())
    if not 0.0 < size < float("inf"):
        return None
    return difference <= torch.finfo(found[0].dtype).eps ** 0.5 * size
