"""The network of a rank that holds one stage: options that it can have, its cuts, and its construction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from mpi4py import MPI

from apts_mpi.errors import InvalidInput
from apts_mpi.network.parameters import trained_parameters
from apts_mpi.network.segments import layers_of
from apts_mpi.network.structure import check_same_network, structure
from apts_mpi.network.teams import Teams
from apts_mpi.options import APTSOptions, PipelineOptions
from apts_mpi.parallel.guard import guarded
from apts_mpi.staged.deferred_init import with_parameters, without_memory
from apts_mpi.staged.stages import Stage, cut, keep_stage, multiplications, places_of
from apts_mpi.staged.subdomains import modules_begun, subdomains_asked_for
from apts_mpi.tools.trees import Tree, take

Made = TypeVar("Made")


def build_stage(
    make: Callable[[], Made],
    *,
    comm: MPI.Intracomm | None = None,
    options: APTSOptions,
    parts: Callable[[Any], tuple[torch.nn.Module, Tree | None]] = lambda made: (made, None),
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
    ranks = guarded(comm, options.stall_timeout)
    with ranks.shared_errors():
        check_staged(options)
        teams = Teams(ranks.size, ranks.size // options.replicas, options.replicas)
        made, registrations = without_memory(make)
        network, sample = parts(made)
        own_network = structure(network)
        stages = cut_network(network, options, ranks.size, sample)
        own = stages[teams.team_of(ranks.rank)]
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
    check_same_network({"network": own_network}, options, ranks)
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
    if schwarz.is_adaptive:
        refuse("schwarz.partition", schwarz.partition, "where layers stay on their stage; choose layer")
    if schwarz.overlap:
        refuse("schwarz.overlap", schwarz.overlap, "where a rank has no layers of its neighbours; give 0")
    if schwarz.local_data == "shard":
        refuse("schwarz.local_data", "shard", "where every stage sees all samples; choose full")


def undivided(options: APTSOptions) -> tuple[PipelineOptions, list[str]]:
    """The pipeline, of one micro-batch where the loss takes all samples together; and a sentence if that is less."""
    pipeline = options.pipeline
    if not options.coupled or pipeline.micro_batches == 1:
        return pipeline, []
    note = f"pipeline.micro_batches: 1, not {pipeline.micro_batches}, as the loss takes all samples together (coupled)"
    return replace(pipeline, micro_batches=1), [note]


def cut_network(network: torch.nn.Module, options: APTSOptions, ranks: int, sample: Tree | None) -> list[Stage]:
    """The stages of a network on so many ranks, one for each rank of a replica."""
    places = places_of(network)
    stages = ranks // options.replicas
    beginnings = None
    if options.subdomains is not None or options.schwarz.cuts is not None:
        layers = layers_of([place.module for place in places], trained_parameters(network))
        subdomains = subdomains_asked_for(options, layers, stages) if layers else None
        beginnings = None if subdomains is None else modules_begun(layers, subdomains)
    costs = None
    if options.pipeline.balance == "cost" and options.pipeline.cuts is None:
        if sample is None:
            raise InvalidInput("balance: 'cost' needs a sample of the inputs; give sample=, or choose parameters")
        costs = multiplications(places, take(sample, slice(8)))
    return cut(places, stages, options.pipeline, costs, beginnings)
