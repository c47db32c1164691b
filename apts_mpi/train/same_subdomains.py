"""The subdomains of a run that goes on: those that were saved, on any number of ranks, in either layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from apts_mpi.checkpoint import Checkpoint
from apts_mpi.options import PipelineOptions
from apts_mpi.train.options import TrainingOptions


@dataclass(frozen=True)
class Asked:
    """What a run that goes on is asked for.

    Attributes
    ----------
    given : TrainingOptions
        By the command line alone.
    earlier : TrainingOptions
        When the run was begun.
    options : TrainingOptions
        The earlier ones with what the command line changes.
    """

    given: TrainingOptions
    earlier: TrainingOptions
    options: TrainingOptions

    @property
    def kind_changes(self) -> bool:
        """Whether subdomains of another kind are asked for."""
        then, now = self.earlier.schwarz, self.options.schwarz
        return (then.decomposition, then.partition) != (now.decomposition, now.partition)


def same_subdomains(asked: Asked, checkpoint: Checkpoint, ranks: int) -> tuple[TrainingOptions, list[str]]:
    """The options with the saved subdomains, unless others are asked for; and what changes, one sentence each.

    Parameters
    ----------
    asked
        What was asked for.
    checkpoint
        That of the run which goes on.
    ranks
        Number of ranks.
    """
    options, given = asked.options, asked.given
    records = checkpoint.metadata.get("solver", {}).get("subdomains")
    if records is None:
        return options, []
    stages = max(ranks // options.replicas, 1) if options.layout == "staged" else 1
    pipeline, notes = _pipeline(asked, stages)
    schwarz, number, saved = options.schwarz, given.subdomains, len(records)
    if given.schwarz.cuts is None:
        schwarz = replace(schwarz, cuts=None)
        if number not in (None, saved):
            notes.append(f"subdomains: {number} as asked for, where {saved} were saved: what follows is another run")
        elif asked.kind_changes or schwarz.decomposition == "data":
            number = saved if saved >= stages else None
        else:
            cuts = tuple(record["owned_start"] for record in records)
            schwarz = replace(schwarz, cuts=cuts, partition=_partition(asked, records))
            number = saved
    return replace(options, subdomains=number, schwarz=schwarz, pipeline=pipeline), notes


def _partition(asked: Asked, records: Sequence[Mapping[str, Any]]) -> Literal["auto", "layer", "index"]:
    """The partition, in the units of which the saved overlap is counted where ``auto`` leaves that open."""
    schwarz, overlap = asked.options.schwarz, asked.earlier.schwarz.overlap
    if schwarz.partition != "auto" or overlap == 0:
        return schwarz.partition
    size = records[-1]["owned_stop"]
    by_index = all(
        record["start"] == max(record["owned_start"] - overlap, 0)
        and record["stop"] == min(record["owned_stop"] + overlap, size)
        for record in records
    )
    return "index" if by_index else "layer"


def _pipeline(asked: Asked, stages: int) -> tuple[PipelineOptions, list[str]]:
    """Without the named cuts of a run on another number of stages, unless they are given now."""
    pipeline = asked.options.pipeline
    cuts = pipeline.cuts
    if asked.options.layout != "staged" or cuts is None or asked.given.pipeline.cuts is not None:
        return pipeline, []
    named = len(cuts.split(",")) + 1
    if named == stages:
        return pipeline, []
    balanced = f"{stages} are balanced by {pipeline.balance}"
    return replace(pipeline, cuts=None), [f"cuts: {cuts} are those of {named} stages; {balanced}"]
