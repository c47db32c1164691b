"""What optimizers keep from one step to the next: taken out for a checkpoint, known for what it is, and put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from apts_mpi.tools.schema import (
    Check,
    allow,
    any_number,
    each,
    nothing_or,
    number,
    record,
    sequence,
    whole,
)

# Gives the check of an array of a shape: of the parameters' dtype, or of any.
ArrayCheck = Callable[[tuple[int, ...]], Check]

# Vectors that L-BFGS keeps of its past, as torch has it.
PAST = 100


@dataclass(frozen=True)
class Arrays:
    """Checks of arrays in a file.

    Attributes
    ----------
    typed, free
        Of the type of the parameters, and of any type.
    """

    typed: ArrayCheck
    free: ArrayCheck


class Kept(Protocol):
    """What an optimizer keeps."""

    def take(self, optimizer: Optimizer) -> Any:
        """It, in lists and objects with names, with tensors in them."""

    def check(self, optimizer: Optimizer, arrays: Arrays) -> Check:
        """Whether something is what `take` gives, with names of arrays in the places of tensors."""

    def put(self, optimizer: Optimizer, kept: Any) -> None:
        """Give it back."""


@dataclass(frozen=True)
class OfVector:
    """Of an optimizer of torch for one parameter, all whose memory is that parameter's.

    Attributes
    ----------
    known
        The check of it, by those of a vector of the parameters and of a tensor of shape ().
    """

    known: Callable[[Check, Check], Check]

    def take(self, optimizer: Optimizer) -> Any:
        """See `Kept`; None before the first step."""
        return optimizer.state_dict()["state"].get(0)

    def check(self, optimizer: Optimizer, arrays: Arrays) -> Check:
        """See `Kept`."""
        (parameter,) = (parameter for parameter, _ in parameters_of(optimizer))
        return nothing_or(self.known(arrays.typed(tuple(parameter.shape)), arrays.free(())))

    def put(self, optimizer: Optimizer, kept: Any) -> None:
        """See `Kept`."""
        if kept is not None:
            optimizer.load_state_dict(optimizer.state_dict() | {"state": {0: kept}})


@dataclass(frozen=True)
class OfGroups:
    """Of an optimizer that keeps something of each parameter, and numbers of each group of them.

    Attributes
    ----------
    of_parameter
        The check of what is kept of a parameter in a group.
    always, later
        Checks of the group's numbers, and of those that are there once a step was made.
    """

    of_parameter: Callable[[torch.Tensor, Mapping[str, Any], Arrays], Check]
    always: Mapping[str, Check]
    later: Callable[[Arrays], Mapping[str, Check]]

    def take(self, optimizer: Optimizer) -> Any:
        """See `Kept`."""
        of_parameters = [
            dict(optimizer.state.get(parameter) or {}) or None for parameter, _ in parameters_of(optimizer)
        ]
        # The names alone matter here.
        names = [*self.always, *self.later(Arrays(lambda shape: whole(), lambda shape: whole()))]
        groups = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
        return {"parameters": of_parameters, "groups": groups}

    def check(self, optimizer: Optimizer, arrays: Arrays) -> Check:
        """See `Kept`."""
        of_parameters = [
            nothing_or(self.of_parameter(parameter, group, arrays)) for parameter, group in parameters_of(optimizer)
        ]
        group = record(self.always, self.later(arrays))
        return record({"parameters": each(of_parameters), "groups": each([group] * len(optimizer.param_groups))})

    def put(self, optimizer: Optimizer, kept: Any) -> None:
        """See `Kept`."""
        for (parameter, _), found in zip(parameters_of(optimizer), kept["parameters"], strict=True):
            if found is not None:
                optimizer.state[parameter] = found
        for group, found in zip(optimizer.param_groups, kept["groups"], strict=True):
            group.update(found)


def parameters_of(optimizer: Optimizer) -> Iterator[tuple[torch.Tensor, Mapping[str, Any]]]:
    """Each parameter of an optimizer with its group."""
    return ((parameter, group) for group in optimizer.param_groups for parameter in group["params"])


def of_shape(*names: str) -> Callable[[torch.Tensor, Mapping[str, Any], Arrays], Check]:
    """Tensors of the shape of a parameter, by these names."""
    return lambda parameter, group, arrays: record(dict.fromkeys(names, arrays.typed(tuple(parameter.shape))))


def of_muon(parameter: torch.Tensor, group: Mapping[str, Any], arrays: Arrays) -> Check:
    """Of a hidden matrix, or of another parameter."""
    names = ("momentum_buffer",) if group["use_muon"] else ("exp_avg", "exp_avg_sq")
    return of_shape(*names)(parameter, group, arrays)


def of_soap(parameter: torch.Tensor, group: Mapping[str, Any], arrays: Arrays) -> Check:
    """Moments, and for each dimension of what is no vector a matrix and its eigenvectors, where it is not too large."""

    def of_dimension(size: int) -> Check:
        has_matrix = parameter.dim() > 1 and size <= group["max_precondition_dim"]
        return arrays.typed((size, size)) if has_matrix else each([])

    matrices = each([of_dimension(size) for size in parameter.shape])
    moments = dict.fromkeys(("exp_avg", "exp_avg_sq"), arrays.typed(tuple(parameter.shape)))
    constants = {"precondition_frequency": whole(1), "shampoo_beta": number(0.0, 1.0)}
    return record({**moments, **constants, "GG": matrices, "Q": matrices})


@dataclass(frozen=True)
class OfSoap(OfGroups):
    """Of SOAP, whose eigenvectors lie column by column: products with others of the same values round otherwise."""

    def put(self, optimizer: Optimizer, kept: Any) -> None:
        """See `Kept`."""
        for found in filter(None, kept["parameters"]):
            found["Q"] = [matrix.mT.contiguous().mT if len(matrix) else matrix for matrix in found["Q"]]
        super().put(optimizer, kept)


def of_lbfgs(vector: Check, scalar: Check) -> Check:
    """What L-BFGS keeps: numbers may be tensors or none."""

    def tensor_or_number(value: Any, place: str) -> Any:
        return scalar(value, place) if isinstance(value, dict) else any_number(value, place)

    known = record(
        {
            **dict.fromkeys(("func_evals", "n_iter"), whole()),
            **dict.fromkeys(("d", "prev_flat_grad"), vector),
            **dict.fromkeys(("t", "H_diag", "prev_loss"), tensor_or_number),
            **dict.fromkeys(("old_dirs", "old_stps"), sequence(vector, PAST)),
            "ro": sequence(scalar, PAST),
        },
        {"al": sequence(nothing_or(scalar), PAST)},
    )

    def check(value: Any, place: str) -> dict[str, Any]:
        found: dict[str, Any] = known(value, place)
        counts = [len(found[name]) for name in ("old_dirs", "old_stps", "ro")]
        allow(len(set(counts)) == 1, f"{place}: numbers of old_dirs, old_stps and ro", counts, "one number")
        return found

    return check
