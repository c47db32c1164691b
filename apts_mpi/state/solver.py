"""What a checkpoint holds of a solver: the network, what its parts keep, and a correction that is still to be used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.errors import InvalidInput, shortened, shown
from apts_mpi.state.local_solvers import LocalSolvers, check_local_solvers, load_local_solvers, save_local_solvers
from apts_mpi.state.tensors import (
    Source,
    array,
    check_network,
    load_network,
    named_tensors,
    put_tensors,
    reader,
    take_tensors,
    to_numpy,
)
from apts_mpi.tools.schema import Check, anything, line, mapping, nothing_or, record, sequence

# Where vectors of all parameters are.
SOLVER = "solver"

# Parts that earlier versions did not have.
LATER = ("last_step", "plateau", "micro_batches", "metric")

# Makes arrays of named tensors of the network, and of vectors of the parameters, of which ranks may hold parts.
MakeArrays = Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], list[Array]]


class Part(Protocol):
    """A part of a solver with a state that all ranks share."""

    def state(self) -> dict[str, Any]:
        """Numbers and tensors by name."""

    def saved(self, vector: Check, vector_or_empty: Check) -> Check:
        """What its state has to be in a file, by the checks of vectors of all parameters."""

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
        If the network is another one, or the file has not what `save_solver` saves; network and solver are then as
        before, unless a class of the user's cannot take over its state.
    """
    metadata = check_solver(solver, source, metadata)
    load_network(solver.network, source)
    saved = {name: part for name, part in metadata.items() if name in solver.parts or name == "correction"}
    saved = put_tensors(saved, reader(source, solver.assembled.device))
    notices = []
    for name, part in solver.parts.items():
        if part is not None and saved.get(name) is not None:
            with taken_over(source, name):
                notices += part.restore(saved[name])
    correction = saved["correction"]
    if correction is not None and correction.shape != solver.assembled.shape:
        correction = None
        notices.append("corrections that were to be tried again in a smaller ball are computed anew")
    saved_solver = metadata["local_solver"]
    if saved_solver != solver.local.name:
        return correction, [*notices, f"the state of local solver {shortened(saved_solver)} is of no use to another"]
    with taken_over(source, f"local solver {saved_solver}"):
        return correction, notices + load_local_solvers(solver.local, source, metadata["subdomains"])


def check_solver(solver: SolverParts, source: Source, metadata: Any) -> dict[str, Any]:
    """The metadata, once file and metadata are known to be what `save_solver` makes of such a network.

    Raises
    ------
    InvalidInput
        Naming the first difference.
    """
    check_network(solver.network, source)
    size, dtype = solver.local.size, to_numpy(solver.assembled[:0]).dtype
    vector, vector_or_empty = (array(source, *shapes, dtype=dtype) for shapes in (((size,),), ((size,), (0,))))
    parts = {
        name: mapping() if part is None else part.saved(vector, vector_or_empty) for name, part in solver.parts.items()
    }
    check = record(
        {
            **{name: nothing_or(check) for name, check in parts.items() if name not in LATER},
            "correction": nothing_or(array(source, dtype=dtype)),
            "subdomains": sequence(mapping()),
            "local_solver": line,
            # See `apts_mpi.result.Known`.
            **dict.fromkeys(("state", "evaluated", "differentiated"), anything),
        },
        # What options stood for, which earlier versions did not save: see `apts_mpi.train.same_run`.
        {"composed": mapping(), **{name: nothing_or(parts[name]) for name in LATER}},
    )
    place = f"{source.path}: solver"
    checked: dict[str, Any] = check(metadata, place)
    check_local_solvers(solver.local, source, checked, f"{place}.subdomains")
    return checked


@contextmanager
def taken_over(source: Source, what: str) -> Iterator[None]:
    """Say of what the state could not be taken over in the block, whatever a class of the user's makes of it."""
    try:
        yield
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(
            f"{source.path}: the state of {what} cannot be taken over ({type(error).__name__}: {shown(str(error))}); "
            "give the options with which it was made"
        ) from error
