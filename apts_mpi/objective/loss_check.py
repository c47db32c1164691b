"""Whether a loss is what the method minimises, seen on a few samples: a mean over them, with a gradient, and one."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from apts_mpi.data import Half
from apts_mpi.errors import InvalidInput
from apts_mpi.network.partition import split
from apts_mpi.objective.batch import Batch
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Loss
from apts_mpi.objective.repeatable import Value, check_repeated, check_same_loss, value_of
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.sameness import check_same_tensors
from apts_mpi.tools.environment import kept_generators, random_state

# Samples that are tried: no more than a pass has, for whose activations there is memory, unless that is very few.
MOST, FEWEST = 64, 4

# Draws samples and random numbers that are the same on all ranks; no rank has this number.
SHARED = 1 << 30


def check_objective(objective: Objective, batch: Batch, comm: Communicator, whole: bool) -> None:
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

    Raises
    ------
    SharedInvalidInput
        On every rank, see `check_loss`.
    """
    inputs, targets = batch.samples
    assert inputs is not None and targets is not None  # as the batch was cut
    part, device, rows = batch.passes[0], inputs.device, batch.rows
    if whole:
        check_same_batch({"inputs": inputs, "targets": targets}, rows, comm)
    few = some_rows(len(inputs), rows, part.samples, comm.rank)
    with comm.shared_refusals(), kept_generators(device), objective.replayed(), torch.enable_grad():
        sample = replace(part, inputs=inputs[few], targets=targets[few])
        outputs, _ = objective.run_segments(sample, sample.inputs, cached=False)
        check_loss(objective.loss, outputs, sample.targets)
    if whole:
        few = some_rows(len(inputs), rows, min(comm.collect(part.samples)), SHARED)
    sample = replace(part, inputs=inputs[few], targets=targets[few], stream=(SHARED,))
    draws = False

    def evaluate() -> Value:
        nonlocal draws
        with objective.replayed(sample.stream), torch.enable_grad():
            before = random_state(device)
            outputs, _ = objective.run_segments(sample, sample.inputs, cached=False)
            loss = objective.loss(outputs, sample.targets)
            draws = not torch.equal(before, random_state(device))
        return value_of(loss, outputs)

    value = check_repeated(evaluate, device, comm)
    if whole:
        check_same_loss(value, draws, device, comm, objective.epsilon)


def check_same_batch(own: Mapping[str, torch.Tensor | Half], rows: torch.Tensor | None, comm: Communicator) -> None:
    """See that all ranks were given the same batch, as far as each was given it. Collective.

    Raises
    ------
    SharedInvalidInput
        Naming the first rank that was given another one.
    """
    remedy = "give all ranks the same, or choose batch shard and give each its own"
    # Of what is read as it is needed no rank has all; a loss of the same samples tells later.
    held = {name: (data, rows) for name, data in own.items() if isinstance(data, torch.Tensor)}
    check_same_tensors(held, comm, "batch", remedy)


def some_rows(count: int, rows: torch.Tensor | None, samples: int, key: int) -> torch.Tensor:
    """Some of the rows of a batch: as many as a pass of so many samples can have, drawn with ``key``."""
    total = count if rows is None else len(rows)
    # Drawn, as neighbours, or every n-th one, may be of one class.
    order = torch.randperm(total, generator=torch.Generator().manual_seed(key))
    few = order[: min(MOST, max(samples, FEWEST))]
    return few if rows is None else rows[few.to(rows.device)]


def check_loss(loss: Loss, outputs: Any, targets: torch.Tensor) -> None:
    """Compare the loss of some samples with the mean of the losses of parts of them, in value and in gradient.

    The gradient shows what equal losses hide, such as those of a network whose last layer is zero. Not compared is a
    loss that is not finite or draws random numbers, or one of outputs that do not have the samples in the first
    dimension.

    Parameters
    ----------
    loss
        Function of (outputs, targets).
    outputs
        What the network returned for the samples, with its graph: a tensor, or nested lists, tuples and dictionaries.
    targets
        Of the samples.

    Raises
    ------
    InvalidInput
        If the loss is not a floating-point tensor of shape (), has no gradient, or is not the mean over the samples.
    """
    whole = loss(outputs, targets)
    _check_kind(whole)
    count = len(targets)
    points = [
        leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.numel()
    ]
    if count < FEWEST or not any(_has_rows(point, count) for point in points) or not torch.isfinite(whole):
        return
    if not torch.equal(whole, loss(outputs, targets)):  # it draws random numbers
        return
    # Never single samples: a loss may use squeeze().
    for number in {2, count // 2}:
        terms = _terms(loss, outputs, targets, number)
        mean, difference = terms.detach().sum(), _difference(whole, terms, points)
        if difference:
            raise InvalidInput(
                "loss: it is not the mean over the samples (class weights, ignore_index or reduction='sum'?): "
                f"{float(whole.detach()):.6g} for {count} samples, {float(mean):.6g} as the mean over {number} parts "
                f"of them, which differ in their {difference}; give the mean of one number a sample, such as "
                "(weights[targets] * cross_entropy(outputs, targets, reduction='none')).mean()"
            )


def _check_kind(value: Any) -> None:
    remedy = "return the mean over the samples, a floating-point tensor of shape ()"
    if not isinstance(value, torch.Tensor):
        raise InvalidInput(f"loss: it returns {type(value).__name__} {value!r:.60}; {remedy}")
    if value.shape != () or not value.is_floating_point():
        raise InvalidInput(f"loss: it returns a tensor of {value.dtype} with shape {tuple(value.shape)}; {remedy}")
    if not value.requires_grad:
        raise InvalidInput(
            "loss: it has no gradient with respect to the parameters; leave out what loses it in the loss or the "
            "network (detach, no_grad, item, argmax)"
        )


def _terms(loss: Loss, outputs: Any, targets: torch.Tensor, number: int) -> torch.Tensor:
    """The losses of ``number`` parts of the samples, each times its share of them."""
    count = len(targets)
    terms = []
    for start, stop in (split(count, number, index) for index in range(number)):
        rows = functools.partial(_rows, count, slice(start, stop))
        part = loss(tree_map_only(torch.Tensor, rows, outputs), targets[start:stop])
        terms.append(part * ((stop - start) / count))
    return torch.stack(terms)


def _has_rows(tensor: torch.Tensor, count: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == count


def _rows(count: int, place: slice, tensor: torch.Tensor) -> torch.Tensor:
    return tensor[place] if _has_rows(tensor, count) else tensor


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
