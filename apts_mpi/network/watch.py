"""Whether a network is still the one that a solver was made for, and which of its parameters stay where they are."""

from __future__ import annotations

import itertools
import operator
import zlib
from collections.abc import Sequence

import torch

from apts_mpi.errors import InvalidInput, SharedInvalidInput
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.sameness import first_other
from apts_mpi.tools.tensors import checksum

REMEDY = "make a new solver; load takes over what the old one's save gives where the same parameters are trained"


class NetworkWatch:
    """Looks, between steps, for what the user has changed on some rank, and lets all ranks know.

    Parameters
    ----------
    vector
        The parameters of the network, or of this rank's part of it.
    comm
        All ranks.
    part
        Number of that part: ranks with the same number hold the same.
    """

    def __init__(self, vector: FlatParameters, comm: Communicator, part: int = 0) -> None:
        self._vector = vector
        self._comm = comm
        self._part = part
        network = vector.network
        self._modules = list(network.modules())
        self._names = _names(network)
        self._held = self._now()
        trained = set(map(id, vector.parameters))
        self._untrained = [(name, p) for name, p in network.named_parameters() if id(p) not in trained and p.numel()]
        self._versions = vector.versions()
        self._frozen: tuple[bool, ...] = (False,) * len(vector.parameters)

    def _now(self) -> list[object]:
        """The modules and parameters in their places."""
        held = (itertools.chain(module._parameters.values(), module._modules.values()) for module in self._modules)
        return list(itertools.chain.from_iterable(held))

    def look(self, has_batch: bool, steps: Sequence[torch.Tensor] = ()) -> bool:
        """Whether the parameters are elsewhere, or others are trained, than at the last look. Collective.

        Parameters
        ----------
        has_batch
            Whether this rank was given a batch.
        steps
            Earlier steps that last, from which parts of frozen parameters are taken out.

        Raises
        ------
        SharedInvalidInput
            For a change that no solver can follow, or that not all ranks have made.
        """
        problem, frozen, versions = "", self._frozen, self._versions
        try:
            frozen, versions = self._see()
        except InvalidInput as error:
            problem = str(error)
        moved = versions != self._versions or frozen != self._frozen
        own = problem, has_batch, all(frozen), self._part, zlib.crc32(bytes(frozen))
        # Nearly always nothing is wrong, and nothing of what single ranks say has to be known.
        fails, moves, some, none = self._comm.largest(problem != "", moved, has_batch, not has_batch)
        if not (fails or moves or (some and none)):
            return False
        problems, batches, rest, parts, crcs = map(list, zip(*self._comm.collect(own), strict=True))
        failed = [rank for rank, told in enumerate(problems) if told]
        if failed:
            where = "" if len(failed) == len(problems) else f"rank {failed[0]}: "
            raise SharedInvalidInput(where + problems[failed[0]])
        if len(set(batches)) > 1:
            raise SharedInvalidInput(f"step: rank {batches.index(False)} was given no batch, others were; give all one")
        self._refuse_others(parts, crcs, "other parameters with requires_grad", "freeze the same on all ranks")
        sums = self._comm.collect(checksum(self._vector.values))
        self._refuse_others(parts, sums, "other parameters", "change or load the same on all ranks")
        if all(rest):  # a stage may rest where others move
            raise SharedInvalidInput("network: all that the solver trains is frozen; leave some with requires_grad")
        self._vector.freeze(frozen)
        for step in steps:
            self._vector.still(step)
        self._frozen, self._versions = frozen, versions
        return True

    def _see(self) -> tuple[tuple[bool, ...], list[int]]:
        """Which parameters are frozen, and how often each was changed; raises for what cannot be followed."""
        now = self._now()
        if len(now) != len(self._held) or not all(map(operator.is_, now, self._held)):
            raise InvalidInput(f"network: {_difference(self._names, self._vector.network)}; {REMEDY}")
        self._vector.check_alias()
        for name, parameter in self._untrained:
            if parameter.requires_grad:
                raise InvalidInput(
                    f"network: {name} was frozen when the solver was made and now has requires_grad; {REMEDY}"
                )
        frozen = tuple(not parameter.requires_grad for parameter in self._vector.parameters)
        return frozen, self._vector.versions()

    def _refuse_others(self, parts: list[int], given: list[int], what: str, remedy: str) -> None:
        """Refuse that a rank gives another number than most with its part."""
        for part in sorted(set(parts)):
            ranks = [rank for rank, other in enumerate(parts) if other == part]
            other = first_other([given[rank] for rank in ranks])
            if other is not None:
                rank, usual = (ranks[place] for place in other)
                raise SharedInvalidInput(f"network: rank {rank} has {what} than rank {usual}; {remedy}")


def _names(network: torch.nn.Module) -> dict[str, object]:
    """All its modules and parameters by their names."""
    modules = dict(network.named_modules(remove_duplicate=False))
    return {**modules, **dict(network.named_parameters(remove_duplicate=False))}


def _difference(before: dict[str, object], network: torch.nn.Module) -> str:
    """What was done to a network that has changed."""
    now = _names(network)
    for name, held in before.items():
        if name not in now:
            return f"{name} was taken away after the solver was made"
        if now[name] is not held:
            return f"{name} was replaced after the solver was made"
    added = next((name for name in now if name not in before), "a module or parameter")
    return f"{added} was added after the solver was made"
