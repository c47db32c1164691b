"""torch's own optimizers, data-parallel over the ranks: what APTS is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from apts_mpi.checkpoint import Array, Checkpoint
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import Subdomain
from apts_mpi.network.segments import Forward, SegmentedNetwork, lower_precision
from apts_mpi.network.structure import check_same_network, structure
from apts_mpi.network.teams import Teams
from apts_mpi.objective.batch import Samples, cut_batch, samples_of_pass
from apts_mpi.objective.loss_check import check_objective
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Loss
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.state.tensors import (
    array,
    check_network,
    load_network,
    named_tensors,
    put_tensors,
    reader,
    replicated_arrays,
    take_tensors,
    to_numpy,
)
from apts_mpi.tools.environment import seconds
from apts_mpi.tools.events import Events
from apts_mpi.tools.schema import Check, allow, any_number, nothing_or, record, sequence, whole
from apts_mpi.train.options import BaselineOptions

OPTIMIZERS = {
    "adam": lambda parameters, rate: torch.optim.Adam(parameters, lr=rate),
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, lr=rate, momentum=0.9),
    "lbfgs": lambda parameters, rate: torch.optim.LBFGS(
        parameters, lr=rate, max_iter=10, line_search_fn="strong_wolfe"
    ),
}


# Vectors that L-BFGS keeps of its past, as torch has it.
PAST = 100


def _lbfgs_state(vector: Check, scalar: Check) -> Check:
    """What L-BFGS keeps: numbers may be tensors or none."""

    def tensor_or_number(value: Any, place: str) -> Any:
        return scalar(value, place) if isinstance(value, dict) else any_number(value, place)

    known = record(
        {
            **dict.fromkeys(("func_evals", "n_iter"), whole()),
            **dict.fromkeys(("d", "prev_flat_grad"), vector),
            **dict.fromkeys(("t", "H_diag", "prev_loss"), tensor_or_number),
            **dict.fromkeys(("old_dirs", "old_stps"), sequence(vector, PAST)),
            "ro": sequence(scalar, PAST),
        },
        {"al": sequence(nothing_or(scalar), PAST)},
    )

    def check(value: Any, place: str) -> dict[str, Any]:
        found: dict[str, Any] = known(value, place)
        counts = [len(found[name]) for name in ("old_dirs", "old_stps", "ro")]
        allow(len(set(counts)) == 1, f"{place}: numbers of old_dirs, old_stps and ro", counts, "one number")
        return found

    return check


# What each optimizer keeps, by the checks of a vector of the parameters and of a tensor of shape ().
STATES: dict[str, Callable[[Check, Check], Check]] = {
    "adam": lambda vector, scalar: record({"step": scalar, "exp_avg": vector, "exp_avg_sq": vector}),
    "sgd": lambda vector, scalar: record({"momentum_buffer": nothing_or(vector)}),
    "lbfgs": _lbfgs_state,
}


@dataclass(frozen=True)
class BaselineResult:
    """One step of an optimizer; the same on every rank. See `apts_mpi.StepResult` for the units."""

    iteration: int
    loss: float
    gradient_norm: float
    gradient_evaluations: float
    seconds: float
    accepted: bool = True
    skipped: bool = False
    at_rest: bool = False
    reason: str = ""


class DataParallel:
    """A torch optimizer on the flat parameters with gradients summed over the ranks.

    Parameters
    ----------
    network, loss, forward, comm
        As for `apts_mpi.APTS`.
    options
        The optimizer.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        loss: Loss,
        *,
        comm: MPI.Intracomm,
        options: BaselineOptions,
        forward: Forward | None = None,
    ) -> None:
        self.network = network
        self.events = Events()
        self.comm = Communicator(comm, self.events)
        with self.comm.shared_errors():
            segmented = SegmentedNetwork(network, forward, lower_precision(options.autocast))
            self.vector = FlatParameters(network)
        check_same_network({"network": structure(network)}, options, self.comm)
        self.comm.share_tensors([self.vector.values, *network.buffers()])
        size, last = self.vector.values.numel(), len(segmented) - 1
        ranks = self.comm.size
        everything = [Subdomain(rank, 0, size, 0, size, 0, last) for rank in range(ranks)]
        team = self.comm.group(self.comm.rank)
        self._decomposition = Decomposition(everything, (), Teams(ranks, ranks, 1), self.comm, team, ranks)
        self.objective = Objective(
            segmented=segmented,
            vector=self.vector,
            loss=loss,
            inexact=False,
            keep_gradients=False,
            comm=self.comm,
        )
        self._flat = torch.nn.Parameter(self.vector.values)
        self._flat.grad = self.objective.reduction.total
        self.optimizer = OPTIMIZERS[options.optimizer]([self._flat], options.learning_rate)
        self._name, self._seed = options.optimizer, options.seed
        self._loss_is_checked = False
        self.iteration = 0

    def step(self, batch: Samples, rows: torch.Tensor | None = None) -> BaselineResult:
        """One step on the whole batch, given on every rank. Collective. See `apts_mpi.APTS.step`."""
        started = seconds()
        self.events.work = 0.0
        self.iteration += 1
        with self.events.timed("data"):
            cut = cut_batch(
                batch,
                rows,
                decomposition=self._decomposition,
                local_data="shard",
                whole=True,
                stream=(self._seed, self.iteration),
                least=samples_of_pass(self.network),
            )
            if not self._loss_is_checked:
                check_objective(self.objective, cut, self.comm, True)
                self._loss_is_checked = True
        first: list[tuple[float, float]] = []
        most_work = 0.0

        def closure() -> float:
            nonlocal most_work
            with self.events.timed("global evaluation"):
                run = self.objective.evaluate(cut.passes)
                own = [float(run.loss), self.events.work]
                loss, most_work = self.comm.agree(own, lambda table: [math.fsum(table[:, 0]), table[:, 1].max()])
                if not first:
                    self.objective.buffers.accept()
                    first.append((loss, float(torch.linalg.vector_norm(self._flat.grad))))
            return loss

        with self.events.timed("optimizer"):
            self.optimizer.step(closure)
        evaluations = most_work * self.comm.size / cut.size
        return BaselineResult(self.iteration, *first[0], evaluations, seconds() - started)

    @property
    def parameters(self) -> int:
        """See `apts_mpi.APTS`."""
        return self.vector.values.numel()

    @property
    def smallest_batch(self) -> int:
        """See `apts_mpi.APTS`."""
        return samples_of_pass(self.network) * self._decomposition.teams.smallest_batch("shard")

    @property
    def subdomains(self) -> int:
        """Shards of a batch."""
        return self.comm.size

    def save(self) -> tuple[list[Array], dict[str, Any]]:
        """Network and state of the optimizer. Collective. See `apts_mpi.APTS.save`."""
        tensors: dict[str, torch.Tensor] = {}
        kept = self.optimizer.state_dict()["state"].get(0)
        metadata = {"iteration": self.iteration, "optimizer": take_tensors(kept, "optimizer", tensors)}
        return replicated_arrays(named_tensors(self.network) | tensors, self.comm), metadata

    def load(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> list[str]:
        """Take over what `save` has saved, on any number of ranks. Collective. See `apts_mpi.APTS.load`."""
        with self.comm.shared_errors():
            check_network(self.network, checkpoint)
            metadata = self._check(checkpoint, metadata)
            load_network(self.network, checkpoint)
            self.iteration = metadata["iteration"]
            kept = put_tensors(metadata["optimizer"], reader(checkpoint, self._flat.device))
            if kept is not None:
                self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": {0: kept}})
        return []

    def _check(self, checkpoint: Checkpoint, metadata: Any) -> dict[str, Any]:
        """The metadata, once they are known to be what `save` makes."""
        vector = array(checkpoint, (self.vector.values.numel(),), dtype=to_numpy(self.vector.values[:0]).dtype)
        state = nothing_or(STATES[self._name](vector, array(checkpoint, ())))
        checked: dict[str, Any] = record({"iteration": whole(), "optimizer": state})(
            metadata, f"{checkpoint.path}: solver"
        )
        return checked

    def shared(self) -> tuple[list[torch.Tensor], object]:
        """Tensors and numbers that have the same bits on all ranks."""
        return list(named_tensors(self.network).values()), self.iteration

    def describe(self) -> str:
        """The optimizer and its settings, in words."""
        return f"data-parallel over {self.comm.size} ranks: {self.optimizer}"
