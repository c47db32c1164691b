"""The Hessian of the loss with respect to the outputs: its products with tangents, and its roots, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from apts_mpi.curvature.differences import by_differences, check_close
from apts_mpi.curvature.transposes import has_functions_of_users
from apts_mpi.errors import InvalidInput, lacks_memory
from apts_mpi.network.activations import Bundle, at_point, detached, differentiable, with_differentiable
from apts_mpi.objective.passes import Mean
from apts_mpi.tools.trees import Tree, count_samples

# What is said where outputs cannot be differentiated.
WITHOUT_ROWS = (
    "local.solver: 'gauss-newton' cannot be used: it differentiates each output by all parameters",
    "choose kfac or another one",
)


def curved(
    loss: Mean,
    outputs: Bundle,
    targets: Tree,
    tangents: Sequence[torch.Tensor],
    differs: Callable[[Exception], None],
) -> Sequence[torch.Tensor | None]:
    """The Hessian times each tangent, by differentiating the gradient of the loss alone, or by differences of it.

    It is that of all outputs together: a loss may multiply one with another.

    Parameters
    ----------
    loss
        Function of (outputs, targets).
    outputs, targets
        Of some samples.
    tangents
        Of each differentiable output, shape (m, ...).
    differs
        Called with the error of a loss that has no second derivatives, before differences are taken.

    Returns
    -------
    sequence of Tensor or None
        In the shapes of the tangents; None stands for zeros.
    """

    def slopes_at(values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            point, variables = at_point(with_differentiable(outputs, values))
            return torch.autograd.grad(loss(point, targets), variables, materialize_grads=True)

    def by_difference() -> Sequence[torch.Tensor]:
        return by_differences(slopes_at, [value.detach() for value in differentiable(outputs)], tangents)[1]

    with torch.enable_grad():
        point, variables = at_point(outputs)
        value = loss(point, targets)
        try:
            found = _by_second_derivatives(value, variables, tangents)
            if has_functions_of_users([loss(point, targets)]):
                for own, other in zip(found, by_difference(), strict=True):
                    check_close(torch.zeros_like(other) if own is None else own, other)
            return found
        except (RuntimeError, NotImplementedError) as error:
            if lacks_memory(error):
                raise
            differs(error)
    return by_difference()


def _by_second_derivatives(
    value: torch.Tensor, variables: Sequence[torch.Tensor], tangents: Sequence[torch.Tensor]
) -> Sequence[torch.Tensor | None]:
    """The Hessian of ``value`` by variables times each of their tangents together; None stands for zeros."""
    slopes = torch.autograd.grad(value, variables, create_graph=True, allow_unused=True)
    # Without the outputs that the loss does not read, and those in which it is linear.
    pairs = [pair for pair in zip(slopes, tangents, strict=True) if pair[0] is not None and pair[0].requires_grad]
    if not pairs:
        return [None] * len(variables)
    bent, along_them = zip(*pairs, strict=True)
    return torch.autograd.grad(bent, variables, along_them, is_grads_batched=True, allow_unused=True)


def read_outputs(loss: Mean, outputs: Bundle, targets: Tree) -> list[int]:
    """Places, among the differentiable outputs, of those with samples in their first dimension that the loss reads.

    Of all with samples where it reads none of them.

    Raises
    ------
    InvalidInput
        If the loss is curved in one without samples, such as tokens of all samples in one dimension.
    """
    samples = count_samples(targets)
    with torch.enable_grad():
        point, variables = at_point(outputs)
        value = loss(point, targets)
        slopes = torch.autograd.grad(value, variables, create_graph=True, allow_unused=True)
    counted, read = [], []
    for place, (tensor, slope) in enumerate(zip(variables, slopes, strict=True)):
        if tensor.dim() and len(tensor) == samples:
            counted.append(place)
            read += [] if slope is None else [place]
        elif slope is not None and slope.requires_grad:
            raise InvalidInput(
                f"{WITHOUT_ROWS[0]}, and the loss of {samples} samples reads an output of shape {tuple(tensor.shape)}; "
                f"{WITHOUT_ROWS[1]}"
            )
    return read or counted


def side_by_side(outputs: Bundle, places: Sequence[int]) -> torch.Tensor:
    """Some of the differentiable outputs as one tensor of shape (samples, o)."""
    tensors = differentiable(outputs)
    return torch.cat([tensors[place].reshape(len(tensors[place]), -1) for place in places], dim=1)


@dataclass(frozen=True)
class AtOutputs:
    """The quadratic model of the mean loss around the outputs of some samples, those that the loss reads.

    Attributes
    ----------
    places : sequence of int
        Of these outputs, see `read_outputs`.
    values : Tensor, shape (samples, o)
        The outputs.
    roots : Tensor, shape (samples, o, o)
        Square roots of each sample's Hessian of the mean loss.
    residuals : Tensor, shape (samples, o)
        What the roots take to the gradient, as far as it is in their range: the loss falls as half of the square of
        the residuals does.
    is_complete : bool
        Whether the gradient is in their range: it is not of a loss that is linear in an output.
    """

    places: Sequence[int]
    values: torch.Tensor
    roots: torch.Tensor
    residuals: torch.Tensor
    is_complete: bool


def roots(loss: Mean, outputs: Bundle, targets: Tree, places: Sequence[int] = (0,)) -> torch.Tensor:
    """Square roots of each sample's Hessian of the mean loss with respect to its outputs, shape (samples, o, o).

    The outputs of a sample are those in some ``places``, side by side.
    """
    return at_outputs(loss, outputs, targets, places).roots


def at_outputs(loss: Mean, outputs: Bundle, targets: Tree, places: Sequence[int] = (0,)) -> AtOutputs:
    """The quadratic model of the mean loss at the outputs in some ``places``, side by side."""
    hessians, slopes = _derivatives(loss, outputs, targets, places)
    # What is not finite leads to a rejected step; it has no eigenvalues.
    hessians, slopes = (part.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for part in (hessians, slopes))
    values, vectors = torch.linalg.eigh(hessians)
    # A loss that is not convex in the outputs has negative curvature there, which is left out. The symmetric root:
    # it is unique, so that rows of different ranks belong together.
    scales = values.clamp_min(0.0).sqrt()
    found = (vectors * scales[:, None, :]) @ vectors.transpose(1, 2)
    epsilon = torch.finfo(values.dtype).eps
    least = len(scales.T) * epsilon * values.amax(dim=1, keepdim=True)
    along = (vectors.transpose(1, 2) @ slopes[:, :, None]).squeeze(2)
    known = (values > 0.0) & (values >= least)
    residuals = torch.where(known, along / torch.where(known, scales, 1.0), 0.0)
    left = torch.where(known, 0.0, along).norm(dim=1) > epsilon**0.5 * along.norm(dim=1)
    residuals = (vectors @ residuals[:, :, None]).squeeze(2)
    side = side_by_side(detached(outputs), places)
    return AtOutputs(places, side, found, residuals, not bool(left.any()))


def _derivatives(
    loss: Mean, outputs: Bundle, targets: Tree, places: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sample's Hessian of the mean loss by its outputs, (samples, o, o), and gradient, (samples, o)."""
    tensors = differentiable(outputs)
    start = side_by_side(detached(outputs), places)
    samples, size = start.shape
    units = torch.eye(size, dtype=start.dtype, device=start.device)
    directions = units[:, None].expand(size, samples, size)

    def value_at(point: torch.Tensor) -> torch.Tensor:
        parts = point.split([tensors[place][0].numel() for place in places], dim=1)
        shaped = {place: part.view_as(tensors[place]) for place, part in zip(places, parts, strict=True)}
        given = [shaped.get(place, tensor) for place, tensor in enumerate(tensors)]
        return loss(with_differentiable(outputs, given), targets)

    def slope_at(points: Sequence[torch.Tensor]) -> torch.Tensor:
        with torch.enable_grad():
            point = points[0].detach().requires_grad_()
            return torch.autograd.grad(value_at(point), point)[0]

    curved, slopes = None, torch.zeros_like(start)
    with torch.enable_grad():
        point = start.requires_grad_()
        value = value_at(point)
        try:
            if value.requires_grad:  # not of a loss that reads none of them
                (slope,) = torch.autograd.grad(value, point, create_graph=True)
                slopes = slope.detach()
                if slope.requires_grad:
                    (curved,) = torch.autograd.grad(slope, point, directions, is_grads_batched=True, allow_unused=True)
                if has_functions_of_users([value_at(point)]):
                    known = torch.zeros_like(directions) if curved is None else curved
                    check_close(known, by_differences(slope_at, [point.detach()], [directions])[1][0])
        except (RuntimeError, NotImplementedError) as error:  # if for another reason, it comes again
            if lacks_memory(error):
                raise
            curved, slopes = by_differences(slope_at, [point.detach()], [directions])[1][0], slope_at([point])
    if curved is None:  # a loss linear in the outputs
        return point.new_zeros(samples, size, size), slopes
    return curved.transpose(0, 1), slopes


def joined(parts: Sequence[AtOutputs], shares: Sequence[float]) -> AtOutputs:
    """That of micro-batches one after the other, as shares of one mean."""
    roots, residuals = (
        torch.cat([getattr(part, name) * share**0.5 for part, share in zip(parts, shares, strict=True)])
        for name in ("roots", "residuals")
    )
    values, complete = torch.cat([part.values for part in parts]), all(part.is_complete for part in parts)
    return AtOutputs(parts[0].places, values, roots, residuals, complete)
