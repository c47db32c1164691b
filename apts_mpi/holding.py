"""What the loop asks of what a rank holds: all of a network, or a part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.checkpoint.format import Checkpoint
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.watch import NetworkWatch
from apts_mpi.objective.batch import Batch, Samples
from apts_mpi.objective.objective import Objective
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.additive import AdditiveSchwarz
from apts_mpi.schwarz.coarse import CoarseLevel
from apts_mpi.schwarz.plateau import Plateau
from apts_mpi.schwarz.residual_level import ResidualLevel
from apts_mpi.trust_region.global_step import GlobalStep
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.next_batch import LastStep


class Holding(Protocol):
    """All of a network or a part of it, and the parts of the solver that work on it.

    Attributes
    ----------
    network
        The network.
    options
        Composed.
    comm
        All ranks.
    inner
        Inner products of vectors of all parameters, and the norm of the ball.
    decomposition
        The subdomains of the parameters held here.
    watch
        What notices changes of the network.
    schwarz, coarse, global_step, last_step, plateau
        The parts; None for one that is switched off.
    """

    network: torch.nn.Module
    options: APTSOptions
    comm: Communicator
    inner: InnerProducts
    decomposition: Decomposition
    watch: NetworkWatch
    schwarz: AdditiveSchwarz
    coarse: CoarseLevel | ResidualLevel | None
    global_step: GlobalStep | None
    last_step: LastStep | None
    plateau: Plateau | None

    @property
    def objective(self) -> Objective:
        """The global objective."""

    @property
    def parameters(self) -> int:
        """Number of parameters that are trained, on all ranks together."""

    @property
    def smallest_batch(self) -> int:
        """Samples that a batch needs."""

    @property
    def most(self) -> int | None:
        """Samples that a rank runs the network over at a time, at most; None: all that it has."""

    def cut(self, samples: Samples, rows: torch.Tensor | None, stream: tuple[int, ...]) -> Batch:
        """The batch as this rank sees it, with random numbers keyed by ``stream``. Collective."""

    def check_loss(self, batch: Batch, doubted: bool = False) -> None:
        """Raise `SharedInvalidInput` for a loss that is not what the method minimises. Collective.

        The first batch is looked at, or one where it is ``doubted``: the loss is then evaluated many times.
        """

    def adapt(self, batch: Batch, iteration: int, accepted: bool, forget: Callable[[], None]) -> float:
        """Move the cuts between subdomains, at the end of an iteration, where they are adaptive. Collective.

        Parameters
        ----------
        batch
            Of the iteration; it follows.
        iteration, accepted
            Its number, from 1, and whether the parameters changed in it.
        forget
            Called where the cuts move, so that what is known of the point in the old subdomains is not.

        Returns
        -------
        float
            What it took to measure, of the rank with most, see ``apts_mpi.tools.events.Events.work``.
        """

    def save(self, correction: torch.Tensor | None) -> tuple[list[Array], dict[str, Any]]:
        """Arrays and metadata of a checkpoint, with a correction that is to be used again. Collective."""

    def load(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> tuple[torch.Tensor | None, list[str]]:
        """The inverse of `save`: returns the correction, and what could not be taken over."""

    def describe(self) -> str:
        """The composed solver, in words."""


def kept_steps(holding: Holding) -> list[torch.Tensor]:
    """The steps that the parts keep, which have the same bits on all ranks that hold them."""
    coarse, last = holding.coarse, holding.last_step
    return ([] if coarse is None else [coarse.last_step]) + ([] if last is None else [last.vector])
