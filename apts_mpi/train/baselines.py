"""Other optimizers, data-parallel over the ranks: what APTS is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mpi4py import MPI

from apts_mpi.checkpoint import Array, Checkpoint
from apts_mpi.errors import name_remedy
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import Subdomain
from apts_mpi.network.segments import Forward, SegmentedNetwork, lower_precision
from apts_mpi.network.structure import check_same_network, structure
from apts_mpi.network.teams import Teams
from apts_mpi.objective.batch import Samples, cut_batch, samples_of_groups, samples_of_pass
from apts_mpi.objective.loss_check import check_objective
from apts_mpi.objective.mean_loss import MeanLoss, check_fault
from apts_mpi.objective.memory import MicroBatches
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Loss
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.parts import Parts
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
from apts_mpi.tools.schema import anything, record, whole
from apts_mpi.train.optimizer_states import Arrays
from apts_mpi.train.optimizers import OPTIMIZERS, weights_of
from apts_mpi.train.options import BaselineOptions
from apts_mpi.train.peers import check_installed


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
    """An optimizer of the table `OPTIMIZERS` on the parameters, with gradients summed over the ranks.

    Between steps the network may be at the point where it is trained or, with an optimizer that averages, at the one
    where it is to be evaluated, see `to_evaluated_point`.

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
            check_installed(options.optimizer)
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
            loss=MeanLoss(loss, options.group),
            inexact=False,
            keep_gradients=False,
            comm=self.comm,
        )
        self._kind, self._seed, self._group = OPTIMIZERS[options.optimizer], options.seed, options.group
        with self.comm.shared_errors():
            weights = weights_of(self.vector, self.objective.reduction.total)
            # Any: those that average have methods that torch's have not.
            self.optimizer: Any = self._kind.make(weights, options.learning_rate)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        # Where training goes on, while the network is at the point where it is evaluated.
        self._left: torch.Tensor | None = None
        self._loss_is_checked = False
        self.micro_batches = MicroBatches(options.most, options.group, self.comm)
        self.notes = self._notes()
        self.iteration = 0

    def _notes(self) -> list[str]:
        """What of the optimizer is not as its authors have it, one sentence each."""
        statistics = any(getattr(module, "running_mean", None) is not None for module in self.network.modules())
        if not (self._kind.averages and statistics):
            return []
        where = "the points where it is trained, and not of the average, where it is evaluated"
        return [f"optimizer: the running statistics of the network are those of {where}"]

    def step(self, batch: Samples, rows: torch.Tensor | None = None, share: float = 0.0) -> BaselineResult:
        """One step on the whole batch, given on every rank. Collective.

        Parameters
        ----------
        batch, rows
            See `apts_mpi.APTS.step`.
        share
            Of the run that is behind it, the same on every rank: for optimizers that have a schedule.
        """
        try:
            return self._step(batch, rows, share)
        except BaseException as error:
            name_remedy(error)
            raise

    def _step(self, batch: Samples, rows: torch.Tensor | None, share: float) -> BaselineResult:
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
                group=self._group,
            )
            self.micro_batches.cut(cut, samples_of_pass(self.network))
            self.objective.begin(cut.passes)
            if not self._loss_is_checked:
                check_objective(self.objective, cut, self.comm, True)
                self._loss_is_checked = True
            self.micro_batches.fit(cut, self.objective)
        first: list[tuple[float, float]] = []
        most_work = 0.0

        def closure() -> float:
            nonlocal most_work
            with self.events.timed("global evaluation"):
                run = self.objective.evaluate(cut.passes)
                largest = self.events.work, float(self.objective.loss.fault(run.loss))
                own = Parts(sums=[float(run.loss)], largest=largest)
                loss, most_work, fault = self.comm.combine(own, lambda parts: [*parts.sums, *parts.largest])
                check_fault(fault)
                if not first:
                    self.objective.buffers.accept()
                    first.append((loss, float(torch.linalg.vector_norm(self.objective.reduction.total))))
            return loss

        with self.events.timed("optimizer"):
            self._to_training_point()
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * self._kind.schedule(share)
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
        least = samples_of_groups(samples_of_pass(self.network), self._group)
        return least if self._group is None else least * self._decomposition.teams.smallest_batch("shard")

    @property
    def subdomains(self) -> int:
        """Shards of a batch."""
        return self.comm.size

    def save(self) -> tuple[list[Array], dict[str, Any]]:
        """Network, where it is to be evaluated, and state of the optimizer. Collective. See `apts_mpi.APTS.save`."""
        self.to_evaluated_point()
        tensors: dict[str, torch.Tensor] = {}
        kept = take_tensors(self._kind.kept.take(self.optimizer), "optimizer", tensors)
        metadata = {"iteration": self.iteration, "optimizer": kept, "micro_batches": self.micro_batches.state()}
        if self._left is not None:
            metadata["left"] = take_tensors(self._left, "optimizer/left", tensors)
        return replicated_arrays(named_tensors(self.network) | tensors, self.comm), metadata

    def load(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> list[str]:
        """Take over what `save` has saved, on any number of ranks. Collective. See `apts_mpi.APTS.load`."""
        with self.comm.shared_errors():
            check_network(self.network, checkpoint)
            metadata = self._check(checkpoint, metadata)
            load_network(self.network, checkpoint)
            self.iteration = metadata["iteration"]
            read = reader(checkpoint, self.vector.values.device)
            self._kind.kept.put(self.optimizer, put_tensors(metadata["optimizer"], read))
            self._left = put_tensors(metadata.get("left"), read)
            self.micro_batches.restore(metadata.get("micro_batches", {}))
        return self.notes

    def _check(self, checkpoint: Checkpoint, metadata: Any) -> dict[str, Any]:
        """The metadata, once they are known to be what `save` makes."""
        dtype = to_numpy(self.vector.values[:0]).dtype
        arrays = Arrays(lambda shape: array(checkpoint, shape, dtype=dtype), lambda shape: array(checkpoint, shape))
        known = {"iteration": whole(), "optimizer": self._kind.kept.check(self.optimizer, arrays)}
        if self._kind.averages:
            known["left"] = arrays.typed(tuple(self.vector.values.shape))
        later = {"micro_batches": self.micro_batches.saved(anything, anything)}
        checked: dict[str, Any] = record(known, later)(metadata, f"{checkpoint.path}: solver")
        return checked

    @torch.no_grad()
    def to_evaluated_point(self) -> None:
        """Put the network where it is to be evaluated; the next step goes on where the last one has ended.

        Where it was is kept bit by bit: on the way back by the optimizer it would be rounded.
        """
        if self._kind.averages and self._left is None:
            self._left = self.vector.values.clone()
            # Before the first step it has no average, and nothing moves.
            self.optimizer.eval()

    @torch.no_grad()
    def _to_training_point(self) -> None:
        """Put the network where training goes on."""
        if self._left is not None:
            self.vector.values.copy_(self._left)
            self._left = None
            for group in self.optimizer.param_groups:
                group["train_mode"] = True

    def shared(self) -> tuple[list[torch.Tensor], object]:
        """Tensors and numbers that have the same bits on all ranks."""
        return list(named_tensors(self.network).values()), self.iteration

    def describe(self) -> str:
        """The optimizer and its settings, in words."""
        return f"data-parallel over {self.comm.size} ranks: {self.optimizer!r}"
