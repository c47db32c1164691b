"""Training of neural networks with the Additively Preconditioned Trust-Region Strategy over MPI ranks.

The names below are imported when they are first asked for: the solvers need MPI, and the commands that only read what
runs left behind work without it.
"""

import importlib
from typing import TYPE_CHECKING

from apts_mpi.tools.version import __version__

if TYPE_CHECKING:
    from apts_mpi import losses
    from apts_mpi.apts import APTS
    from apts_mpi.errors import InvalidInput, SharedInvalidInput, StallError
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
    from apts_mpi.trust_region.acceptance import Judged

__all__ = [
    "APTS",
    "APTSOptions",
    "CoarseOptions",
    "GlobalStepOptions",
    "InvalidInput",
    "Judged",
    "LocalOptions",
    "PipelineOptions",
    "SchwarzOptions",
    "SharedInvalidInput",
    "StagedAPTS",
    "StallError",
    "StepResult",
    "TrustRegionOptions",
    "__version__",
    "build_stage",
    "losses",
]

# Where a name is, if not among the options.
_PLACES = {
    "APTS": "apts",
    "InvalidInput": "errors",
    "Judged": "trust_region.acceptance",
    "SharedInvalidInput": "errors",
    "StagedAPTS": "staged.solver",
    "StallError": "errors",
    "StepResult": "result",
    "build_stage": "staged.build",
}

# Not for type checkers, which would take any name for one of the package.
if not TYPE_CHECKING:

    def __getattr__(name):
        """Import a name of `__all__`."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name == "losses":
            return importlib.import_module(f"{__name__}.{name}")
        module = importlib.import_module(f"{__name__}.{_PLACES.get(name, 'options')}")
        value = globals()[name] = getattr(module, name)
        return value

    def __dir__():
        """What is here, and what is imported when it is asked for."""
        return sorted({*globals(), *__all__})
