"""The package pytorch_optimizer, which is there or not: users of other optimizers need none of it."""

from __future__ import annotations

import importlib.util
from typing import Any

from apts_mpi.errors import require
from apts_mpi.train.options import PEERS

PACKAGE = "pytorch_optimizer"


def check_installed(optimizer: str) -> None:
    """Raise `InvalidInput` for an optimizer of the package where it is not installed."""
    there = optimizer not in PEERS or importlib.util.find_spec(PACKAGE) is not None
    remedy = f"it needs {PACKAGE}, which is not installed; pip install apts_mpi[compare], or choose another"
    require(there, "optimizer", optimizer, remedy)


def classes() -> Any:
    """The package, with its classes; see `check_installed`."""
    # Not above: it takes as long to import as all of this package.
    import pytorch_optimizer

    return pytorch_optimizer
