"""Additive Schwarz over the parameters: local solves in parallel, and their corrections put together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from apts_mpi.curvature.kinds import Curvature, make_curvature
from apts_mpi.curvature.linearisation import Column
from apts_mpi.local.gradient import ensure_descent, make_local_solver
from apts_mpi.local.kfac import KFAC
from apts_mpi.local.objective import GaussNewtonRows, LocalObjective
from apts_mpi.network.partition import Layer, Layout, Subdomain, layers_between, multiplicity
from apts_mpi.objective.objective import Cache, Objective
from apts_mpi.objective.reduction import BUCKET_BYTES
from apts_mpi.options import LocalOptions, SchwarzOptions, TrustRegionOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.nonblocking import Pending
from apts_mpi.parallel.transport import Mirror
from apts_mpi.tools.events import Events
from apts_mpi.trust_region.subproblem import subdomain_radius


class AdditiveSchwarz:
    """The preconditioner: s = sum over d of R_d^T W_d (theta_d* - R_d theta_k).

    Parameters
    ----------
    options, local_options, trust_region
        Its options, those of the local solvers and of the ball.
    objective
        The global objective.
    subdomains, layers, layout
        All subdomains, the layers of the network, and the ranks that carry them.
    comm, team
        All ranks, and those that carry the same subdomains as this one.
    count
        Number of all subdomains that share the ball, which may be more than those given here.
    recombined
        Whether `columns` will be asked for.
    events
        Where work and messages are counted.
    rows
        What computes the rows of local solver gauss-newton.

    Attributes
    ----------
    subdomains, layers, comm
        As given.
    leads : bool
        Whether this rank speaks for its team.
    correction : Tensor, shape (n,)
        The assembled correction, once the pending operation has completed.
    local_solver : str
        Name of the local solver.
    solvers : dict of int to LocalSolver
        Local solvers of the subdomains that this rank carries, with their state.
    rows : list of GaussNewtonRows
        Those of each pass at the point of the last correction; computed if a local solver has asked for them.
    """

    def __init__(
        self,
        *,
        options: SchwarzOptions,
        local_options: LocalOptions,
        trust_region: TrustRegionOptions,
        objective: Objective,
        subdomains: Sequence[Subdomain],
        layers: Sequence[Layer],
        layout: Layout,
        comm: Communicator,
        team: Communicator,
        count: int,
        recombined: bool,
        events: Events,
        rows: type[GaussNewtonRows] = GaussNewtonRows,
    ) -> None:
        self._objective = objective
        self.comm = comm
        self._team = team
        self._events = events
        self.local_solver = local_options.solver
        self._damping = options.damping
        self._norm = trust_region.norm
        self.subdomains = subdomains
        self.layers = layers
        self._data = options.decomposition == "data"
        # A mean of steps within a ball lies in it.
        self._count = 1 if self._data else count
        self._values = objective.vector.values
        own_team = layout.team_of(comm.rank)
        self.carried = tuple(subdomains[index] for index in layout.subdomains_of(own_team))
        self.solvers = {
            subdomain.index: make_local_solver(
                local_options,
                trust_region,
                self._values[subdomain.start : subdomain.stop],
                _curvatures(objective.network, layers, subdomain) if local_options.solver == "kfac" else (),
                team,
            )
            for subdomain in self.carried
        }
        self._make_rows = rows
        self._largest_batch = 0
        self.rows: list[GaussNewtonRows] = []
        self.correction = torch.zeros_like(self._values)
        self._mirror = Mirror(self.correction)
        self._disjoint = not self._data and (options.overlap == 0 or options.type == "restrict")
        self._weights = {} if self._disjoint else _weights(subdomains, self.carried, self._values)
        self.leads = team.rank == 0
        self._ranges = [_led_range(layout, subdomains, rank) for rank in range(comm.size)]
        self._stack: torch.Tensor | None = None
        if self._data and recombined:
            # Columns over all parameters cannot share one vector: every rank holds all of them.
            size = self._values.numel()
            self._stack = self._values.new_zeros(len(subdomains) * size)
            self._mirror = Mirror(self._stack)
            self._ranges = [_led_rows(layout, size, rank) for rank in range(comm.size)]

    def start_correction(
        self,
        caches: Sequence[Sequence[Cache]],
        samples: Sequence[float],
        batch_size: int,
        gradient: torch.Tensor,
        radius: float,
    ) -> Pending:
        """Solve this rank's local problems and start to assemble the corrections. Collective.

        The network's parameters are afterwards as before.

        Parameters
        ----------
        caches
            Caches of each pass of this rank.
        samples
            This rank's share of its team's samples in each pass.
        batch_size
            Number of samples of the batch.
        gradient : Tensor, shape (n,)
            The global gradient.
        radius
            Radius of the ball that will hold the assembled correction.

        Raises
        ------
        SharedInvalidInput
            On every rank, for what a local solver cannot do.
        """
        local_radius = subdomain_radius(radius, self._count, self._norm)
        if not self._disjoint:
            self.correction.zero_()
        self.open_rows(caches)
        # What cannot be done shows the first time, or with a larger batch.
        tried, self._largest_batch = batch_size <= self._largest_batch, max(batch_size, self._largest_batch)
        with self._events.timed("local solves"), nullcontext() if tried else self.comm.shared_refusals():
            for weight, of_pass, rows in zip(samples, caches, self.rows, strict=True):
                for cache in of_pass:
                    self._solve(cache, rows, weight, gradient, local_radius)
        with self._events.timed("assembly"):
            return self._start_assembly()

    def open_rows(self, caches: Sequence[Sequence[Cache]]) -> None:
        """Have `rows` ready to be computed at the present parameters, for the caches of each pass there."""
        self.rows = [self._make_rows(self._objective, of_pass, self._events) for of_pass in caches]

    def _solve(
        self,
        cache: Cache,
        rows: GaussNewtonRows,
        weight: float,
        gradient: torch.Tensor,
        radius: float,
    ) -> None:
        subdomain = cache.subdomain
        local = LocalObjective(
            self._objective,
            cache,
            gradient[subdomain.start : subdomain.stop],
            self._team,
            weight,
            self._events,
            rows,
        )
        start = local.block.clone()
        self.solvers[subdomain.index].solve(local, radius, self._norm)
        displacement = local.block - start
        local.block.copy_(start)
        if self._stack is not None:
            size = len(displacement)
            descent = ensure_descent(local.gradient, displacement, radius, self._norm)
            self._stack[subdomain.index * size : (subdomain.index + 1) * size] = descent
        elif self._disjoint:
            owned = slice(subdomain.owned_start, subdomain.owned_stop)
            inner = displacement[owned.start - subdomain.start : owned.stop - subdomain.start]
            self.correction[owned] = ensure_descent(gradient[owned], inner, radius, self._norm)
        elif self.leads:
            weights = self._weights[subdomain.index]
            weighted = ensure_descent(local.gradient * weights, displacement * weights, radius, self._norm)
            self.correction[subdomain.start : subdomain.stop] += weighted

    @property
    def assembled(self) -> torch.Tensor:
        """What the pending operation completes: the correction, or one after the other those of all data subdomains."""
        return self._mirror.tensor

    def columns(self) -> list[Column]:
        """The corrections one by one, for the coarse level: of each subdomain's own parameters, or all of them."""
        parts = [(part.owned_start, part.owned_stop) for part in self.subdomains]
        if self._stack is None:
            return [Column(start, stop, self.correction[start:stop]) for start, stop in parts]
        rows = self._stack.view(len(parts), -1)
        return [Column(start, stop, row) for (start, stop), row in zip(parts, rows, strict=True)]

    def precondition(self, residual: torch.Tensor, solved: Mirror) -> None:
        """Put the inverse curvature of each subdomain times its part of ``residual`` into ``solved``. Collective.

        For local solver kfac: the additive Schwarz preconditioner with the blocks of the layers that each subdomain
        owns, which is symmetric positive definite.

        Parameters
        ----------
        residual : Tensor, shape (n,)
            A vector that is the same on all ranks, up to rounding.
        solved : Mirror of a tensor of shape (n,)
            Where the result goes.
        """
        for subdomain in self.carried:
            solver = self.solvers[subdomain.index]
            assert isinstance(solver, KFAC)
            direction = solver.direction(residual[subdomain.start : subdomain.stop])
            owned = slice(subdomain.owned_start, subdomain.owned_stop)
            inner = direction[owned.start - subdomain.start : owned.stop - subdomain.start]
            torch.neg(inner, out=solved.tensor[owned])
        pending = self.comm.pending()
        self.comm.start_gather(pending, solved, self._ranges)
        pending.wait()

    def _start_assembly(self) -> Pending:
        """Gather disjoint corrections, which moves half of what a sum does; sum overlapping ones bucket by bucket."""
        pending = self.comm.pending()
        if self._damping != 1.0:
            self._mirror.tensor.mul_(self._damping)
        if self._disjoint or self._stack is not None:
            self.comm.start_gather(pending, self._mirror, self._ranges)
            return pending
        bucket = BUCKET_BYTES // self.correction.element_size()
        size = self.correction.numel()
        for start in range(0, size, bucket):
            stop = min(start + bucket, size)
            self.comm.start_sum(pending, self._mirror, self._mirror, start, stop)
        return pending


