"""What an optimizer refuses, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from apts_mpi.defaults import NOISY_DAMPING, NOISY_MOMENTUM, NOISY_REFRESH
from apts_mpi.errors import InvalidInput, require, shown
from apts_mpi.options import LocalOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.sameness import check_same
from apts_mpi.parallel.transport import ADMITTED_DTYPES


def composed(local: LocalOptions | None) -> LocalOptions:
    """The options of the local solver with what ``null`` stands for on noisy batches, or `InvalidInput`."""
    local = local or LocalOptions()
    remedy = "the optimizer has kfac and muon; choose one of them, or auto"
    require(local.solver in ("auto", "kfac", "muon"), "local.solver", local.solver, remedy)
    require(local.iterations == 1, "local.iterations", local.iterations, "the optimizer has gradients alone; give 1")
    return replace(
        local,
        damping=local.damping or NOISY_DAMPING,
        refresh=local.refresh or NOISY_REFRESH,
        momentum=NOISY_MOMENTUM if local.momentum is None else local.momentum,
    )


def check_radius(radius: float | None) -> None:
    """Raise `InvalidInput` for what is no radius."""
    allowed = radius is None or (_is_number(radius) and radius > 0.0)
    require(allowed, "initial_radius", radius, "give a number above 0, or None for automatic")


def check_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `InvalidInput` for parameters that cannot lie in one vector, and values that groups cannot have."""
    for number, group in enumerate(groups):
        place = f"param_groups[{number}]"
        for name, most in (("lr", math.inf), ("weight_decay", 1.0)):
            value = group[name]
            allowed = (_is_number(value) or isinstance(value, torch.Tensor)) and 0.0 <= value < most
            words = "give a number of 0 or more" + (" below 1" if most == 1.0 else "")
            require(bool(allowed), f"{place}: {name}", value, words)
        if len({id(value) for value in group["params"]}) < len(group["params"]):
            raise InvalidInput(f"{place}: a parameter is in it twice; give each once")
    parameters = [(number, value) for number, group in enumerate(groups) for value in group["params"]]
    first = parameters[0][1] if parameters else None
    for number, parameter in parameters:
        assert first is not None
        place, dtype = f"param_groups[{number}]: a parameter", parameter.dtype
        if isinstance(parameter, torch.nn.UninitializedParameter):
            raise InvalidInput(f"{place} has no shape yet; call the network with its lazy modules once before")
        if dtype not in ADMITTED_DTYPES:
            raise InvalidInput(
                f"{place} of shape {tuple(parameter.shape)} is {dtype}, which MPI cannot reduce; convert the network "
                "by network.float() or network.double(), and let torch.autocast compute in bfloat16"
            )
        if dtype != first.dtype or parameter.device != first.device:
            raise InvalidInput(
                f"{place} of shape {tuple(parameter.shape)} is {dtype} on {parameter.device}, the first one "
                f"{first.dtype} on {first.device}; convert the network to one dtype and device"
            )


def check_ranks(parameters: Sequence[torch.Tensor], comm: Communicator) -> None:
    """See that all ranks have parameters of the same shapes, and give them rank 0's values. Collective."""
    if comm.size == 1:
        return
    shapes = [f"{tuple(parameter.shape)} {parameter.dtype}" for parameter in parameters]
    check_same({"list of parameters": shapes}, comm, "params", "make the same network on all ranks")
    comm.share_tensors([parameter.detach() for parameter in parameters])


def check_processes(comm: Communicator) -> None:
    """Raise `InvalidInput` where torch has processes that the communicator does not join."""
    distributed = torch.distributed
    alone = not (distributed.is_available() and distributed.is_initialized())
    processes = comm.size if alone else distributed.get_world_size()
    if processes != comm.size:
        raise InvalidInput(
            f"step: torch.distributed has {processes} processes and the communicator {comm.size}, so "
            "that they would part; start the program by mpirun, with as many ranks"
        )


def check_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Raise `InvalidInput` where a `torch.amp.GradScaler` calls, which leaves its attributes for the call."""
    if hasattr(optimizer, "found_inf"):
        raise InvalidInput(
            "step: a GradScaler has scaled the loss, by which curvature would be scaled, too; leave it out and use "
            "torch.autocast with bfloat16, which needs none"
        )


def check_state(state_dict: Mapping[str, Any]) -> None:
    """Raise `InvalidInput` for a state that is none of `apts_mpi.optim.APTS`."""
    kept = [value for value in state_dict.get("state", {}).values() if isinstance(value, Mapping)]
    names = sorted({str(name) for value in kept for name in value})
    if names and "ball" not in names:
        raise InvalidInput(
            f"state_dict: {shown(names)} is the state of another optimizer; give one that apts_mpi.optim.APTS has made"
        )


def solver_of(saved: Iterable[Mapping[str, Any]], asked: str, present: str) -> str:
    """The local solver of the state of a network's subdomains, or the present one of a state without any.

    Parameters
    ----------
    saved
        States of subdomains.
    asked, present
        What ``local.solver`` was, and what it stands for.

    Raises
    ------
    InvalidInput
        If another one was asked for.
    """
    kept = [state for state in saved if state]
    if not kept:
        return present
    # As long as there was kfac alone there were no squares.
    found = "muon" if any(state.get("squares") is not None for state in kept) else "kfac"
    if asked not in ("auto", found):
        raise InvalidInput(f"state_dict: it is of local.solver {found}, not {asked}; leave that out, or give {found}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)
