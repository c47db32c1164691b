"""Construction of a network of which only one stage is to be in this rank's memory.

The function that makes the network runs twice. First every parameter is left without memory, as soon as a module
registers it and before it is initialised: that shows where the network is cut. Then the parameters of this rank's stage
get memory of their own, and all others share one scratch memory, of the size of the largest: they are initialised there
and forgotten. So every rank draws the random numbers that one process draws, in its order, and its stage has the values
that it has there, whatever the initialisation does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode

from apts_mpi.errors import InvalidInput
from apts_mpi.tools.environment import preserved_random_state

Made = TypeVar("Made")

# Of the widest number, complex128.
WIDEST = 16


class Registrations:
    """The parameters in the order in which modules register them first, which is the same on every run.

    Parameters
    ----------
    replace
        Called with the number of a parameter in the order and the parameter; returns what the module gets.
    """

    def __init__(self, replace: Callable[[int, nn.Parameter], nn.Parameter]) -> None:
        self._replace = replace
        self.parameters: list[nn.Parameter] = []
        self._numbers: dict[int, int] = {}

    def number_of(self, parameter: nn.Parameter) -> int | None:
        """Its place in the order, None for one that no module has registered."""
        return self._numbers.get(id(parameter))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See all registrations in the block."""
        # torch's own type leaves out what a hook may return.
        handle = register_module_parameter_registration_hook(self._see)  # type: ignore[arg-type]
        try:
            yield
        finally:
            handle.remove()

    def _see(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or self.number_of(parameter) is not None:
            return None
        if isinstance(parameter, UninitializedParameter):
            raise InvalidInput(
                f"layout: 'staged' cannot cut a network with {type(module).__name__}, whose shapes are not known "
                "before it runs; give its sizes"
            )
        number = len(self.parameters)
        parameter = self._replace(number, parameter)
        self.parameters.append(parameter)
        self._numbers[id(parameter)] = number
        return parameter


class _Scratch(TorchDispatchMode):
    """Memory that parameters share; in the block a conversion of one of them takes no memory either."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self._memory = torch.empty(numbers * WIDEST, dtype=torch.uint8)

    def like(self, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape in the shared memory."""
        return self._memory.view(dtype)[: tensor.numel()].view(tensor.shape)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and self._holds(args[0]):
            return self.like(args[0], kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)

    def _holds(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() == self._memory.untyped_storage().data_ptr()


def without_memory(make: Callable[[], Made]) -> tuple[Made, Registrations]:
    """What ``make`` returns, with its parameters on torch's meta device, and these; torch's random state is kept."""
    registrations = Registrations(
        lambda number, parameter: nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    )
    with preserved_random_state(torch.device("cpu")), registrations.watching():
        return make(), registrations


def with_parameters(make: Callable[[], Made], kept: Collection[int], largest: int) -> tuple[Made, Registrations]:
    """What ``make`` returns, of whose parameters those with a number in ``kept`` alone have memory of their own.

    The others have no values. ``largest`` is the size of the largest parameter.
    """
    scratch = _Scratch(largest)

    def replace(number: int, parameter: nn.Parameter) -> nn.Parameter:
        if number in kept:
            return parameter
        return nn.Parameter(scratch.like(parameter, parameter.dtype), parameter.requires_grad)

    registrations = Registrations(replace)
    with registrations.watching(), scratch:
        return make(), registrations
