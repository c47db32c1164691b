"""Cuts between subdomains that move during training: by the coupling between layers, and in balance.

The off-diagonal of the reduced Gauss-Newton matrix, formed with a column a layer, says how strongly the corrections of
layers depend on each other. Where the local solver evaluates its objective, or has the dense matrix of the block, it
knows the coupling within: layers that are coupled strongly join, and cuts go to where coupling is weak. Others take
each layer (kfac) or parameter (adam) by itself, and coupling is known to the coarse level alone, between subdomains:
then cuts go to where it is strong. All among cuts that balance the local solves.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from apts_mpi.curvature.dense import LARGEST_DENSE
from apts_mpi.curvature.linearisation import Column
from apts_mpi.errors import InvalidInput, SharedInvalidInput
from apts_mpi.local.registry import needs_evaluations, solver_class
from apts_mpi.network.coupled_cuts import coupled_cuts
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.partition import Layer
from apts_mpi.objective.batch import Batch
from apts_mpi.objective.objective import Objective
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.reduced_curvature import TangentCurvature, share_of_samples

# Digits of couplings, as shares of the largest: ranks sum up in other orders, and cuts are not to depend on that.
DIGITS = 4


class Look(NamedTuple):
    """Where in the flat vector subdomains should begin, and the work of finding that on the rank with most."""

    cuts: tuple[int, ...]
    work: float


class AdaptiveCuts:
    """Looks from time to time where the cuts between subdomains should be.

    What decides is the batch, the last correction, and a model of what local solves cost; so cuts are the same on any
    number of ranks, and of a run that is resumed. With ``adaptive-timed`` it is the seconds that ranks have measured.

    Parameters
    ----------
    options
        Of the whole solver, composed.
    objective
        The global objective.
    comm
        All ranks.
    """

    def __init__(self, options: APTSOptions, objective: Objective, comm: Communicator) -> None:
        self._options, self._objective, self._comm = options, objective, comm
        self._is_timed = options.schwarz.partition == "adaptive-timed"
        if self._is_timed and objective.vector.values.device.type != "cpu":
            raise InvalidInput(
                "schwarz.partition: 'adaptive-timed' measures seconds of processors, and local solves on a "
                f"{objective.vector.values.device.type} device go on after them; choose adaptive"
            )
        self._sign = _worth_of_coupling(options)
        self._is_coupled = self._sign != 0
        # At the last look; None before the first one, up to which libraries set themselves up.
        self._seconds: float | None = None

    def is_due(self, iteration: int) -> bool:
        """Whether the iteration of this number, from 1, ends with a look."""
        return iteration % self._options.schwarz.repartition_every == 0

    def look(self, batch: Batch, correction: torch.Tensor, decomposition: Decomposition, seconds: float) -> Look:
        """See where the subdomains should begin. Collective.

        Parameters
        ----------
        batch
            The samples; on a part of them coupling is measured, at the present point.
        correction : Tensor, shape (n,)
            The last one that was assembled.
        decomposition
            The present one.
        seconds
            What local solves have taken this rank so far.
        """
        layers, parts = decomposition.layers, decomposition.subdomains
        before = self._comm.events.work
        coupling = self._coupling(batch, correction, decomposition)
        earlier, self._seconds = self._seconds, seconds
        is_measured = self._is_timed and earlier is not None
        costs = modelled_costs(decomposition, self._objective, self._options)
        begins = [layer.start for layer in layers]
        present = [*(begins.index(part.owned_start) for part in parts), len(layers)]

        def decide(table: np.ndarray) -> Sequence[float]:
            known = measured_costs(costs, present, decomposition, table[:, 0]) if is_measured else costs
            assert coupling is not None  # on rank 0
            chosen = coupled_cuts(known, self._sign * coupling, present)
            chosen = present if self._are_too_large(layers, chosen) else chosen
            return [table[:, 1].max(), *(begins[item] for item in chosen[:-1])]

        worked = self._comm.events.work - before
        work, *cuts = self._comm.agree([seconds - (earlier or 0.0), worked], decide)
        return Look(tuple(map(int, cuts)), work)

    def _are_too_large(self, layers: Sequence[Layer], cuts: Sequence[int]) -> bool:
        """Whether a dense block would be larger than a solver takes."""
        sizes = (layers[stop - 1].stop - layers[start].start for start, stop in itertools.pairwise(cuts))
        return solver_class(self._options.local.solver).dense and max(sizes) > LARGEST_DENSE

    def _coupling(self, batch: Batch, correction: torch.Tensor, decomposition: Decomposition) -> np.ndarray | None:
        """Couplings between layers, by the Gauss-Newton matrix along the correction's parts: on rank 0. Collective."""
        layers = decomposition.layers
        columns = [Column(layer.start, layer.stop, correction[layer.start : layer.stop]) for layer in layers]
        count = len(columns)
        # As many tangents as the coarse level has of its columns, two a subdomain, so that they take no more memory.
        fewer = min(1.0, 2.0 * len(decomposition.subdomains) / count)
        share = fewer * share_of_samples(self._options.coarse.samples, batch, self._objective.outputs_of_sample)
        curvature = TangentCurvature(self._objective, self._comm, share, approximates=True)
        model = None
        if self._is_coupled:
            try:
                products = correction.new_zeros(count + 1, count, dtype=torch.float64)
                model = curvature.form(batch, columns, products)
            except SharedInvalidInput as error:
                self._is_coupled = False
                self._comm.events.notes.add(
                    f"schwarz.partition: subdomains are balanced from now on, and their coupling is unknown ({error})"
                )
        if self._comm.rank > 0:
            return None
        return np.zeros((count, count)) if model is None else relative_coupling(model.curvature)


