"""The package's own duplicate of a user's communicator, so that messages never meet the user's."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI

from apts_mpi.errors import InvalidInput
from apts_mpi.parallel.departures import Departures
from apts_mpi.parallel.waiting import WAITING


class Private:
    """A duplicate of a user's communicator, and its groups by the colors of all ranks.

    Attributes
    ----------
    comm : Intracomm
        The duplicate.
    groups : dict
        Communicators of groups, by the colors of all ranks.
    departures : Departures
        Of its ranks.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm.Dup()
        self.groups: dict[tuple[int, ...], Any] = {}
        self.departures = Departures(self.comm)

    def free(self) -> None:
        """Free the duplicate and its groups. Collective."""
        for group in self.groups.values():
            group.Free()
        self.departures.forget()
        self.comm.Free()


# Kept as an attribute of the user's communicator and freed with it, as in PETSc: one duplicate however many solvers
# are made, since an MPI library has room for a few thousand communicators only.
_PRIVATE = MPI.Comm.Create_keyval(delete_fn=lambda comm, keyval, private: private.free())


def private_of(comm: MPI.Intracomm) -> Private:
    """The duplicate of a communicator, made the first time. Collective.

    Raises
    ------
    InvalidInput
        For what is no intracommunicator.
    """
    if isinstance(comm, MPI.Intercomm) or comm == MPI.COMM_NULL:
        name = "MPI.COMM_NULL" if comm == MPI.COMM_NULL else f"an {type(comm).__name__}"
        raise InvalidInput(f"comm: {name} has no ranks that could work together; give an mpi4py intracommunicator")
    private: Any = comm.Get_attr(_PRIVATE)
    if private is None:
        with WAITING.noted("all ranks to make a communicator"):
            private = Private(comm)
        comm.Set_attr(_PRIVATE, private)
    return private
