"""What a rank holds where every rank has the whole network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from mpi4py import MPI

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.checkpoint.format import Checkpoint
from apts_mpi.curvature.products import PassProducts
from apts_mpi.defaults import compose, describe, may_be_dense, split_parameters
from apts_mpi.local.registry import needs_evaluations, solver_class
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import subdomains_at
from apts_mpi.network.segments import Forward, SegmentedNetwork, lower_precision
from apts_mpi.network.structure import check_same_network, structure
from apts_mpi.network.teams import Teams
from apts_mpi.network.watch import NetworkWatch
from apts_mpi.objective.batch import Batch, Samples, cut_batch, samples_of_groups, samples_of_pass
from apts_mpi.objective.loss_check import check_objective
from apts_mpi.objective.mean_loss import MeanLoss
from apts_mpi.objective.memory import MicroBatches
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Loss
from apts_mpi.objective.same_batch import SameBatches
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.guard import guarded
from apts_mpi.schwarz.adaptive import AdaptiveCuts, move_batch
from apts_mpi.schwarz.additive import AdditiveSchwarz
from apts_mpi.schwarz.coarse import CoarseLevel, make_coarse_level
from apts_mpi.schwarz.plateau import make_plateau
from apts_mpi.schwarz.reduced_curvature import ReducedCurvature, RowCurvature, TangentCurvature
from apts_mpi.schwarz.residual_level import make_residual_level
from apts_mpi.state.local_solvers import LocalSolvers, other_subdomains
from apts_mpi.state.moving import Moving, staying
from apts_mpi.state.solver import SolverParts, check_solver, load_solver, save_solver
from apts_mpi.state.tensors import replicated_arrays
from apts_mpi.trust_region.global_step import make_global_step
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.metric import FisherMetric
from apts_mpi.trust_region.next_batch import LastStep


class Replicated:
    """The whole network on every rank, of which each corrects its own subdomains; see `apts_mpi.holding.Holding`.

    Making it is collective: rank 0's parameters and buffers are given to all ranks.

    Parameters
    ----------
    network, loss, comm, options, forward
        See `apts_mpi.APTS`.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        loss: Loss,
        comm: MPI.Intracomm | None,
        options: APTSOptions,
        forward: Forward | None,
    ) -> None:
        self.network = network
        self._loss_is_checked = False
        self.comm = guarded(comm, options.stall_timeout)
        called = forward is not None
        self._asked_for = options
        self._is_coarse_asked = options.coarse.model != "auto"
        with self.comm.shared_errors():
            segmented = SegmentedNetwork(network, forward, lower_precision(options.autocast))
            vector = FlatParameters(network)
            layers = segmented.layers(vector)
            subdomains = split_parameters(options, layers, self.comm.size, may_be_dense(options, network, called))
            teams = Teams(self.comm.size, len(subdomains), options.replicas)
            self.options = options = compose(
                options, network=network, loss=loss, called=called, layers=layers, subdomains=subdomains
            )
        check_same_network({"network": structure(network), "forward": [str(called)]}, options, self.comm)
        self.inner = InnerProducts(options.trust_region.norm)
        self._metric: FisherMetric | None = None
        if options.trust_region.metric == "fisher":
            with self.comm.shared_errors():
                chain, mean = torch.nn.Sequential(*segmented.segments), MeanLoss(loss, options.group)
                bound = options.trust_region.metric_radius
                self.inner.metric = self._metric = FisherMetric(network, chain, vector, layers, mean, self.comm, bound)
        self.comm.share_tensors([vector.values, *network.buffers()])
        self.watch, self._batches = NetworkWatch(vector, self.comm), SameBatches(self.comm)
        team = self.comm.group(teams.team_of(self.comm.rank))
        self.decomposition = Decomposition(subdomains, layers, teams, self.comm, team, len(subdomains))
        self.objective = Objective(
            segmented=segmented,
            vector=vector,
            loss=MeanLoss(loss, options.group),
            inexact=options.schwarz.variant == "inexact",
            keep_gradients=needs_evaluations(options.local),
            recorded=self._recorded(),
            comm=self.comm,
        )
        if options.coarse.model == "residual" or solver_class(options.local.solver).dense:
            self.objective.keep_outputs = segmented.autocast is None
        self.plateau = make_plateau(self._asked_for, options, vector.values)
        self.micro_batches = MicroBatches(options.most, options.group, self.comm)
        self.schwarz = AdditiveSchwarz(options, self.objective, self.decomposition, self.inner, plateau=self.plateau)
        inner, size = self.inner, self.parameters
        self.coarse = make_residual_level(
            options, self.objective, lambda: self.schwarz.rows, self.comm, self.decomposition.comm, inner
        ) or make_coarse_level(
            options, self.decomposition, vector.values, self.comm, self._curvature, inner, size, self._is_coarse_asked
        )
        with self.comm.shared_errors():
            self._adaptive = AdaptiveCuts(options, self.objective, self.comm) if options.schwarz.is_adaptive else None
        self.last_step = LastStep(vector.values) if options.noise == "batches" else None
        products = functools.partial(PassProducts, self.objective, kind=options.global_step.product)
        self.global_step = make_global_step(
            options.global_step,
            self.schwarz,
            objective=self.objective,
            comm=self.decomposition.comm,
            inner=inner,
            products_of_rank=products,
        )

    def _recorded(self) -> Sequence[torch.nn.Module]:
        """The modules whose calls local solvers look at."""
        if not solver_class(self.options.local.solver).whole_layers:
            return ()
        return self.decomposition.modules_of(self.network, self.options.schwarz.local_data == "shared")

    def _curvature(self) -> ReducedCurvature:
        """Of the coarse level: from the rows of the local solvers where those of all ranks have all of its samples."""
        options, samples = self.options, self.options.coarse.samples
        rows = solver_class(options.local.solver).dense and options.schwarz.local_data == "full"
        if rows and options.batch == "whole" and samples == 1.0:
            return RowCurvature(lambda: self.schwarz.rows, self.comm)
        return TangentCurvature(self.objective, self.comm, samples, not self._is_coarse_asked)

    @property
    def parameters(self) -> int:
        """See `apts_mpi.holding.Holding`."""
        return self.objective.vector.values.numel()

    @property
    def smallest_batch(self) -> int:
        """See `apts_mpi.holding.Holding`."""
        teams = self.decomposition.teams
        least = samples_of_groups(samples_of_pass(self.network), self.options.group)
        return least if self.options.coupled else least * teams.smallest_batch(self.options.schwarz.local_data)

    @property
    def most(self) -> int | None:
        """See `apts_mpi.holding.Holding`."""
        return self.micro_batches.most

    def cut(self, samples: Samples, rows: torch.Tensor | None, stream: tuple[int, ...]) -> Batch:
        """See `apts_mpi.holding.Holding`."""
        batch = cut_batch(
            samples,
            rows,
            decomposition=self.decomposition,
            local_data=self.options.schwarz.local_data,
            whole=self.options.batch == "whole",
            stream=stream,
            least=samples_of_pass(self.network),
            group=self.options.group,
        )
        self.micro_batches.cut(batch, samples_of_pass(self.network))
        if self.options.batch == "whole":
            given = zip(("inputs", "targets"), batch.samples, strict=True)
            self._batches.look({name: data for name, data in given if data is not None}, rows)
        self.objective.begin(batch.passes)
        return batch

    def check_loss(self, batch: Batch, doubted: bool = False) -> None:
        """See `apts_mpi.holding.Holding`."""
        if doubted or not self._loss_is_checked:
            check_objective(self.objective, batch, self.comm, self.options.batch == "whole", doubted)
            self._loss_is_checked = True
        self.micro_batches.fit(batch, self.objective)

    def adapt(self, batch: Batch, iteration: int, accepted: bool, forget: Callable[[], None]) -> float:
        """See `apts_mpi.holding.Holding`."""
        adaptive, own = self._adaptive, self.decomposition
        # A correction that is to be tried again in a smaller ball belongs to its subdomains.
        if adaptive is None or not (accepted and adaptive.is_due(iteration)):
            return 0.0
        with self.comm.events.timed("coarse"):
            look = adaptive.look(batch, self.schwarz.correction, own, self.schwarz.solving.seconds)
            if look.cuts != tuple(part.owned_start for part in own.subdomains):
                old = self._local_solvers()
                divided = self._divided(look.cuts)
                moving = Moving(old, staying(old, divided))
                self.decomposition = divided
                self._divide()
                moving.give(self._local_solvers())
                move_batch(batch, self.decomposition)
                forget()
        return look.work

    def _divided(self, cuts: Sequence[int]) -> Decomposition:
        """The same ranks with subdomains that begin there, between layers."""
        own = self.decomposition
        return replace(own, subdomains=subdomains_at(own.layers, cuts, "layer", self.options.schwarz.overlap))

    def _divide(self) -> None:
        """Have all parts follow the present subdomains, with local solvers that know nothing yet."""
        self.schwarz.divide(self.decomposition)
        self.objective.record(self._recorded())
        if isinstance(self.coarse, CoarseLevel):
            self.coarse.parts = self.decomposition.owned_parts()

    def save(self, correction: torch.Tensor | None) -> tuple[list[Array], dict[str, Any]]:
        """See `apts_mpi.holding.Holding`."""
        return save_solver(self._parts(), correction, self._arrays)

    def load(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> tuple[torch.Tensor | None, list[str]]:
        """See `apts_mpi.holding.Holding`."""
        if self._adaptive is not None:
            self._divide_as_saved(checkpoint, metadata)
        correction, notes = load_solver(self._parts(), checkpoint, metadata)
        others = other_subdomains(self.options, self.decomposition.subdomains, metadata["subdomains"])
        return correction, [*others, *notes]

    def _divide_as_saved(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> None:
        """Have the subdomains of a checkpoint, which are where cuts had moved to, if there are as many."""
        saved = check_solver(self._parts(), checkpoint, metadata)["subdomains"]
        cuts = [record["owned_start"] for record in saved]
        begins = {layer.start for layer in self.decomposition.layers}
        # Others, such as those of shards of data, are none that adaptive cuts can have been.
        may_be = len(cuts) == self.decomposition.count and cuts == sorted(begins.intersection(cuts))
        if may_be and cuts != [part.owned_start for part in self.decomposition.subdomains]:
            self.decomposition = self._divided(cuts)
            self._divide()

    def _arrays(self, tensors: Mapping[str, torch.Tensor], vectors: Mapping[str, torch.Tensor]) -> list[Array]:
        return replicated_arrays({**tensors, **vectors}, self.comm)

    def _parts(self) -> SolverParts:
        parts = {
            **{"coarse": self.coarse, "global_step": self.global_step, "last_step": self.last_step},
            **{"plateau": self.plateau, "micro_batches": self.micro_batches, "metric": self._metric},
        }
        return SolverParts(self.network, parts, self._local_solvers(), self.schwarz.assembled)

    def _local_solvers(self) -> LocalSolvers:
        schwarz, own = self.schwarz, self.decomposition
        kept, carried, device = schwarz.kept, list(schwarz.solvers), schwarz.correction.device
        name, leads = schwarz.local_solver, own.leads
        return LocalSolvers(name, kept, carried, own.subdomains, own.layers, self.comm, leads, device)

    def describe(self) -> str:
        """See `apts_mpi.holding.Holding`."""
        dtype, segments = self.objective.vector.values.dtype, len(self.objective.segmented)
        network = f"{self.parameters} parameters, {dtype}, {segments} segments"
        return describe(
            self.options,
            self._asked_for,
            self.decomposition.teams,
            self.decomposition.subdomains,
            network,
            self.objective.loss.describe(),
        )