def relative_coupling(curvature: np.ndarray) -> np.ndarray:
    """Sizes of the entries between columns, as shares of the largest, rounded; 0 for what is not finite."""
    found = np.abs(np.nan_to_num(curvature, posinf=0.0, neginf=0.0))
    np.fill_diagonal(found, 0.0)
    return (found / (found.max() or 1.0)).round(DIGITS)


def _worth_of_coupling(options: APTSOptions) -> int:
    """Whether to have coupling within subdomains (1), between them (-1), or wherever it may be (0)."""
    if needs_evaluations(options.local) or solver_class(options.local.solver).dense:
        return 1
    return 0 if options.coarse.model == "none" else -1


def modelled_costs(decomposition: Decomposition, objective: Objective, options: APTSOptions) -> list[float]:
    """What an iteration of a local solve costs in each layer, in multiplications up to a factor.

    See `apts_mpi.local.LocalSolver.work`.
    """
    work, refresh = solver_class(options.local.solver).work, options.local.refresh or 1
    modules = [(layer, objective.network.get_submodule(layer.name)) for layer in decomposition.layers]
    return [work(layer, module, refresh).cost for layer, module in modules]


def measured_costs(
    modelled: Sequence[float], cuts: Sequence[int], decomposition: Decomposition, seconds: np.ndarray
) -> list[float]:
    """Seconds of each layer: those of the team that carries it, the slowest rank's, shared by the model."""
    teams, costs = decomposition.teams, list(modelled)
    for team in range(teams.count):
        carried, ranks = teams.subdomains_of(team), teams.ranks_of(team)
        items = range(cuts[carried.start], cuts[carried.stop])
        taken = float(seconds[ranks.start : ranks.stop].max()) / sum(modelled[item] for item in items)
        for item in items:
            costs[item] = taken * modelled[item]
    return costs


def move_batch(batch: Batch, decomposition: Decomposition) -> None:
    """Have the passes of a batch fill the caches of the present subdomains, which have the numbers of those before."""
    for part in batch.passes:
        part.subdomains = tuple(decomposition.subdomains[carried.index] for carried in part.subdomains)
