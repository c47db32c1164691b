"""What a network consists of, in words that ranks compare."""

from __future__ import annotations

import torch
from torch.nn.parameter import is_lazy

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.sameness import check_same, fields_in_words


def structure(network: torch.nn.Module) -> list[str]:
    """Its modules with their types, and its parameters and buffers with their shapes and types."""
    modules = [f"{name or 'all of it'}: {_kind(module)}" for name, module in network.named_modules()]
    tensors = [*network.named_parameters(remove_duplicate=False), *network.named_buffers()]
    return modules + [f"{name}: {_describe(tensor)}" for name, tensor in tensors]


def _kind(module: torch.nn.Module) -> str:
    """Its type, with its settings where it is torch's own: other words may have addresses in them."""
    kind = type(module)
    return f"{kind.__name__}({module.extra_repr()})" if kind.__module__.startswith("torch.nn.") else kind.__name__


def _describe(tensor: torch.Tensor) -> str:
    shape = "no shape yet" if is_lazy(tensor) else str(tuple(tensor.shape))
    return f"{shape} {tensor.dtype}{' trained' if tensor.requires_grad else ''}"


def check_same_network(own: dict[str, list[str]], options: object, comm: Communicator) -> None:
    """See that all ranks were given the same options, and those that give a name the same network. Collective.

    Parameters
    ----------
    own
        A network's `structure` by the name of the network, or of its part.
    options
        A dataclass.
    comm
        All ranks.

    Raises
    ------
    SharedInvalidInput
        Naming the first rank that was given something else.
    """
    # What the options leave open depends on the network.
    check_same(own, comm, "network", "make the same on all ranks")
    check_same(fields_in_words(options), comm, "options", "give all ranks the same")
