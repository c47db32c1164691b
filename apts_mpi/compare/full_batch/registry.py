"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from apts_mpi.compare.full_batch.adam_then_lbfgs import AdamThenLBFGS
from apts_mpi.compare.full_batch.levenberg_marquardt import LevenbergMarquardt
from apts_mpi.compare.full_batch.self_scaled_broyden import SelfScaledBroyden
from apts_mpi.compare.full_batch.spring import Spring
from apts_mpi.compare.full_batch.squares import Squares


class Method(Protocol):
    """What minimises squares."""

    @property
    def point(self) -> Tensor:
        """Where it is, (n,)."""

    def step(self, share: float) -> None:
        """One iteration; ``share`` of the run is behind it."""


# What makes each of what to minimise and the value of what is tuned, see `apts_mpi.compare.full_batch.options`.
MAKERS: dict[str, Callable[[Squares, float], Method]] = {
    "spring": Spring,
    "levenberg-marquardt": LevenbergMarquardt,
    "broyden": lambda squares, _: SelfScaledBroyden(squares),
    "adam-lbfgs": AdamThenLBFGS,
}
