"""Training of neural networks with the Additively Preconditioned Trust-Region Strategy over MPI ranks."""

from apts_mpi.apts import APTS
from apts_mpi.errors import InvalidInput
from apts_mpi.options import (
    APTSOptions,
    CoarseOptions,
    GlobalStepOptions,
    LocalOptions,
    PipelineOptions,
    SchwarzOptions,
    TrustRegionOptions,
)
from apts_mpi.result import StepResult
from apts_mpi.staged.build import build_stage
from apts_mpi.staged.solver import StagedAPTS

__version__ = "0.1.0"

__all__ = [
    "APTS",
    "APTSOptions",
    "CoarseOptions",
    "GlobalStepOptions",
    "InvalidInput",
    "LocalOptions",
    "PipelineOptions",
    "SchwarzOptions",
    "StagedAPTS",
    "StepResult",
    "TrustRegionOptions",
    "build_stage",
]
