"""APTS on a network of which each rank holds a stage: the inexact strategy in a pipeline (IAPTS, arXiv 2512.14286)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from mpi4py import MPI

from apts_mpi.apts import APTS
from apts_mpi.checkpoint import Array, Checkpoint
from apts_mpi.defaults import compose, describe
from apts_mpi.errors import InvalidInput
from apts_mpi.local.gradient import needs_evaluations
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import Layout, make_subdomains
from apts_mpi.objective.batch import samples_of_pass
from apts_mpi.objective.objective import Loss
from apts_mpi.options import APTSOptions, lower_precision
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.additive import AdditiveSchwarz
from apts_mpi.staged.coarse import StagedCoarseLevel
from apts_mpi.staged.deferred_init import with_parameters, without_memory
from apts_mpi.staged.global_step import StagedGlobalStep
from apts_mpi.staged.loss_check import check_staged_objective
from apts_mpi.staged.micro_batches import Batch, micro_batches_of_batch
from apts_mpi.staged.objective import StagedObjective
from apts_mpi.staged.pipeline import Pipeline
from apts_mpi.staged.rows import StagedGaussNewtonRows
from apts_mpi.staged.stages import Stage, cut, keep_stage, multiplications, places_of, stages_of
from apts_mpi.staged.state import Extent, load_staged, save_staged
from apts_mpi.state.tensors import named_tensors
from apts_mpi.tools.environment import process
from apts_mpi.tools.events import Events
from apts_mpi.trust_region.inner_products import InnerProducts

Made = TypeVar("Made")

# Seconds; longer than a pass through any one module, between which a stage gives signs.
STALL_TIMEOUT = 10.0


class StagedAPTS(APTS):
    """`APTS` for networks larger than one device: rank d stores and updates the parameters of its stage alone.

    The inexact strategy, on the whole batch: its iterates are those of `APTS` with the same subdomains, the inexact
    variant and ``local_data full``, whatever the number of micro-batches and the schedule. Random masks and batch
    normalisation are those of micro-batches. Making a solver is collective.

    Parameters
    ----------
    network
        An ``nn.Sequential``, nested or not, cut between its modules. This rank's stage has to be in memory, as
        `build_stage` makes it, or all of it. Afterwards it has placeholders where other ranks hold the modules.
    loss
        Function of (outputs, targets) that returns the mean over samples, shape (); called on the last stage.
    comm
        Any mpi4py intracommunicator of stages times replicas ranks; None is ``MPI.COMM_WORLD``.
    options
        The configuration; the attribute has what its ``auto`` values stand for.
    sample
        Inputs of a sample or more, for ``pipeline.balance cost`` alone.

    Attributes
    ----------
    stages : list of Stage
        All stages.
    processes : list of str
        For each rank, its stage and its process, in words.

    Raises
    ------
    InvalidInput
        On every rank, for a network that cannot be cut or options that cannot be used.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        loss: Loss,
        *,
        comm: MPI.Intracomm | None = None,
        options: APTSOptions | None = None,
        sample: torch.Tensor | None = None,
    ) -> None:
        options = options or APTSOptions(layout="staged")
        self.network = network
        self.events = Events()
        self.comm = Communicator(MPI.COMM_WORLD if comm is None else comm, self.events)
        with self.comm.shared_errors():
            check_staged(options)
            count = options.subdomains or max(self.comm.size // options.replicas, 1)
            self.layout = Layout(self.comm.size, count, options.replicas)
            stage = self.layout.team_of(self.comm.rank)
            places = places_of(network)
            self.stages = stages_of(places) or cut_network(network, options, self.comm.size, sample)
            if len(self.stages) != self.comm.size // options.replicas:
                raise InvalidInput(
                    f"network: it was cut into {len(self.stages)} stages before; make it again for {self.comm.size} "
                    f"ranks with {options.replicas} replicas"
                )
            if count < len(self.stages):
                raise InvalidInput(
                    f"subdomains: {count} is too few for {len(self.stages)} stages, which have one each at least; give "
                    "more, or start fewer ranks"
                )
            segmented = keep_stage(places, self.stages, self.stages[stage], lower_precision(options.autocast))
            self.vector = FlatParameters(network)
            self.layers = segmented.layers(self.vector)
            own = self.layout.subdomains_of(stage)
            if len(own) > len(self.layers):
                raise InvalidInput(
                    f"subdomains: {count} on {len(self.stages)} stages are {len(own)} for {self.stages[stage]}, which "
                    f"has {len(self.layers)} layers with parameters; give fewer, or other --cuts"
                )
            self.subdomains = make_subdomains(self.layers, len(own), "layer", 0)
            options = replace(
                options, schwarz=replace(options.schwarz, variant="inexact", partition="layer", local_data="full")
            )
            options = compose(
                options, network=network, loss=loss, called=False, layers=self.layers, subdomains=self.subdomains
            )
        self.options = options
        ranks = [self.layout.ranks_of(index) for index in range(len(self.stages))]
        names = {rank: f"{self.stages[index]} on rank {rank}" for index, team in enumerate(ranks) for rank in team}
        self.comm.limit_patience(
            options.stall_timeout or STALL_TIMEOUT, [names[rank] for rank in range(self.comm.size)]
        )
        team = self.comm.group(stage)
        replica = self.comm.group(team.rank)
        self.replica = replica
        self.products = InnerProducts(options.trust_region.norm, self.comm, [team_ranks.start for team_ranks in ranks])
        team.share_tensors([self.vector.values, *network.buffers()])
        self.objective: StagedObjective = StagedObjective(
            network=network,
            segmented=segmented,
            vector=self.vector,
            loss=loss,
            keep_gradients=needs_evaluations(options.local),
            recorded=self._recorded() if options.local.solver == "kfac" else (),
            pipeline=Pipeline(
                replica,
                [names[team_ranks[team.rank]] for team_ranks in ranks],
                self.vector.values.device,
                self.events,
            ),
            options=options.pipeline,
            stages=replica,
            team=team,
            events=self.events,
        )
        self.schwarz = AdditiveSchwarz(
            options=options.schwarz,
            local_options=options.local,
            trust_region=options.trust_region,
            objective=self.objective,
            subdomains=self.subdomains,
            layers=self.layers,
            layout=Layout(team.size, len(self.subdomains), team.size),
            comm=team,
            team=team,
            count=count,
            recombined=options.coarse.model != "none",
            events=self.events,
            rows=StagedGaussNewtonRows,
        )
        self.extent = Extent.of(self.subdomains, self.vector.values.numel(), self.stages[stage].start, replica)
        self.coarse = None
        if options.coarse.model != "none":
            kinds = len(options.coarse.columns)
            self.coarse = StagedCoarseLevel(
                options=options.coarse,
                objective=self.objective,
                subdomains=self.subdomains,
                comm=self.comm,
                events=self.events,
                kind=options.trust_region.norm,
                columns=[kinds * len(self.layout.subdomains_of(index)) for index in range(len(self.stages))],
                leads=team.rank == 0,
                size=self.parameters,
                products=self.products,
            )
        self.global_step = None
        if options.global_step.model != "none":
            self.global_step = StagedGlobalStep(
                options=options.global_step,
                objective=self.objective,
                schwarz=self.schwarz if options.local.solver == "kfac" else None,
                comm=team,
                events=self.events,
                products=self.products,
            )
        self._least = max(replica.collect(samples_of_pass(network)))
        self._begin(team)
        # What a launcher tells of a process that died is its number.
        self.processes = self.comm.collect(f"{names[self.comm.rank]}: {process()}")
        self.tensor_names = [name for own in replica.collect(tuple(named_tensors(network))) for name in own]

    @property
    def parameters(self) -> int:
        """See `APTS`."""
        return self.extent.size

    @property
    def smallest_batch(self) -> int:
        """See `APTS`."""
        return self._least * self.options.pipeline.micro_batches * self.options.replicas

    def evaluate(self) -> None:
        """Evaluate loss and gradient of the batch of the last step once more, for timings. Collective."""
        self.objective.evaluate(self._passes)

    def infer(self, inputs: Sequence[torch.Tensor], consume: Callable[[int, torch.Tensor], None]) -> None:
        """Run the network forwards as it is (in evaluation mode, say). Collective over the stages of a replica.

        Parameters
        ----------
        inputs
            Micro-batches; of the stages but the first one their numbers of samples alone count.
        consume
            Called on the last stage with the number of each and its outputs.
        """
        self.objective.infer(inputs, consume)

    def save(self) -> tuple[list[Array], dict[str, Any]]:
        """See `APTS.save`: the same arrays, which either layout can load."""
        correction = self.schwarz.assembled if self._has_correction else None
        arrays, metadata = save_staged(self.network, self._parts, correction, self.schwarz, self.extent, self.comm)
        return arrays, metadata | self._known()

    def _load(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> tuple[torch.Tensor | None, list[str]]:
        return load_staged(
            self.network, self._parts, self.schwarz, checkpoint, metadata, self.extent, self.tensor_names
        )

    def describe(self) -> str:
        """See `APTS`."""
        pipeline, dtype = self.options.pipeline, self.vector.values.dtype
        text = describe(
            self.options, self.layout, self.extent.subdomains, f"{self.parameters} parameters in stages, {dtype}"
        )
        stages = [f"  {stage}: ranks {list(self.layout.ranks_of(stage.index))}" for stage in self.stages]
        return "\n".join([text, f"  pipeline: {pipeline}", *stages])

    def _recorded(self) -> list[torch.nn.Module]:
        return [self.network.get_submodule(layer.name) for layer in self.layers]

    def _cut(self, batch: Batch, rows: torch.Tensor | None) -> None:
        self._passes, self._batch_size = micro_batches_of_batch(
            batch,
            rows,
            micro_batches=self.options.pipeline.micro_batches,
            subdomains=self.subdomains,
            stages=self.replica,
            team=self._team,
            whole=self.options.batch == "whole",
            stream=(self.options.seed, self.state.functions),
        )
        with self.comm.shared_errors():
            self.vector.check_alias()
            if min(part.samples for part in self._passes) < self._least:
                raise InvalidInput(
                    f"batch_size: {self._batch_size} samples leave a micro-batch with one, of which batch "
                    f"normalisation takes no statistics; give at least {self.smallest_batch}, or fewer --micro-batches"
                )
        own = sum(part.samples for part in self._passes)
        self._team_shares = [own / self._team.total(own)]
        self._forget()

    def _check_loss(self, batch: Batch, rows: torch.Tensor | None) -> None:
        given = self._batch_size if self.options.batch == "whole" else sum(part.samples for part in self._passes)
        check_staged_objective(self.objective, self._passes[0], batch, rows, given, self._team.rank, self.comm)


def build_stage(
    make: Callable[[], Made],
    *,
    comm: MPI.Intracomm | None = None,
    options: APTSOptions,
    parts: Callable[[Any], tuple[torch.nn.Module, torch.Tensor | None]] = lambda made: (made, None),
) -> Made:
    """Make a network of which only this rank's stage is in its memory, with the values that one process gives it.

    Collective.

    Parameters
    ----------
    make
        Makes the network, or something with a network; called twice, and does the same on every rank.
    comm, options
        Those of the solver.
    parts
        Of what ``make`` returns, the network, and a sample of its inputs for ``pipeline.balance cost``; by default it
        returns the network.

    Raises
    ------
    InvalidInput
        See `StagedAPTS`.
    """
    ranks = Communicator(MPI.COMM_WORLD if comm is None else comm, Events())
    with ranks.shared_errors():
        check_staged(options)
        layout = Layout(ranks.size, ranks.size // options.replicas, options.replicas)
        made, registrations = without_memory(make)
        network, sample = parts(made)
        stages = cut_network(network, options, ranks.size, sample)
        own = stages[layout.team_of(ranks.rank)]
        elsewhere = {
            registrations.number_of(parameter)
            for stage in stages
            if stage is not own
            for place in places_of(network)[stage.start : stage.stop]
            for parameter in place.module.parameters()
        }
        sizes = [parameter.numel() for parameter in registrations.parameters]
        del made, network
        made, _ = with_parameters(make, set(range(len(sizes))) - elsewhere, max(sizes, default=0))
        keep_stage(places_of(parts(made)[0]), stages, own)
    return made


def check_staged(options: APTSOptions) -> None:
    """Raise `InvalidInput` for options that layout staged cannot have."""
    schwarz = options.schwarz

    def refuse(option: str, value: object, reason: str) -> None:
        raise InvalidInput(f"{option}: {value!r} is not for layout staged, {reason}")

    if schwarz.decomposition == "data":
        refuse("schwarz.decomposition", "data", "where a rank has a part of the parameters; choose parameters")
    if schwarz.variant == "exact":
        refuse("schwarz.variant", "exact", "where a rank cannot run the layers behind its own; choose inexact")
    if schwarz.partition == "index":
        refuse("schwarz.partition", "index", "which cuts between layers; choose layer")
    if schwarz.overlap:
        refuse("schwarz.overlap", schwarz.overlap, "where a rank has no layers of its neighbours; give 0")
    if schwarz.local_data == "shard":
        refuse("schwarz.local_data", "shard", "where every stage sees all samples; choose full")
    if options.local.solver == "gauss-newton" and options.local.iterations > 1:
        refuse(
            "local.iterations",
            options.local.iterations,
            "where local solver gauss-newton would need the layers up to the loss again; give 1, or choose kfac",
        )
    if options.local.solver == "steihaug" and options.local.product == "gauss-newton":
        refuse("local.product", "gauss-newton", "as it needs the layers up to the loss; choose hessian")


def cut_network(network: torch.nn.Module, options: APTSOptions, ranks: int, sample: torch.Tensor | None) -> list[Stage]:
    """The stages of a network on so many ranks, one for each rank of a replica."""
    places = places_of(network)
    costs = None
    if options.pipeline.balance == "cost" and options.pipeline.cuts is None:
        if sample is None:
            raise InvalidInput("balance: 'cost' needs a sample of the inputs; give sample=, or choose parameters")
        costs = multiplications(places, sample)
    return cut(places, ranks // options.replicas, options.pipeline, costs)
