"""What a user has samples in, as tensors or as the halves of a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import h5py
import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
    default_convert,
)
from torch.utils.data.distributed import DistributedSampler

from apts_mpi.data.dataset import Collate, Mapped, Workers
from apts_mpi.data.half import TARGETS, Form, Half, Samples
from apts_mpi.data.hdf5 import FileRows
from apts_mpi.data.order import InOrder, InShards, Order, Sampled, SampledBatches, Shuffled
from apts_mpi.data.source import Arrays, MemoryRows, Rows, Source, as_tensor
from apts_mpi.data.streamed import Streamed
from apts_mpi.errors import InvalidInput
from apts_mpi.tools.trees import Tree, as_samples, map_leaves

ACCEPTED = (
    "give a tuple of tensors or arrays (inputs, targets), a data set of such pairs, or a torch.utils.data.DataLoader"
)

# What torch's loader is told for its workers, and what they are told here.
WORKER_SETTINGS = ("multiprocessing_context", "worker_init_fn", "prefetch_factor", "timeout")


@dataclass(frozen=True)
class Taken:
    """Samples as a problem has them.

    Attributes
    ----------
    pair : (Tensor or Half, Tensor or Half)
        Inputs and targets.
    order : Order, optional
        Which samples make the batches, where the user's loader says so.
    batch_size : int, optional
        The loader's.
    """

    pair: tuple[Any, Any]
    order: Order | None = None
    batch_size: int | None = None


def take_over(
    option: str,
    given: Any,
    dtype: torch.dtype,
    collate: Collate | None = None,
    prepare: Callable[[Any], Any] | None = None,
) -> Taken:
    """Tensors as they are, and halves of a source of all else.

    Parameters
    ----------
    option
        Which samples these are, for messages.
    given
        A pair of tensors, of numpy's or h5py's arrays, or of trees of tensors; a data set by number, a stream of
        samples, or a loader.
    dtype
        Of what is a floating-point number; tensors keep theirs.
    collate, prepare
        See `apts_mpi.problems.Problem`.

    Raises
    ------
    InvalidInput
        For anything else.
    """
    form = Form(dtype, prepare=prepare)
    if isinstance(given, tuple | list) and len(given) == 2 and all(is_array(part) for part in given):
        _refuse(option, collate is not None, "collate_fn", "it is for a data set; leave it out")
        return Taken(_pair_of(option, given, form))
    if isinstance(given, tuple) and len(given) == 2:
        _refuse(option, collate is not None, "collate_fn", "it is for a data set; leave it out")
        _refuse(option, prepare is not None, "prepare", "it is for arrays and data sets; let the network do it")
        inputs, targets = (_tree_of(option, place, part, form) for place, part in enumerate(given))
        return Taken((inputs, targets))
    if isinstance(given, DataLoader):
        _refuse(option, collate is not None, "collate_fn", "give it to the DataLoader")
        return _taken_from_loader(option, given, form)
    source: Source
    if isinstance(given, IterableDataset):
        source = Streamed(given, collate)
        return Taken(_halves(option, source, form), _order_of_stream(source))
    if _has_numbers(given):
        source = Mapped(given, collate)
    else:
        raise InvalidInput(f"{option}: {describe(given)} is not allowed; {ACCEPTED}")
    return Taken(_halves(option, source, form))


def describe(value: object) -> str:
    """A value by the types of its parts."""
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of ({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__


def _refuse(option: str, wrong: bool, what: str, remedy: str) -> None:
    if wrong:
        raise InvalidInput(f"{option}: it has a {what} of its own place; {remedy}")


def is_array(part: object) -> bool:
    """Whether it is inputs, or targets, of samples."""
    return isinstance(part, torch.Tensor | np.ndarray | h5py.Dataset | Half)


def is_tree(part: object) -> bool:
    """Whether it is a list, a mapping or a dataclass, in which there may be tensors; a tuple may be a pair as well."""
    return isinstance(part, list | Mapping) or (is_dataclass(part) and not isinstance(part, type))


def _has_numbers(given: object) -> bool:
    """Whether it has samples by number, as torch's data sets have; a mapping or a list of other things has not."""
    plain = isinstance(given, torch.Tensor | np.ndarray | h5py.Dataset | dict | list | tuple | str | bytes | Half)
    return not plain and hasattr(given, "__getitem__") and hasattr(given, "__len__")


