"""What a solver needs to know of a training problem."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apts_mpi.errors import InvalidInput, require
from apts_mpi.tools.trees import Tree, as_samples, count_samples, named_leaves

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Wanted:
    """Which data a problem has to read from files; the rest may be samples of the right shape that take no memory.

    Parameters
    ----------
    inputs, targets : bool
        Of the training samples and of the held-out ones.
    """

    inputs: bool = True
    targets: bool = True


ALL = Wanted()


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A network, its data and its loss: minimise ``f(theta) = 1/M sum_i loss(N(theta; x_i), y_i)``.

    Parameters
    ----------
    name : str
        How the problem is called in reports.
    network : torch.nn.Module
        The network N, on the CPU, with at least one trainable parameter. Its floating-point tensors and those
        of the data share one dtype, float32 or float64; complex parameters have that of their parts.
    loss : callable
        ``loss(outputs, targets)`` returns a scalar tensor, the mean over the samples, or a sum and what it is to be
        divided by, as `apts_mpi.losses` do.
    train : (tree of Tensor, tree of Tensor)
        Inputs (M, ...) and targets (M, ...): tensors or numpy arrays in tuples, lists, mappings or dataclasses, nested
        as one likes; the first dimension of each counts the samples.
    test : (tree of Tensor, tree of Tensor), optional
        Held-out samples, shaped like ``train``.
    forward : callable, optional
        ``forward(network, inputs)`` returns the outputs; None means ``network(inputs)``, or ``network(**inputs)`` of a
        mapping. It also accepts any other callable in the place of the network.
    batch_size : int, optional
        Default number of samples in a batch; None means all of them.
    epochs : int
        Default number of passes through the training samples: of iterations, where the batch is full.
    accuracy : bool
        The targets are one tensor of int64 class indices and the outputs one whose last dimension holds the scores of
        the classes, so that an accuracy can be reported.
    metrics : mapping of str to callable
        ``metric(network)`` returns a float, such as an error against an exact solution.
    group_size : int
        Number of consecutive samples that the loss takes together, and that are shuffled together.
    coupled : bool
        The loss takes all samples of a batch together. See `apts_mpi.APTSOptions`.

    Raises
    ------
    InvalidInput
        When a value has a wrong type, shape or dtype.
    """

    name: str
    network: nn.Module
    loss: Callable[[Any, Any], Tensor | tuple[Tensor, Any]]
    train: tuple[Tree, Tree]
    test: tuple[Tree, Tree] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    batch_size: int | None = None
    epochs: int = 10
    accuracy: bool = False
    metrics: Mapping[str, Callable[[nn.Module], float]] = field(default_factory=dict)
    group_size: int = 1
    coupled: bool = False

    def __post_init__(self) -> None:
        require(isinstance(self.name, str) and self.name != "", "name", self.name, "give a non-empty string")
        require(isinstance(self.network, nn.Module), "network", self.network, "give a torch.nn.Module")
        require(callable(self.loss), "loss", self.loss, "give a function of (outputs, targets)")
        require(
            self.forward is None or callable(self.forward),
            "forward",
            self.forward,
            "give a function of (network, inputs), or None",
        )
        require(
            self.batch_size is None or _is_count(self.batch_size),
            "batch_size",
            self.batch_size,
            "give 1 or more, or None for the full batch",
        )
        require(_is_count(self.epochs), "epochs", self.epochs, "give 1 or more")
        require(isinstance(self.accuracy, bool), "accuracy", self.accuracy, "give True or False")
        require(_is_count(self.group_size), "group_size", self.group_size, "give 1 or more")
        require(isinstance(self.coupled, bool), "coupled", self.coupled, "give True or False")
        require(_is_metrics(self.metrics), "metrics", self.metrics, "map names to functions of (network)")
        dtype = _parameter_dtype(self.network)
        for option in ("train", "test"):
            if getattr(self, option) is not None or option == "train":
                samples = _checked(option, getattr(self, option), dtype, self.accuracy)
                object.__setattr__(self, option, samples)  # with arrays as tensors


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_metrics(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) and callable(value[key]) for key in value)


def _parameter_dtype(network: nn.Module) -> torch.dtype:
    dtypes = {name: parameter.dtype for name, parameter in network.named_parameters()}
    trainable = any(parameter.requires_grad for parameter in network.parameters())
    require(trainable, "network", type(network).__name__, "it has no parameter that requires a gradient")
    dtype = next(iter(dtypes.values()))
    dtype = dtype.to_real() if dtype.is_complex else dtype
    for name, found in dtypes.items():
        option = f"dtype of the network's {name}"
        real = found.to_real() if found.is_complex else found
        require(real in _DTYPES, option, found, "convert the network to torch.float32 or torch.float64")
        require(real == dtype, option, found, f"other parameters are {dtype}; convert the network to one precision")
    return dtype


def _checked(option: str, samples: object, dtype: torch.dtype, accuracy: bool) -> tuple[Tree, Tree]:
    if not isinstance(samples, tuple) or len(samples) != 2:
        raise InvalidInput(f"{option}: {_describe(samples)} is not allowed; give a tuple of tensors (inputs, targets)")
    inputs, targets = (
        as_samples(part, f"{option} {name}") for part, name in zip(samples, ("inputs", "targets"), strict=True)
    )
    for part, name in ((inputs, "inputs"), (targets, "targets")):
        for place, tensor in named_leaves(part, f"{option} {name}").items():
            _check_tensor(place, tensor, dtype)
    counts = f"{count_samples(inputs)} inputs and {count_samples(targets)} targets"
    require(count_samples(inputs) == count_samples(targets), option, counts, "give one target for each input")
    if accuracy:
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        remedy = "accuracy needs one tensor of class indices in torch.int64"
        require(kind == torch.int64, f"dtype of {option} targets", kind, remedy)
    return inputs, targets


def _describe(value: object) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of ({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__


def _check_tensor(option: str, tensor: Tensor, dtype: torch.dtype) -> None:
    require(
        tensor.dim() > 0 and len(tensor) > 0,
        f"shape of {option}",
        tuple(tensor.shape),
        "give at least one sample along the first dimension",
    )
    is_other_float = tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype != dtype)
    require(
        not is_other_float,
        f"dtype of {option}",
        tensor.dtype,
        f"the network is {dtype}; convert one of them",
    )
