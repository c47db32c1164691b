"""A network of the user's on an HDF5 file of the user's: samples in datasets of known names, read by each rank."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from apts_mpi.data.half import Form, Samples
from apts_mpi.data.hdf5 import FileRows, dataset_of, open_data
from apts_mpi.data.source import Arrays, check_numbers
from apts_mpi.errors import InvalidInput
from apts_mpi.problems.problem import Problem
from apts_mpi.problems.user import call
from apts_mpi.tools.tensors import default_dtype
from apts_mpi.tools.user_code import import_named

PREFIX = "hdf5:"

# Dimensions of images: samples, then (channels,) rows and columns.
FEWEST_OF_IMAGES = 3

NETWORK = "give the name of a function that returns a torch.nn.Module"


@dataclass(frozen=True)
class Parts:
    """What of a problem is given by options of its own.

    Attributes
    ----------
    network, loss : str, optional
        ``MODULE:FUNCTION`` each.
    network_args : mapping of str to str
        Arguments of the network's function.
    """

    network: str | None = None
    loss: str | None = None
    network_args: Mapping[str, str] = field(default_factory=dict)


def load(path: str, dtype: torch.dtype, parts: Parts) -> Problem:
    """The problem of a file: cross entropy where the targets are integers, and the mean square elsewhere.

    Images of bytes come to the network as numbers from 0 to 1.

    Parameters
    ----------
    path : str
        An HDF5 file with ``train/inputs`` and ``train/targets``, and ``test/inputs`` and ``test/targets`` where it has
        test samples; the first dimension of each counts the samples.
    dtype : torch.dtype
        Of network and samples.
    parts : Parts
        The network, and a loss if it is another one.

    Raises
    ------
    InvalidInput
        For a file, a network or a loss that cannot be used.
    """
    if parts.network is None:
        raise InvalidInput(f"--network: {PREFIX}{path} has no network; {NETWORK}, --network MODULE:FUNCTION")
    file = open_data(Path(path))
    train, test = _samples(file, "train"), _samples(file, "test") if "test" in file else None
    for which, pair in (("train", train), ("test", test)):
        for what, rows in zip(("inputs", "targets"), pair or (), strict=False):
            check_numbers(f"{path}: {which}/{what}", rows.shape, rows.dtype)
    _check_alike(path, train, test)
    are_classes = train[1].dtype.kind in "biu"
    loss: Callable[..., torch.Tensor] = cross_entropy if are_classes else mse_loss
    if parts.loss is not None:
        loss = _loss(parts.loss)
    is_image = train[0].dtype == np.uint8 and len(train[0].shape) >= FEWEST_OF_IMAGES
    form = Form(dtype, prepare=(lambda images: images.to(dtype).div_(255)) if is_image else None)

    def halves(which: str, pair: tuple[FileRows, FileRows]) -> tuple[Any, Any]:
        names = (f"{path}: {which}/inputs", f"{path}: {which}/targets")
        return Samples(Arrays(*pair, names), form).halves()

    return Problem(
        name=f"{PREFIX}{Path(path).name}",
        network=_network(parts, dtype),
        loss=loss,
        train=halves("train", train),
        test=None if test is None else halves("test", test),
        accuracy=are_classes and parts.loss is None,
    )


def _network(parts: Parts, dtype: torch.dtype) -> nn.Module:
    name = parts.network or ""
    with default_dtype(dtype):
        function = import_named("--network", name, "function", NETWORK)
        network = call("--network", name, function, parts.network_args, NETWORK)
    if not isinstance(network, nn.Module):
        raise InvalidInput(f"--network {name}: the function returned {type(network).__name__}; {NETWORK}")
    return network


def _loss(name: str) -> Callable[..., Any]:
    remedy = "give a function of (outputs, targets)"
    loss: Callable[..., Any] = import_named("--loss", name, "function", remedy)
    is_made = isinstance(loss, type)  # of a class it would be the instance
    try:
        inspect.signature(loss).bind(None, None)
    except TypeError:
        is_made = True
    except ValueError:  # of what is written in C there may be none
        pass
    if is_made:
        raise InvalidInput(
            f"--loss {name}: it is not a loss, or has to be called to give one; {remedy}, such as a module of "
            "yours with loss = apts_mpi.losses.mse()"
        )
    return loss


def _samples(file: Any, which: str) -> tuple[FileRows, FileRows]:
    return dataset_of(file, f"{which}/inputs"), dataset_of(file, f"{which}/targets")


def _check_alike(path: str, train: tuple[FileRows, FileRows], test: tuple[FileRows, FileRows] | None) -> None:
    """Raise `InvalidInput` for test samples that are not like those for training."""
    for place, what in enumerate(("inputs", "targets")):
        if test is not None and train[place].shape[1:] != test[place].shape[1:]:
            raise InvalidInput(
                f"{path}: a sample of test/{what} has shape {test[place].shape[1:]}, and one of train/{what} "
                f"{train[place].shape[1:]}; give samples of one shape"
            )
        if test is not None and (train[place].dtype.kind in "biu") != (test[place].dtype.kind in "biu"):
            raise InvalidInput(
                f"{path}: test/{what} are {test[place].dtype}, and train/{what} {train[place].dtype}; give one type"
            )
