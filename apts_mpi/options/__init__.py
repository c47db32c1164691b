"""The configuration of the solver: frozen dataclasses, validated on construction.

It may import errors. Read ``solver`` first, then ``levels`` and ``trust_region``; ``methods`` has those of the papers.
"""

from apts_mpi.options.levels import (
    ENOUGH_TARGETS,
    LOCAL_SOLVERS,
    SUBDOMAINS,
    USUAL_LARGEST,
    CoarseOptions,
    LocalData,
    LocalOptions,
    PartitionName,
    SchwarzOptions,
)
from apts_mpi.options.solver import APTSOptions, PipelineOptions
from apts_mpi.options.trust_region import GlobalModelName, GlobalStepOptions, TrustRegionOptions

__all__ = [
    "ENOUGH_TARGETS",
    "LOCAL_SOLVERS",
    "SUBDOMAINS",
    "USUAL_LARGEST",
    "APTSOptions",
    "CoarseOptions",
    "GlobalModelName",
    "GlobalStepOptions",
    "LocalData",
    "LocalOptions",
    "PartitionName",
    "PipelineOptions",
    "SchwarzOptions",
    "TrustRegionOptions",
]
