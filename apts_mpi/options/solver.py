"""The whole configuration of the solver, and that of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from apts_mpi.errors import require, require_fields
from apts_mpi.options.levels import CoarseOptions, LocalOptions, SchwarzOptions
from apts_mpi.options.trust_region import GlobalStepOptions, TrustRegionOptions


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """How layout staged cuts the network into stages and runs them.

    Parameters
    ----------
    micro_batches
        Parts of a replica's share of the batch, which the stages work on at the same time; more where they would be
        larger than ``micro_batch_size``. Batch normalisation takes its statistics from each.
    schedule
        ``gpipe``: all forward passes, then all backward passes. ``1f1b``: one of each in turn, which keeps fewer graphs
        at a time.
    cuts
        Names of the modules with which the second stage and those after it begin, with commas between them. null:
        balanced.
    balance
        What balanced stages have equally much of: ``parameters``, or ``cost``, multiplications of a forward pass.
    cache_dtype
        Of the inputs and output gradients that are kept for the local solves; ``auto`` keeps them as they are.
    recompute
        Run a stage forwards once more before each backward pass, instead of keeping the graph until then.
    """

    micro_batches: int = 4
    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    cuts: str | None = None
    balance: Literal["parameters", "cost"] = "parameters"
    cache_dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    recompute: bool = False

    def __post_init__(self) -> None:
        require_fields(self, "pipeline.")
        require(self.micro_batches >= 1, "pipeline.micro_batches", self.micro_batches, "give 1 or more")


@dataclass(frozen=True, kw_only=True)
class APTSOptions:
    """The whole configuration of `apts_mpi.APTS`.

    Parameters
    ----------
    subdomains
        Number of subdomains. None: one for each rank of a replica, or as many as the partition can make; for dense
        Gauss-Newton the least multiple of it with at most 640 parameters a subdomain.
    replicas
        Ranks that share the work of one subdomain rank over its samples.
    batch
        What each rank passes to `apts_mpi.APTS.step`: the ``whole`` batch, or its own ``shard`` of it.
    seed
        Seed of the random numbers that the network draws while it trains (dropout).
    autocast
        ``bfloat16``: the network computes in it where torch's autocast holds it to be safe, in loss, gradient, trial
        and local evaluations alike. Parameters, gradients, reductions and curvature stay float32. ``none``: all does.
    layout
        What a rank holds: ``replicated``, the whole network; ``staged``, a stage of it (see `apts_mpi.StagedAPTS`).
    stall_timeout
        Seconds without a sign from a stage after which all ranks raise `apts_mpi.errors.StallError`. None: 10.
    noise
        ``batches``: a step is made for a batch that says little about the next one, which judges the radius; the parts
        follow (``apts_mpi.trust_region.next_batch``). For many steps on batches that are small parts of the samples.
        ``none``: each batch is minimised for itself, as a whole training set is.
    group_size
        Number of consecutive samples that the loss takes together (contrastive pairs, rankings): it is a mean over
        groups, which are never divided. Batches are whole numbers of them.
    coupled
        The loss takes all samples of the batch together (Dice, the root of a mean). Every rank evaluates the whole
        batch, in the time and the memory that one process takes for it; what the ranks share are the local solves.
    micro_batch_size
        Samples that a rank runs the network over at a time, at most: the passes over larger shares of a batch are cut
        into micro-batches, whose losses, gradients and statistics are added up, and no more than one graph is kept.
        ``auto``: as many as there is memory for, in layout staged as ``pipeline.micro_batches`` makes them.
    schwarz, local, coarse, trust_region, global_step, pipeline
        Options of the parts; those of the pipeline are for layout staged.
    """

    layout: Literal["replicated", "staged"] = "replicated"
    subdomains: int | None = None
    replicas: int = 1
    batch: Literal["whole", "shard"] = "whole"
    seed: int = 0
    autocast: Literal["none", "bfloat16"] = "none"
    stall_timeout: float | None = None
    noise: Literal["none", "batches"] = "none"
    group_size: int = 1
    coupled: bool = False
    micro_batch_size: int | Literal["auto"] = "auto"
    schwarz: SchwarzOptions = field(default_factory=SchwarzOptions)
    local: LocalOptions = field(default_factory=LocalOptions)
    coarse: CoarseOptions = field(default_factory=CoarseOptions)
    trust_region: TrustRegionOptions = field(default_factory=TrustRegionOptions)
    global_step: GlobalStepOptions = field(default_factory=GlobalStepOptions)
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)

    @property
    def group(self) -> int | None:
        """Number of samples that the loss takes together; None: all."""
        return None if self.coupled else self.group_size

    def __post_init__(self) -> None:
        require_fields(self)
        require(self.subdomains is None or self.subdomains >= 1, "subdomains", self.subdomains, "give 1 or more")
        cuts = self.schwarz.cuts
        alike = self.subdomains is None or cuts is None or self.subdomains == len(cuts)
        require(alike, "subdomains", self.subdomains, f"schwarz.cuts {cuts} has another number; give one of the two")
        require(self.replicas >= 1, "replicas", self.replicas, "give 1 or more")
        require(self.group_size >= 1, "group_size", self.group_size, "give 1 or more")
        alone = not (self.coupled and self.group_size > 1)
        require(alone, "group_size", self.group_size, "with coupled all samples are one group; give one of the two")
        whole = not (self.coupled and self.batch == "shard")
        require(whole, "batch", self.batch, "with coupled every rank needs all samples; choose whole")
        metric = self.trust_region.metric
        everywhere = metric == "identity" or self.layout == "replicated"
        require(everywhere, "trust_region.metric", metric, "with layout 'staged' choose identity, or layout replicated")
        self._check_micro_batches()
        # Streams of random numbers are numbered from it in 64 bits.
        require(0 <= self.seed < 2**40, "seed", self.seed, "give 0 or more, below 2**40")
        limit = self.stall_timeout
        require(limit is None or limit > 0.0, "stall_timeout", limit, "give seconds above 0, or null")

    def _check_micro_batches(self) -> None:
        size, name = self.micro_batch_size, "micro_batch_size"
        if isinstance(size, str):
            require(size == "auto", name, size, "give 1 or more, or auto")
            return
        require(
            isinstance(size, int) and not isinstance(size, bool) and size >= 1, name, size, "give 1 or more, or auto"
        )
        require(not self.coupled, name, size, "with coupled all samples belong together; choose auto")
        whole = size >= self.group_size
        require(whole, name, size, f"groups of {self.group_size} samples (group_size) are not divided; give as many")

    @property
    def most(self) -> int | None:
        """Samples of a micro-batch, at most; None where the memory is to say."""
        return None if isinstance(self.micro_batch_size, str) else self.micro_batch_size
