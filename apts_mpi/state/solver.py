"""What a checkpoint holds of a solver: the network, what its parts keep, and a correction that is still to be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from apts_mpi.checkpoint import Array, Checkpoint
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.additive import AdditiveSchwarz
from apts_mpi.state.local_solvers import load_local_solvers, save_local_solvers
from apts_mpi.state.tensors import (
    load_network,
    named_tensors,
    put_tensors,
    reader,
    replicated_arrays,
    take_tensors,
)


class Part(Protocol):
    """A part of a solver with a state that all ranks share."""

    def state(self) -> dict[str, Any]:
        """Numbers and tensors by name."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a state."""


def save_solver(
    network: torch.nn.Module,
    parts: Mapping[str, Part | None],
    correction: torch.Tensor | None,
    schwarz: AdditiveSchwarz,
    comm: Communicator,
) -> tuple[list[Array], dict[str, Any]]:
    """Arrays and metadata of a solver. Collective.

    Parameters
    ----------
    network, schwarz, comm
        Of the solver.
    parts
        Its other parts, by name; None for one that it lacks.
    correction
        What was assembled and is to be used again, or None.
    """
    tensors: dict[str, torch.Tensor] = {}
    states = {name: None if part is None else part.state() for name, part in parts.items()}
    metadata = take_tensors(states | {"correction": correction}, "solver", tensors)
    solvers, metadata["subdomains"] = save_local_solvers(schwarz)
    metadata["local_solver"] = schwarz.local_solver
    return [*replicated_arrays(named_tensors(network) | tensors, comm), *solvers], metadata


def load_solver(
    network: torch.nn.Module,
    parts: Mapping[str, Part | None],
    schwarz: AdditiveSchwarz,
    checkpoint: Checkpoint,
    metadata: dict[str, Any],
) -> tuple[torch.Tensor | None, list[str]]:
    """The inverse of `save_solver`: returns the correction, and what could not be taken over.

    Raises
    ------
    InvalidInput
        If the network is another one.
    """
    load_network(network, checkpoint)
    saved = put_tensors(metadata, reader(checkpoint, schwarz.correction.device))
    for name, part in parts.items():
        if part is not None and saved[name] is not None:
            part.restore(saved[name])
    correction, notices = saved["correction"], []
    if correction is not None and correction.shape != schwarz.assembled.shape:
        correction = None
        notices.append("corrections that were to be tried again in a smaller ball are computed anew")
    if metadata["local_solver"] != schwarz.local_solver:
        return correction, [*notices, f"the state of local solver {metadata['local_solver']} is of no use to another"]
    return correction, notices + load_local_solvers(schwarz, checkpoint, metadata["subdomains"])
