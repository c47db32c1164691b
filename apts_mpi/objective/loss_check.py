"""Whether a loss is what the method minimises, seen on a few samples: a mean over them, with a gradient, and one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from apts_mpi.errors import InvalidInput, SharedInvalidInput
from apts_mpi.network.partition import split
from apts_mpi.objective.batch import Batch
from apts_mpi.objective.mean_loss import FAULTS, FEWEST, MeanLoss, has_rows, rows_of
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Loss
from apts_mpi.objective.repeatable import Value, check_repeated, check_same_loss, value_of
from apts_mpi.objective.same_batch import check_same_batch
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.environment import kept_generators, random_state
from apts_mpi.tools.trees import Tree, count_samples, device_of, map_tensors, take, tensors_of

# Samples that are tried: no more than a pass has, for whose activations there is memory, unless that is very few.
MOST = 64

# Relative error of counts that are sums of weights in single precision.
COUNT_ERROR = 1e-5

# Draws samples and random numbers that are the same on all ranks; no rank has this number.
SHARED = 1 << 30


def check_objective(objective: Objective, batch: Batch, comm: Communicator, whole: bool, doubted: bool = False) -> None:
    """Try the loss on a few samples at the present parameters, and leave no trace. Collective.

    It has to be a mean over the samples and the same the second time. Of a batch that every rank was given as a whole,
    samples and loss have to be the same on all ranks.

    Parameters
    ----------
    objective
        The network and its loss.
    batch
        The samples.
    comm
        The ranks.
    whole
        Whether every rank was given the whole batch.
    doubted
        See `check_repeated`.

    Raises
    ------
    SharedInvalidInput
        On every rank, see `check_loss`.
    """
    inputs, targets = batch.samples
    assert inputs is not None and targets is not None  # as the batch was cut
    part, device, rows = batch.passes[0].micro_batches()[0], device_of(inputs), batch.rows
    if whole:
        check_same_batch({"inputs": inputs, "targets": targets}, rows, comm)
    group, loss = part.group, objective.loss
    few = some_rows(count_samples(inputs), rows, part.samples, comm.rank, group)
    with comm.shared_refusals(), kept_generators(device), objective.replayed(), torch.enable_grad():
        sample = replace(part, inputs=take(inputs, few), targets=take(targets, few))
        outputs, _ = objective.run_segments(sample, sample.inputs, cached=False)
        loss.is_compared = check_loss(loss.evaluate, outputs, sample.targets, loss.group)
        loss.term(outputs, sample.targets)
    agree_on_kind(loss, comm)
    if whole:
        few = some_rows(count_samples(inputs), rows, min(comm.collect(part.samples)), SHARED, group)
    sample = replace(part, inputs=take(inputs, few), targets=take(targets, few), stream=(SHARED,))
    draws = False

    def evaluate() -> Value:
        nonlocal draws
        with objective.replayed(sample.stream), torch.enable_grad():
            before = random_state(device)
            outputs, _ = objective.run_segments(sample, sample.inputs, cached=False)
            loss = objective.loss(outputs, sample.targets)
            draws = not torch.equal(before, random_state(device))
        return value_of(loss, outputs)

    value = check_repeated(evaluate, device, comm, doubted)
    if whole:
        check_same_loss(value, draws, device, comm, objective.epsilon)


def agree_on_kind(loss: MeanLoss, comm: Communicator) -> None:
    """Have all ranks know whether the loss returns (sum, count), those too that have none. Collective.

    Raises
    ------
    SharedInvalidInput
        If it does on some of the ranks that have it alone.
    """
    own = [loss.is_pair is False, loss.is_pair is True]
    single, pair = comm.agree(own, lambda table: table.max(axis=0).tolist())
    if single and pair:
        raise SharedInvalidInput(FAULTS[2])
    loss.is_pair = bool(pair)


def some_rows(count: int, rows: torch.Tensor | None, samples: int, key: int, group: int = 1) -> torch.Tensor:
    """Some of the rows of a batch: as many as a pass of so many samples can have, drawn with ``key``, whole groups."""
    total = (count if rows is None else len(rows)) // group
    # Drawn, as neighbours, or every n-th one, may be of one class.
    order = torch.randperm(total, generator=torch.Generator().manual_seed(key))
    few = order[: max(1, min(MOST, max(samples, FEWEST)) // group)]
    if group > 1:
        few = (few[:, None] * group + torch.arange(group)).flatten()
    return few if rows is None else rows[few.to(rows.device)]


def check_loss(loss: Loss, outputs: Any, targets: Tree, group: int | None = 1) -> bool:
    """Compare the loss of some samples with the mean of the losses of parts of them, in value and in gradient.

    The gradient shows what equal losses hide, such as those of a network whose last layer is zero. Not compared is a
    loss that is not finite or draws random numbers, or one of outputs that do not have the samples in the first
    dimension.

    Parameters
    ----------
    loss
        Function of (outputs, targets).
    outputs
        What the network returned for the samples, with its graph.
    targets
        Of the samples.

    group
        Number of consecutive samples that belong together; None: all, and nothing is compared.

    Returns
    -------
    bool
        Whether it was compared.

    Raises
    ------
    InvalidInput
        If the loss is not a floating-point tensor of shape (), or a pair of one and a count, has no gradient, or is not
        the mean over the samples.
    """
    found = loss(outputs, targets)
    whole, total = _parts_of(found)
    _check_kind(whole)
    is_pair, count = isinstance(found, tuple), count_samples(targets)
    if is_pair:
        _check_count(total)
        _check_constant(loss, outputs, targets, total)
    points = [tensor for tensor in tensors_of(outputs) if tensor.requires_grad and tensor.numel()]
    if group is None or count < max(FEWEST, 2 * group) or not any(has_rows(point, count) for point in points):
        return False
    if not torch.isfinite(whole) or not torch.equal(whole, _parts_of(loss(outputs, targets))[0]):
        return False  # it may draw random numbers
    # Never single samples: a loss may use squeeze().
    groups = count // group
    for number in {2, max(2, min(groups, count // 2))}:
        terms, counts = _terms(loss, outputs, targets, number, group)
        mean, difference = terms.detach().sum(), _difference(whole, terms, points)
        if not difference and is_pair and abs(counts - float(total)) > COUNT_ERROR * abs(float(total)):
            difference = "counts"
        if difference:
            _refuse(outputs, targets, whole, mean, number, difference, is_pair)
    return True


def _parts_of(found: Any) -> tuple[Any, Any]:
    """The sum, or mean, and the count of what a loss returned."""
    if isinstance(found, tuple) and len(found) == 2:
        return found
    return found, None


def _refuse(
    outputs: Any,
    targets: Tree,
    whole: torch.Tensor,
    mean: torch.Tensor,
    number: int,
    difference: str,
    is_pair: bool,
) -> None:
    """Raise `InvalidInput` for a loss that is not what its parts make it."""
    tensors = isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)
    if tensors and (together := _broadcast(outputs.shape, targets.shape)):
        raise InvalidInput(
            f"loss: outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)} are broadcast "
            f"to {together}, each output with the targets of all samples; give both one shape, such as "
            + ("targets[:, None]" if outputs.dim() > targets.dim() else "outputs[:, None]")
        )
    count = count_samples(targets)
    what, reason = "the mean over the samples", "reduction='sum', or samples that are taken together"
    as_parts, remedy = (
        f"as the mean over {number} parts of them",
        (
            "give the mean of one number a sample, the pair (sum, count), as apts_mpi.losses do, or the option "
            "group_size or coupled for samples that belong together"
        ),
    )
    if is_pair:
        what, reason = "a sum over the samples with its count", "a mean, or samples that are taken together"
        as_parts = f"as the sum over {number} parts of them"
    raise InvalidInput(
        f"loss: it is not {what} (class weights, ignore_index, {reason}?): {float(whole.detach()):.6g} for {count} "
        f"samples, {float(mean):.6g} {as_parts}, which differ in their {difference}; {remedy}"
    )


def _broadcast(outputs: torch.Size, targets: torch.Size) -> tuple[int, ...]:
    """The shape to which outputs and targets are broadcast where samples meet those of others; empty: nowhere."""
    count = outputs[0]
    if len(outputs) == len(targets) or targets[0] != count:
        return ()
    try:
        together = tuple(torch.broadcast_shapes(outputs, targets))
    except RuntimeError:
        return ()
    return together if together.count(count) > max(tuple(outputs).count(count), tuple(targets).count(count)) else ()


def _check_count(count: Any) -> None:
    """Raise `InvalidInput` unless a sum may be divided by it."""
    remedy = "the second of the pair is what the sum is divided by: a number of 0 or more, the same for all parameters"
    if isinstance(count, torch.Tensor):
        if count.numel() != 1 or count.is_complex():
            raise InvalidInput(f"loss: it counts with a tensor of {count.dtype}, shape {tuple(count.shape)}; {remedy}")
        if count.requires_grad:
            raise InvalidInput(f"loss: its count has a gradient with respect to the parameters; {remedy}")
    elif not isinstance(count, float | int):
        raise InvalidInput(f"loss: it counts with {type(count).__name__} {count!r:.60}; {remedy}")
    if not 0.0 <= float(count) < math.inf:
        raise InvalidInput(f"loss: it counts {float(count):.6g}; {remedy}")


@torch.no_grad()
def _check_constant(loss: Loss, outputs: Any, targets: Tree, count: Any) -> None:
    """Raise `InvalidInput` for a count that moves with the outputs."""
    moved = map_tensors(lambda leaf: leaf.detach() * -0.5 + 0.25 if leaf.is_floating_point() else leaf, outputs)
    with torch.enable_grad():
        moved = map_tensors(lambda leaf: leaf.requires_grad_(leaf.is_floating_point()), moved)
        other = float(_parts_of(loss(moved, targets))[1])
    if abs(other - float(count)) > COUNT_ERROR * abs(float(count)):
        raise InvalidInput(
            f"loss: its count is {float(count):.6g} for some outputs and {other:.6g} for others; the second of the "
            "pair has to be the same for all parameters: count by the targets"
        )


def _check_kind(value: Any) -> None:
    remedy = "return the mean over the samples, a floating-point tensor of shape (), or the pair (sum, count)"
    if not isinstance(value, torch.Tensor):
        raise InvalidInput(f"loss: it returns {type(value).__name__} {value!r:.60}; {remedy}")
    if value.shape != () or not value.is_floating_point():
        raise InvalidInput(f"loss: it returns a tensor of {value.dtype} with shape {tuple(value.shape)}; {remedy}")
    if not value.requires_grad:
        raise InvalidInput(
            "loss: it has no gradient with respect to the parameters; leave out what loses it in the loss or the "
            "network (detach, no_grad, item, argmax)"
        )


def _terms(loss: Loss, outputs: Any, targets: Tree, number: int, group: int) -> tuple[torch.Tensor, float]:
    """The losses of ``number`` parts of the samples, each times its share of them; or the sums, and all counts."""
    samples = count_samples(targets)
    terms, counts = [], 0.0
    for start, stop in (split(samples // group, number, index) for index in range(number)):
        place = slice(start * group, stop * group)
        value, count = _parts_of(loss(rows_of(outputs, samples, place), take(targets, place)))
        terms.append(value * ((stop - start) * group / samples) if count is None else value)
        counts += 0.0 if count is None else float(count)
    return torch.stack(terms), counts


def _difference(whole: torch.Tensor, terms: torch.Tensor, points: Sequence[torch.Tensor]) -> str:
    """In what a loss and the sum of ``terms`` differ by more than rounding, as functions of ``points``; empty: none."""
    # Terms may cancel, and a loss may be small between outputs that are large.
    epsilon = max(torch.finfo(tensor.dtype).eps for tensor in (whole, *points))
    floor = epsilon * max(float(point.detach().abs().max()) for point in points)
    tolerance = epsilon**0.5 * float(terms.detach().abs().sum()) + floor
    if not abs(float(whole.detach()) - float(terms.detach().sum())) <= tolerance:
        return "values"
    for one, other in zip(_slopes(whole, points), _slopes(terms.sum(), points), strict=True):
        largest = float(one.abs().max())
        if math.isfinite(largest) and not float((one - other).abs().max()) <= epsilon**0.5 * largest + floor:
            return "gradients"
    return ""


def _slopes(value: torch.Tensor, points: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    if not value.requires_grad:
        return tuple(map(torch.zeros_like, points))
    return torch.autograd.grad(value, points, retain_graph=True, allow_unused=True, materialize_grads=True)