def _curvatures(
    network: torch.nn.Module, layers: Sequence[Layer], subdomain: Subdomain
) -> list[tuple[Curvature, torch.nn.Module, slice]]:
    """The layers of a subdomain with their curvature and their range within its block."""
    found = []
    for layer in layers_between(layers, subdomain.start, subdomain.stop):
        module = network.get_submodule(layer.name)
        part = slice(layer.start - subdomain.start, layer.stop - subdomain.start)
        found.append((make_curvature(module, layer.stop - layer.start), module, part))
    return found


def _weights(
    subdomains: Sequence[Subdomain], carried: Sequence[Subdomain], like: torch.Tensor
) -> dict[int, torch.Tensor]:
    """W_d of the carried subdomains: one over the number of subdomains that share an index."""
    weights = {}
    for subdomain in carried:
        weight = torch.empty(subdomain.stop - subdomain.start, dtype=like.dtype, device=like.device)
        for start, stop, count in multiplicity(subdomains, subdomain):
            weight[start - subdomain.start : stop - subdomain.start] = 1.0 / count
        weights[subdomain.index] = weight
    return weights


def _led_range(layout: Layout, subdomains: Sequence[Subdomain], rank: int) -> tuple[int, int]:
    """Range of the vector whose correction a rank hands out: its team's if it leads the team, else none."""
    team = layout.team_of(rank)
    carried = layout.subdomains_of(team)
    start = subdomains[carried[0]].owned_start
    leads = layout.ranks_of(team).start == rank
    return start, subdomains[carried[-1]].owned_stop if leads else start


def _led_rows(layout: Layout, size: int, rank: int) -> tuple[int, int]:
    """The same of the stack of corrections, which has a row of ``size`` elements a subdomain."""
    team = layout.team_of(rank)
    carried = layout.subdomains_of(team)
    leads = layout.ranks_of(team).start == rank
    return carried.start * size, (carried.stop if leads else carried.start) * size