def _pair_of(option: str, given: Any, form: Form) -> tuple[Any, Any]:
    """Tensors, and arrays in memory as tensors; halves where a part is in a file or has to be prepared."""
    stays = any(isinstance(part, h5py.Dataset | np.memmap) for part in given)
    if any(isinstance(part, Half) for part in given):
        return given[0], given[1]
    if not stays and form.prepare is None:
        return _in_memory(option, given[0], form, False), _in_memory(option, given[1], form, True)
    names = (f"{option} inputs", f"{option} targets")
    inputs, targets = (_rows_of(part) for part in given)
    return Samples(Arrays(inputs, targets, names), form).halves()


def _tree_of(option: str, place: int, part: Any, form: Form) -> Tree:
    """Tensors in tuples, lists, mappings or dataclasses."""
    names = "inputs", "targets"

    def in_memory(leaf: Any) -> Any:
        return _in_memory(option, leaf, form, place == TARGETS) if isinstance(leaf, np.ndarray) and leaf.ndim else leaf

    return as_samples(map_leaves(in_memory, part), f"{option} {names[place]}")


def _in_memory(option: str, part: Any, form: Form, are_targets: bool) -> torch.Tensor:
    if isinstance(part, torch.Tensor):
        return part
    if part.dtype.kind not in "biuf" or part.dtype.itemsize > 8:
        kind = "targets" if are_targets else "inputs"
        raise InvalidInput(f"{option} {kind}: numbers of type {part.dtype} are not allowed; give integers or floats")
    tensor = as_tensor(part)
    if tensor.is_floating_point():
        return tensor.to(form.dtype)
    return tensor.long() if are_targets and tensor.dtype != torch.bool else tensor


def _rows_of(part: Any) -> Rows:
    if isinstance(part, h5py.Dataset):
        return FileRows(part)
    return MemoryRows(part.detach().cpu().numpy() if isinstance(part, torch.Tensor) else part)


def _halves(option: str, source: Source, form: Form) -> tuple[Half, Half]:
    if len(source) == 0:
        raise InvalidInput(f"{option}: the data set has no samples; give at least one")
    return Samples(source, form).halves()


def _taken_from_loader(option: str, loader: DataLoader, form: Form) -> Taken:
    settings = {name: getattr(loader, name) for name in WORKER_SETTINGS} if loader.num_workers else {}
    workers = Workers(loader.num_workers, settings)
    if loader.batch_sampler is None:
        raise InvalidInput(
            f"{option}: the DataLoader makes no batches (batch_size=None); give it samples and a batch_size"
        )
    collate = None if loader.collate_fn is default_convert else loader.collate_fn
    if isinstance(loader.dataset, IterableDataset):
        stream = Streamed(loader.dataset, collate, workers)
        return Taken(_halves(option, stream, form), _order_of_stream(stream), loader.batch_size)
    pair = _held(loader, form) or _halves(option, Mapped(loader.dataset, collate, workers), form)
    batches: Any = loader.batch_sampler
    if type(batches) is not BatchSampler:
        size = getattr(batches, "batch_size", None) or -(-len(pair[0]) // max(1, len(batches)))
        return Taken(pair, SampledBatches(batches), size)
    # Not the loader's own sampler, which is another one where it was given a batch sampler.
    return Taken(pair, order_of_sampler(batches.sampler), batches.batch_size)


def _held(loader: DataLoader, form: Form) -> tuple[Any, Any] | None:
    """The tensors of a data set that is made of them, where a loader does no more than put samples together."""
    dataset: Any = loader.dataset
    plain = type(dataset) is TensorDataset and loader.collate_fn is default_collate and len(dataset.tensors) == 2
    if not plain or form.prepare is not None:
        return None
    inputs, targets = (form.of(place, tensor) for place, tensor in enumerate(dataset.tensors))
    return inputs, targets


def _order_of_stream(stream: Streamed) -> Order:
    return InOrder() if len(stream.lengths) == 1 else InShards(stream.lengths)


def order_of_sampler(sampler: Any) -> Order:
    """The order that a sampler stands for: that of the package where it does no more than shuffle."""
    if type(sampler) is SequentialSampler:
        return InOrder()
    if isinstance(sampler, DistributedSampler):
        # It leaves most samples to other processes: here all ranks share each batch.
        return Shuffled() if sampler.shuffle else InOrder()
    if type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None:
        return Shuffled()
    return Sampled(sampler)
