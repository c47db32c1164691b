"""What trains a problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apts_mpi.apts import APTS
    from apts_mpi.train.average import TensorArrays
    from apts_mpi.train.baselines import DataParallel
    from apts_mpi.train.metrics import Outputs


@dataclass(frozen=True)
class Method:
    """What trains a problem, and what depends on the part of the network that a rank holds.

    Attributes
    ----------
    solver : APTS or DataParallel
        Makes the steps.
    outputs : callable
        How samples come through the network, see `apts_mpi.train.metrics.Outputs`.
    arrays : callable
        Makes arrays of a checkpoint of named tensors of the network, of which this rank may hold a part. Collective.
    part : int
        Ranks with the same one share the tensors of their part of the network.
    places : str
        Where the parts are, for those who watch; empty where all ranks hold all.
    notes : sequence of str
        What of a new run is other than asked for, one sentence each; a resumed one has them from `Training.load`.
    """

    solver: APTS | DataParallel
    outputs: Outputs
    arrays: TensorArrays
    part: int = 0
    places: str = ""
    notes: Sequence[str] = ()
