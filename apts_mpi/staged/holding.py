"""What a rank holds where each has a stage of the network."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from mpi4py import MPI

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.checkpoint.format import Checkpoint
from apts_mpi.curvature.kinds import any_seldom_seen
from apts_mpi.defaults import compose, describe
from apts_mpi.errors import InvalidInput
from apts_mpi.local.registry import solver_class
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import subdomains_at
from apts_mpi.network.segments import lower_precision
from apts_mpi.network.structure import check_same_network, structure
from apts_mpi.network.teams import Teams
from apts_mpi.network.watch import NetworkWatch
from apts_mpi.objective.batch import Batch, Samples, samples_of_groups, samples_of_pass
from apts_mpi.objective.mean_loss import MeanLoss
from apts_mpi.objective.passes import Loss
from apts_mpi.objective.same_batch import SameBatches
from apts_mpi.options import APTSOptions
from apts_mpi.options.tree import branch, fold
from apts_mpi.parallel.guard import guarded
from apts_mpi.schwarz.additive import AdditiveSchwarz
from apts_mpi.schwarz.coarse import make_coarse_level
from apts_mpi.schwarz.plateau import make_plateau
from apts_mpi.schwarz.residual_level import make_residual_level
from apts_mpi.staged.build import check_staged, cut_network, undivided
from apts_mpi.staged.coarse import StageCurvature
from apts_mpi.staged.global_step import StageProducts
from apts_mpi.staged.loss_check import check_staged_objective
from apts_mpi.staged.micro_batches import cut_micro_batches
from apts_mpi.staged.objective import StagedObjective
from apts_mpi.staged.pipeline import Pipeline
from apts_mpi.staged.rows import StagedGaussNewtonRows
from apts_mpi.staged.stages import Stage, keep_stage, places_of, stages_of
from apts_mpi.staged.state import Extent, StagePart, make_arrays
from apts_mpi.staged.subdomains import cuts_of_stages, layers_of_stages, subdomains_asked_for
from apts_mpi.state.local_solvers import LocalSolvers, other_subdomains
from apts_mpi.state.solver import SolverParts, load_solver, save_solver
from apts_mpi.state.tensors import named_tensors
from apts_mpi.tools.environment import process
from apts_mpi.tools.trees import Tree
from apts_mpi.trust_region.global_step import make_global_step
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.next_batch import LastStep

# Seconds; longer than a pass through any one module, between which a stage gives signs.
SIGN_TIMEOUT = 10.0


class Staged:
    """A stage of the network, an interval of its layers; see `apts_mpi.holding.Holding`. Making it is collective.

    Parameters
    ----------
    network, loss, comm, options, sample
        See `apts_mpi.StagedAPTS`.

    Attributes
    ----------
    stages : list of Stage
        All stages.
    replica : Communicator
        The ranks that hold the stages of this replica.
    processes : list of str
        For each rank, its stage and its process, in words.
    notes : list of str
        What of subdomains and micro-batches is other than asked for, as the stages or the loss do not allow it; one
        sentence each.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        loss: Loss,
        comm: MPI.Intracomm | None,
        options: APTSOptions,
        sample: Tree | None,
    ) -> None:
        self.network = network
        self._loss_is_checked = False
        self._asked_for = options
        self._is_coarse_asked = options.coarse.model != "auto"
        self.comm = guarded(comm, options.stall_timeout)
        with self.comm.shared_errors():
            check_staged(options)
            self._teams = Teams(self.comm.size, max(self.comm.size // options.replicas, 1), options.replicas)
            is_whole, given = stages_of(places_of(network)) is None, structure(network)
            self.stages = self._find_stages(options, sample)
            own = self._teams.team_of(self.comm.rank)
            segmented = keep_stage(places_of(network), self.stages, self.stages[own], lower_precision(options.autocast))
            vector = FlatParameters(network)
            layers = segmented.layers(vector)
            is_open = options.noise == "batches" and options.local.solver == "auto"
            unknown = is_open and any_seldom_seen(network, layers)
        leaders = [self._teams.ranks_of(index).start for index in range(len(self.stages))]
        held = self.comm.collect((layers, len(vector.values), unknown))
        with self.comm.shared_errors():
            starts, all_layers = layers_of_stages(self.stages, [held[leader][:2] for leader in leaders])
            if any(of_rank[2] for of_rank in held):
                # All stages have one local solver, whatever layers theirs are.
                options = replace(options, local=replace(options.local, solver="muon"))
            asked = subdomains_asked_for(options, all_layers, len(self.stages))
            cuts, self.notes = cuts_of_stages(asked, self.stages, starts)
            first, last = starts[own], starts[own] + len(vector.values)
            within = [cut - first for cut in cuts if first <= cut < last]
            subdomains = subdomains_at(layers, within, "auto", 0)
            schwarz = replace(options.schwarz, variant="inexact", local_data="full")
            pipeline, of_samples = undivided(options)
            self.notes += of_samples
            self.options = options = compose(
                replace(options, schwarz=schwarz, pipeline=pipeline),
                network=network,
                loss=loss,
                called=False,
                layers=layers,
                subdomains=subdomains,
            )
        part = "network" if is_whole else f"network of stage {own}"
        # What is left open may be another thing for each stage.
        check_same_network({part: given, "list of stages": list(map(str, self.stages))}, self._asked_for, self.comm)
        names = self._limit_patience()
        self.watch, self._batches = NetworkWatch(vector, self.comm, own), SameBatches(self.comm)
        team = self.comm.group(own)
        self.replica = self.comm.group(team.rank)
        self.inner = InnerProducts(options.trust_region.norm, self.comm, leaders)
        team.share_tensors([vector.values, *network.buffers()])
        self.decomposition = Decomposition(
            subdomains, layers, Teams(team.size, len(subdomains), team.size), team, team, len(cuts)
        )
        whole_layers = solver_class(options.local.solver).whole_layers
        recorded = self.decomposition.modules_of(network) if whole_layers else ()
        self.objective = StagedObjective(
            segmented=segmented,
            vector=vector,
            loss=MeanLoss(loss, options.group),
            options=options,
            recorded=recorded,
            pipeline=Pipeline(self.replica, [names[leader + team.rank] for leader in leaders], vector.values.device),
            team=team,
        )
        self.plateau = make_plateau(self._asked_for, options, vector.values)
        self.schwarz = AdditiveSchwarz(
            options, self.objective, self.decomposition, self.inner, StagedGaussNewtonRows, plateau=self.plateau
        )
        self._extent = Extent.of(subdomains, vector.values.numel(), self.stages[own].start, self.replica)
        inner, size = self.inner, self.parameters
        self.coarse = make_residual_level(
            options, self.objective, lambda: self.schwarz.rows, self.comm, self.decomposition.comm, inner
        ) or make_coarse_level(
            options, self.decomposition, vector.values, self.comm, self._curvature, inner, size, self._is_coarse_asked
        )
        self.last_step = LastStep(vector.values) if options.noise == "batches" else None
        products = functools.partial(StageProducts, self.objective, kind=options.global_step.product)
        self.global_step = make_global_step(
            options.global_step,
            self.schwarz,
            objective=self.objective,
            comm=self.decomposition.comm,
            inner=inner,
            products_of_rank=products,
        )
        self._least = max(self.replica.collect(samples_of_pass(network)))
        # What a launcher tells of a process that died is its number.
        self.processes = self.comm.collect(f"{names[self.comm.rank]}: {process()}")
        self._names = [name for own in self.replica.collect(tuple(named_tensors(network))) for name in own]

    def _find_stages(self, options: APTSOptions, sample: Tree | None) -> list[Stage]:
        """The stages into which the network was cut, or is to be."""
        ranks, replicas = self.comm.size, options.replicas
        stages = stages_of(places_of(self.network)) or cut_network(self.network, options, ranks, sample)
        if len(stages) != ranks // replicas:
            raise InvalidInput(
                f"network: it was cut into {len(stages)} stages before; make it again for {ranks} ranks with "
                f"{replicas} replicas"
            )
        return stages

    def _limit_patience(self) -> list[str]:
        """Wait for others only as long as they give signs. Returns names of all ranks, in words."""
        named = {rank: f"{stage} on rank {rank}" for stage in self.stages for rank in self._teams.ranks_of(stage.index)}
        names = [named[rank] for rank in range(self.comm.size)]
        self.comm.limit_patience(self.options.stall_timeout or SIGN_TIMEOUT, names)
        return names

    def _curvature(self) -> StageCurvature:
        samples = self.options.coarse.samples
        return StageCurvature(self.objective, self.comm, self.decomposition.leads, samples, not self._is_coarse_asked)

    @property
    def parameters(self) -> int:
        """See `apts_mpi.holding.Holding`."""
        return self._extent.size

    @property
    def smallest_batch(self) -> int:
        """See `apts_mpi.holding.Holding`."""
        least = samples_of_groups(self._least, self.options.group)
        return least if self.options.coupled else least * self.options.pipeline.micro_batches * self.options.replicas

    @property
    def most(self) -> int | None:
        """See `apts_mpi.holding.Holding`."""
        return self.options.most

    def cut(self, samples: Samples, rows: torch.Tensor | None, stream: tuple[int, ...]) -> Batch:
        """See `apts_mpi.holding.Holding`."""
        batch = cut_micro_batches(
            samples,
            rows,
            options=self.options,
            decomposition=self.decomposition,
            stages=self.replica,
            comm=self.comm,
            stream=stream,
        )
        with self.comm.shared_errors():
            if min(part.samples for part in batch.passes) < self._least:
                raise InvalidInput(
                    f"batch_size: {batch.size} samples leave a micro-batch with one, of which batch normalisation "
                    f"takes no statistics; give at least {self.smallest_batch}, fewer --micro-batches, or a larger "
                    "--micro-batch-size"
                )
        if self.options.batch == "whole":
            needed = {"inputs": self.objective.pipeline.is_first, "targets": self.objective.pipeline.is_last}
            given = zip(needed, batch.samples, strict=True)
            self._batches.look({name: data for name, data in given if needed[name] and data is not None}, rows)
        self.objective.begin(batch.passes)
        return batch

    def check_loss(self, batch: Batch, doubted: bool = False) -> None:
        """See `apts_mpi.holding.Holding`."""
        if self._loss_is_checked and not doubted:
            return
        whole = self.options.batch == "whole"
        given = batch.size if whole else sum(part.samples for part in batch.passes)
        check_staged_objective(self.objective, batch, given, self.decomposition.team.rank, self.comm, whole, doubted)
        self._loss_is_checked = True

    def adapt(self, batch: Batch, iteration: int, accepted: bool, forget: Callable[[], None]) -> float:
        """See `apts_mpi.holding.Holding`: layers stay on their stage."""
        return 0.0

    def save(self, correction: torch.Tensor | None) -> tuple[list[Array], dict[str, Any]]:
        """See `apts_mpi.holding.Holding`: the same arrays as of the other layout, which either can load."""
        return save_solver(self._parts(), correction, self.arrays)

    def load(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> tuple[torch.Tensor | None, list[str]]:
        """See `apts_mpi.holding.Holding`."""
        others = set(self._names) - set(named_tensors(self.network))
        correction, notes = load_solver(self._parts(), StagePart(checkpoint, self._extent, others), metadata)
        others_now = other_subdomains(self.options, self._extent.subdomains, metadata["subdomains"])
        return correction, [*self.notes, *others_now, *notes]

    def arrays(self, tensors: Mapping[str, torch.Tensor], vectors: Mapping[str, torch.Tensor]) -> list[Array]:
        """Arrays of a checkpoint of named tensors of this stage, and of vectors of its parameters. Collective."""
        return make_arrays(tensors, vectors, self._extent, self.decomposition.leads, self.comm)

    def _parts(self) -> SolverParts:
        schwarz, extent, leads = self.schwarz, self._extent, self.decomposition.leads
        kept, layers = extent.solvers(schwarz.kept), extent.layers(self.decomposition.layers)
        carried = list(extent.solvers(schwarz.solvers))
        name, device = schwarz.local_solver, schwarz.correction.device
        local = LocalSolvers(name, kept, carried, extent.subdomains, layers, self.comm, leads, device)
        parts = {
            **{"coarse": self.coarse, "global_step": self.global_step, "last_step": self.last_step},
            **{"plateau": self.plateau, "micro_batches": None, "metric": None},
        }
        return SolverParts(self.network, parts, local, schwarz.assembled)

    def describe(self) -> str:
        """See `apts_mpi.holding.Holding`."""
        network = f"{self.parameters} parameters in stages, {self.objective.vector.values.dtype}"
        loss, parts = self.objective.loss.describe(), self._extent.subdomains
        text = describe(self.options, self._asked_for, self._teams, parts, network, loss)
        stages = [fold(f"  {stage}: ranks {list(self._teams.ranks_of(stage.index))}") for stage in self.stages]
        return "\n".join([text, *branch("pipeline", self.options.pipeline, self._asked_for.pipeline), *stages])
