"""What a solver needs to know of a training problem."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apts_mpi.data import Order, take_over
from apts_mpi.data.order import InOrder, InShards
from apts_mpi.errors import require
from apts_mpi.problems.redraw import Redraw
from apts_mpi.problems.task import Task
from apts_mpi.tools.trees import Tree, count_samples, first_sample, named_leaves

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
    train : (array, array), (tree, tree), data set or DataLoader
        Inputs (M, ...) and targets (M, ...), the first dimension of which counts the samples: tensors, arrays of
        numpy's or h5py's, or tensors and arrays of numpy's in tuples, lists, mappings or dataclasses, nested as one
        likes. Or a data set of torch's that gives such pairs sample by sample, by number or one after the other; or a
        ``torch.utils.data.DataLoader``, whose batch size, order, ``collate_fn`` and workers count. The attribute has
        tensors, or halves of which a rank reads what it needs (``apts_mpi.data.Half``).
    test : optional
        Held-out samples, likewise.
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
        ``metric(network)`` returns a float, such as an error against an exact solution; torch's default dtype is then
        that of the parameters.
    group_size : int
        Number of consecutive samples that the loss takes together, and that are shuffled together.
    coupled : bool
        The loss takes all samples of a batch together. See `apts_mpi.APTSOptions`.
    prepare : callable, optional
        What becomes of the inputs on the device where they are used, such as ``lambda images: images / 255`` of images
        of bytes, which take a quarter of the room and of the way; None: they stay as they are.
    collate_fn : callable, optional
        Makes a pair (inputs, targets) of a list of samples of a data set; None is torch's own.
    order : Order, optional
        Which samples make the batches; None: that of the loader, else all samples, shuffled by seed and epoch.
    tasks : sequence of Task
        Tasks that come one after the other, the first of which ``train`` and ``test`` have; epochs are those of each.
    redraw : Redraw, optional
        How others are drawn in the place of training samples, for ``--resample``.

    Raises
    ------
    InvalidInput
        When a value has a wrong type, shape or dtype.
    """

    name: str
    network: nn.Module
    loss: Callable[[Any, Any], Tensor | tuple[Tensor, Any]]
    train: Any
    test: Any = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    batch_size: int | None = None
    epochs: int = 10
    accuracy: bool = False
    metrics: Mapping[str, Callable[[nn.Module], float]] = field(default_factory=dict)
    group_size: int = 1
    coupled: bool = False
    prepare: Callable[[Any], Any] | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    order: Order | None = None
    redraw: Redraw | None = None
    tasks: Sequence[Task] = ()

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
        drawn = self.redraw is None or isinstance(self.redraw, Redraw)
        require(drawn, "redraw", self.redraw, "give an apts_mpi.problems.Redraw, or None")
        require(_is_metrics(self.metrics), "metrics", self.metrics, "map names to functions of (network)")
        for name in ("prepare", "collate_fn"):
            value = getattr(self, name)
            require(value is None or callable(value), name, value, "give a function, or None")
        dtype = _parameter_dtype(self.network)
        self._take_over(dtype)
        _check_samples("train", self.train, dtype, self.accuracy)
        if self.test is not None:
            _check_samples("test", self.test, dtype, self.accuracy)

    @property
    def dtype(self) -> torch.dtype:
        """Real type of the parameters: torch's default one where functions of the user's make tensors."""
        return _parameter_dtype(self.network)

    def _take_over(self, dtype: torch.dtype) -> None:
        """Have the samples as `train` and `test` say, and what a loader says of their batches."""
        taken = take_over("train", self.train, dtype, self.collate_fn, self.prepare)
        # Groups are of samples that come one after the other, which are not those of a batch of several shards.
        of_shards = isinstance(taken.order, InShards) and self.group_size > 1
        order = self.order or (InOrder() if of_shards else taken.order)
        found: dict[str, Any] = {"train": taken.pair, "order": order}
        found["batch_size"] = taken.batch_size if self.batch_size is None else self.batch_size
        if self.test is not None:
            found["test"] = take_over("test", self.test, dtype, self.collate_fn, self.prepare).pair
        for name, value in found.items():
            object.__setattr__(self, name, value)


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


def _check_samples(option: str, samples: tuple[Tree, Tree], dtype: torch.dtype, accuracy: bool) -> None:
    inputs, targets = samples
    for name, part in (("inputs", inputs), ("targets", targets)):
        for place, tensor in named_leaves(part, f"{option} {name}").items():
            if isinstance(tensor, Tensor):
                _check_tensor(place, tensor, dtype)
    counts = f"{count_samples(inputs)} inputs and {count_samples(targets)} targets"
    require(count_samples(inputs) == count_samples(targets), option, counts, "give one target for each input")
    if accuracy:
        found = dtype_of(targets) or type(targets).__name__
        remedy = "accuracy needs one tensor of class indices in torch.int64"
        require(found == torch.int64, f"dtype of {option} targets", found, remedy)


def dtype_of(part: Tree) -> torch.dtype | None:
    """Type of the numbers of inputs or targets; None where a sample has more than one tensor."""
    tensor = first_sample(part)
    return tensor.dtype if isinstance(tensor, Tensor) else None


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
