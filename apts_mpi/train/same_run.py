"""Options with which a run goes on as the same run: its subdomains are those it had, on any ranks, in either layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apts_mpi.checkpoint import Checkpoint
from apts_mpi.options import PartitionName, PipelineOptions, SchwarzOptions
from apts_mpi.tools.schema import among, nothing_or, sequence, text, whole
from apts_mpi.train.options import TrainingOptions

# What layout staged always has.
STAGED = {"variant": "inexact", "local_data": "full"}

# What is needed of the saved subdomains and options; the solver sees to the rest.
_SUBDOMAINS = sequence(
    among(dict.fromkeys(("start", "stop", "owned_start", "owned_stop"), whole())),
    least=1,
)
_COMPOSED = among({"schwarz": among({"variant": text, "local_data": text}), "local": among({"solver": text})})


@dataclass(frozen=True)
class Asked:
    """What a run that goes on is asked for.

    Attributes
    ----------
    given : TrainingOptions
        By the command line alone.
    earlier : TrainingOptions
        When it was last begun.
    options : TrainingOptions
        The earlier ones with what the command line changes.
    """

    given: TrainingOptions
    earlier: TrainingOptions
    options: TrainingOptions

    @property
    def other_kind(self) -> bool:
        """Whether subdomains of another kind are asked for."""
        then, now = self.earlier.schwarz, self.options.schwarz
        return (then.decomposition, then.unit) != (now.decomposition, now.unit)


def same_run(asked: Asked, checkpoint: Checkpoint, ranks: int) -> tuple[TrainingOptions, list[str]]:
    """The options, with what was saved unless something else is asked for; and what changes, one sentence each.

    Parameters
    ----------
    asked
        What was asked for.
    checkpoint
        That of the run which goes on.
    ranks
        Number of ranks.
    """
    options, solver = asked.options, checkpoint.metadata["solver"]
    if "subdomains" not in solver:
        return options, []
    records = _SUBDOMAINS(solver["subdomains"], f"{checkpoint.path}: solver.subdomains")
    composed = nothing_or(_COMPOSED)(solver.get("composed"), f"{checkpoint.path}: solver.composed")
    stages = max(ranks // options.replicas, 1) if options.layout == "staged" else 1
    pipeline, of_cuts = _pipeline(asked, stages)
    number, schwarz, of_number = _subdomains(asked, records, stages)
    stood = composed["schwarz"] if composed else _stood_for_before(asked, solver)
    schwarz, of_objective = _local_objective(asked, schwarz, stood, len(records))
    noise = options.noise
    if noise == "auto":
        # By what it was before: the length of the run, which it depends on, may be another one now.
        noise = "batches" if (solver.get("composed") or {}).get("noise") == "batches" else "none"
    coarse = options.coarse
    was_residual = ((solver.get("composed") or {}).get("coarse") or {}).get("model") == "residual"
    if was_residual and (coarse, options.local) == (asked.earlier.coarse, asked.earlier.local):
        # What else is asked of the Schwarz level would have auto choose another one.
        coarse = replace(coarse, model="residual")
    local, solved = options.local, composed["local"]["solver"] if composed else None
    if noise == "batches" and local.solver == "auto" and solved in ("kfac", "muon"):
        # Its running means and the radius belong together.
        local = replace(local, solver=solved)
    changed = replace(options, subdomains=number, schwarz=schwarz, coarse=coarse, pipeline=pipeline, noise=noise)
    return replace(changed, local=local), of_cuts + of_number + of_objective


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


def _subdomains(
    asked: Asked, records: Sequence[Mapping[str, Any]], stages: int
) -> tuple[int | None, SchwarzOptions, list[str]]:
    """The number of subdomains and where they are."""
    number, schwarz, saved = asked.given.subdomains, asked.options.schwarz, len(records)
    if asked.given.schwarz.cuts is not None:
        return number, schwarz, []
    schwarz = replace(schwarz, cuts=None)
    if number not in (None, saved):
        note = f"subdomains: {number} as asked for, where {saved} were saved: what follows is another run"
        return number, schwarz, [note]
    if asked.other_kind or schwarz.decomposition == "data":
        # Each stage has one at least.
        return (saved if saved >= stages else None), schwarz, []
    cuts = tuple(record["owned_start"] for record in records)
    return saved, replace(schwarz, cuts=cuts, partition=_partition(asked, records)), []


def _partition(asked: Asked, records: Sequence[Mapping[str, Any]]) -> PartitionName:
    """The partition: in the units of which the saved overlap was counted, where ``auto`` leaves that open."""
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


def _stood_for_before(asked: Asked, solver: Mapping[str, Any]) -> Mapping[str, Any]:
    """What ``auto`` stood for in a version whose checkpoints do not tell."""
    if asked.earlier.layout == "staged":
        return STAGED
    return {"local_data": "full" if solver.get("local_solver") == "gauss-newton" else "shard"}


def _local_objective(
    asked: Asked, schwarz: SchwarzOptions, stood: Mapping[str, Any], subdomains: int
) -> tuple[SchwarzOptions, list[str]]:
    """What ``auto`` ``stood`` for, which layouts choose otherwise; another local solver says that for itself."""
    options, earlier = asked.options, asked.earlier
    if asked.other_kind or options.local.solver != earlier.local.solver:
        return schwarz, []
    left_open = {name: stood[name] for name in STAGED if name in stood and getattr(schwarz, name) == "auto"}
    if options.layout == "replicated":
        return replace(schwarz, **left_open), []
    # Statistics that all ranks share are those of the full batch.
    others = [name for name in left_open if left_open[name] not in (STAGED[name], "shared")] if subdomains > 1 else []
    words = "with layout staged, where it was"
    return schwarz, [
        f"schwarz.{name}: {STAGED[name]} {words} {left_open[name]}: what follows is another run" for name in others
    ]
