"""What a checkpoint holds of a solver: the network, what its parts keep, and a correction that is still to be used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.state.local_solvers import LocalSolvers, load_local_solvers, save_local_solvers
from apts_mpi.state.tensors import Source, load_network, named_tensors, put_tensors, reader, take_tensors

# Where vectors of all parameters are.
SOLVER = "solver"

# Makes arrays of named tensors of the network, and of vectors of the parameters, of which ranks may hold parts.
MakeArrays = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], list[Array]]


class Part(Protocol):
    """A part of a solver with a state that all ranks share."""

    def state(self) -> dict[str, Any]:
        """Numbers and tensors by name."""

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Take over a state; return what is of no use here, one sentence each."""


@dataclass(frozen=True)
class SolverParts:
    """What of a solver is saved.

    Attributes
    ----------
    network
        The network.
    parts
        Parts by name; None for one that it lacks.
    local
        The local solvers.
    assembled : Tensor
        What the Schwarz level has assembled.
    """

    network: torch.nn.Module
    parts: Mapping[str, Part | None]
    local: LocalSolvers
    assembled: torch.Tensor


def save_solver(
    solver: SolverParts, correction: torch.Tensor | None, make_arrays: MakeArrays
) -> tuple[list[Array], dict[str, Any]]:
    """Arrays and metadata of a solver. Collective.

    Parameters
    ----------
    solver
        What is saved.
    correction
        What was assembled and is to be used again, or None.
    make_arrays
        How its tensors are spread over the ranks.
    """
    vectors: dict[str, torch.Tensor] = {}
    states = {name: None if part is None else part.state() for name, part in solver.parts.items()}
    metadata = take_tensors(states | {"correction": correction}, SOLVER, vectors)
    of_local, metadata["subdomains"] = save_local_solvers(solver.local)
    metadata["local_solver"] = solver.local.name
    return [*make_arrays(named_tensors(solver.network), vectors), *of_local], metadata


def load_solver(solver: SolverParts, source: Source, metadata: dict[str, Any]) -> tuple[torch.Tensor | None, list[str]]:
    """The inverse of `save_solver`: returns the correction, and what could not be taken over.

    Raises
    ------
    InvalidInput
        If the network is another one.
    """
    load_network(solver.network, source)
    saved = put_tensors(metadata, reader(source, solver.assembled.device))
    notices = []
    for name, part in solver.parts.items():
        if part is not None and saved[name] is not None:
            notices += part.restore(saved[name])
    correction = saved["correction"]
    if correction is not None and correction.shape != solver.assembled.shape:
        correction = None
        notices.append("corrections that were to be tried again in a smaller ball are computed anew")
    if metadata["local_solver"] != solver.local.name:
        return correction, [*notices, f"the state of local solver {metadata['local_solver']} is of no use to another"]
    return correction, notices + load_local_solvers(solver.local, source, metadata["subdomains"])
