"""APTS on a network of which each rank holds a stage: the inexact strategy in a pipeline (IAPTS, arXiv 2512.14286)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mpi4py import MPI

from apts_mpi.apts import APTS
from apts_mpi.data import Half
from apts_mpi.objective.passes import Loss
from apts_mpi.options import APTSOptions
from apts_mpi.staged.holding import Staged


class StagedAPTS(APTS):
    """`APTS` for networks larger than one device: rank d stores and updates the parameters of its stage alone.

    The inexact strategy, on the whole batch: its iterates are those of `APTS` with the same subdomains, the inexact
    variant and ``local_data full``, whatever the number of micro-batches and the schedule. Random masks and batch
    normalisation are those of micro-batches. Making a solver is collective.

    Parameters
    ----------
    network
        An ``nn.Sequential``, nested or not, cut between its modules. This rank's stage has to be in memory, as
        `build_stage` makes it, or all of it. Afterwards it has placeholders where other ranks hold the modules.
    loss
        Function of (outputs, targets) that returns the mean over samples, shape (); called on the last stage.
    comm
        Any mpi4py intracommunicator of stages times replicas ranks; None is ``MPI.COMM_WORLD``.
    options
        The configuration; the attribute has what its ``auto`` values stand for.
    sample
        Inputs of a sample or more, for ``pipeline.balance cost`` alone.

    Attributes
    ----------
    holding : Staged
        What this rank holds; its ``stages`` are all stages, its ``processes``, for each rank, its stage and its process
        in words, and its ``notes`` what of the subdomains is other than asked for; `load` returns these as well.

    Raises
    ------
    InvalidInput
        On every rank, for a network that cannot be cut or options that cannot be used.
    """

    holding: Staged

    def __init__(
        self,
        network: torch.nn.Module,
        loss: Loss,
        *,
        comm: MPI.Intracomm | None = None,
        options: APTSOptions | None = None,
        sample: torch.Tensor | Half | None = None,
    ) -> None:
        self._begin(Staged(network, loss, comm, options or APTSOptions(layout="staged"), sample))

    def evaluate(self) -> None:
        """Evaluate loss and gradient of the batch of the last step once more, for timings. Collective."""
        self.holding.objective.evaluate(self.batch.passes)

    def infer(self, inputs: Sequence[torch.Tensor | Half], consume: Callable[[int, torch.Tensor], None]) -> None:
        """Run the network forwards as it is (in evaluation mode, say). Collective over the stages of a replica.

        Parameters
        ----------
        inputs
            Micro-batches; of the stages but the first one their numbers of samples alone count.
        consume
            Called on the last stage with the number of each and its outputs.
        """
        self.holding.objective.infer(inputs, consume)
