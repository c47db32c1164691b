"""APTS on noisy batches as an optimizer of torch: steps from gradients alone, in a ball that the next batch judges."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from mpi4py import MPI
from torch import nn

from apts_mpi.errors import InvalidInput
from apts_mpi.optim.ball import LOST, Ball, views_of
from apts_mpi.optim.calls import Calls
from apts_mpi.optim.checks import (
    check_groups,
    check_processes,
    check_radius,
    check_ranks,
    check_scaler,
    check_state,
    composed,
    solver_of,
)
from apts_mpi.optim.gathered import Gathered, gather
from apts_mpi.optim.subdomains import LayerSubdomain, find_subdomains, owners_of, shares_of_rounding
from apts_mpi.options import LocalOptions
from apts_mpi.parallel.guard import guarded
from apts_mpi.parallel.transport import Mirror

Result = TypeVar("Result")


class Moving(NamedTuple):
    """A parameter that moves, its part of the step, and its group."""

    parameter: torch.Tensor
    view: torch.Tensor
    group: dict[str, Any]


class APTS(torch.optim.Optimizer):
    """APTS for a loop of the user's own: the directions of all layers, their sum in the ball of a trust region.

    It sees gradients alone: of a closure, as ``torch.optim.LBFGS`` does, or of a backward pass before `step`. The
    radius follows the slope of each batch along the step before (``apts_mpi.trust_region.next_batch``), at one
    evaluation a step and without a learning rate to tune.

    Under MPI making it, `step` and `add_param_group` are collective. Rank 0's parameters are given to all; every rank's
    gradient is that of the mean loss of its own samples, as many on each, and all ranks take one step from the mean.
    Buffers stay those of each rank.

    Parameters
    ----------
    params
        A network, or what optimizers of torch take: parameters, named ones, or groups of them.
    lr
        Factor of the steps, for schedulers. Only its changes count: the radius follows the batches while the factor is
        at least 0.6 of the largest so far, and stays while it is smaller.
    weight_decay
        Share of its length by which every step also takes parameters of two dimensions or more towards the origin, in
        [0, 1): decoupled weight decay that knows no unit. Groups may have their own, and their own ``lr``.
    network
        The network, where ``params`` is not it. Without one each parameter is a subdomain of its own, and the local
        solver is muon; curvature, with kfac, is then that of the noise of the gradients.
    comm
        Any mpi4py intracommunicator; None is ``MPI.COMM_WORLD``.
    local
        ``solver``, kfac or muon, and its ``momentum``; of kfac ``damping``, ``decay`` and ``refresh``; None: as with
        ``noise batches``, see `apts_mpi.LocalOptions`. ``auto`` is muon for networks with embeddings, or layers that
        kfac does not know.
    initial_radius
        First radius. None: a tenth of the first direction's length, at most a hundredth of the parameters' norm.

    Raises
    ------
    InvalidInput
        On every rank, for parameters or values that cannot be used.
    """

    # A `torch.amp.GradScaler` then comes to `step`, which can refuse it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1.0,
        weight_decay: float = 0.0,
        *,
        network: nn.Module | None = None,
        comm: MPI.Intracomm | None = None,
        local: LocalOptions | None = None,
        initial_radius: float | None = None,
    ) -> None:
        self._is_made = False
        self._network = params if isinstance(params, nn.Module) else network
        self._comm = guarded(comm, None)
        self._calls, self._ball, self._initial_radius = Calls(), Ball(initial_radius), initial_radius
        if self._network is not None:
            self._calls.leave_out_compiled(self._network)
        self._subdomains: list[LayerSubdomain] = []
        self._owners: list[int] = []
        with self._comm.shared_errors():
            check_radius(initial_radius)
            self._local = composed(local)
            self._asked = self._local.solver
            given = params.parameters() if isinstance(params, nn.Module) else params
            super().__init__(given, {"lr": lr, "weight_decay": weight_decay})
            check_groups(self.param_groups)
        self._is_made = True
        self._find_subdomains()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled."""
        raise InvalidInput("APTS: it belongs to its ranks and its network; save or copy its state_dict()")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, see ``torch.optim.Optimizer``. Collective."""
        if not self._is_made:
            super().add_param_group(param_group)
            return
        before = len(self.param_groups)
        with self._comm.shared_errors():
            super().add_param_group(param_group)
            try:
                check_groups(self.param_groups)
            except InvalidInput:
                del self.param_groups[before:]
                raise
        self._find_subdomains()

    def _find_subdomains(self) -> None:
        """Have subdomains of all parameters; those that are there stay. Collective."""
        known = {id(parameter) for parameter in self._parameters()}
        fresh = [value for group in self.param_groups for value in group["params"] if id(value) not in known]
        check_ranks(fresh, self._comm)
        self._subdomains += find_subdomains(self._network, fresh)
        if self._local.solver == "auto":
            seldom = any(part.is_seldom_seen for part in self._subdomains)
            self._local = replace(self._local, solver="muon" if seldom else "kfac")
        self._owners = owners_of([part.cost for part in self._subdomains], self._comm.size, self._owners)
        self._listen()

    def _parameters(self) -> list[nn.Parameter]:
        """In the order of the flat vectors."""
        return [parameter for part in self._subdomains for parameter in part.parameters]

    def _listen(self) -> None:
        """Record, from now on, the calls that the next step needs."""
        self._calls.begin([part.module for part in self._subdomains if part.module is not None and part.wants_records])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See ``torch.optim.Optimizer``."""
        self._calls.forget_reached()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Result] | None = None) -> Result | None:  # type: ignore[override]
        """Do one step. Collective.

        Parameters
        ----------
        closure
            Sets the gradients to zero, evaluates the loss and its gradients, and returns the loss; called once. None:
            the gradients are there.

        Returns
        -------
        What the closure returned.

        Raises
        ------
        InvalidInput
            For gradients that a ``torch.amp.GradScaler`` has scaled, or processes of torch's that do not take part.
        """
        check_scaler(self)
        check_processes(self._comm)
        loss = None
        if closure is not None:
            self._calls.clear()
            with torch.enable_grad():
                loss = closure()
        if self._subdomains:
            self._take(gather(self._subdomains, self._calls.records, self._comm))
        self._listen()
        return loss

    def _take(self, found: Gathered) -> None:
        """Let the batch judge the last step, and take its own. Collective."""
        ball, gradient = self._ball, found.gradient
        ball.extend(gradient)
        after, square = self._agree(torch.dot(gradient, ball.last_step), torch.dot(gradient, gradient))
        if not (math.isfinite(after) and math.isfinite(square)):
            self._note_useless()
            return
        ball.useless = 0
        step = self._direction(found)
        moving = self._moving(step, found)
        factor = self._fit(step, moving)
        (slope,) = self._agree(torch.dot(gradient, step))
        if ball.judge(slope, after, factor):
            torch._foreach_add_([part.parameter for part in moving], [part.view for part in moving])
            ball.last_step = step

    def _agree(self, *numbers: torch.Tensor) -> tuple[float, ...]:
        """What rank 0 has of some numbers, on all ranks. Collective."""
        own = torch.stack(numbers)
        return tuple(own.tolist()) if self._comm.size == 1 else self._comm.decide(own.tolist)

    def _direction(self, found: Gathered) -> torch.Tensor:
        """The corrections of the subdomains that have gradients, shape (n,), on all ranks the same. Collective."""
        gradients = found.gradient.split([part.size for part in self._subdomains])
        directions, weight = [], 1.0 / self._comm.size
        rank, owners = self._comm.rank, self._owners
        for number, part in enumerate(self._subdomains):
            if any(found.active[number]):
                part.make_solver(found.called[number], self._local, self._comm)
                own = gradients[number], found.records[number], found.samples, weight, owners[number] == rank
                directions.append(part.direction(*own))
            else:
                directions.append(torch.zeros_like(gradients[number]))
        directions = self._assembled(directions)
        scales: Sequence[float] = shares_of_rounding(directions, gradients)
        if self._comm.size > 1:
            # They may have other bits on other ranks.
            scales = self._comm.decide(lambda: scales)
        return torch.cat(
            [part if scale == 1.0 else part * scale for part, scale in zip(directions, scales, strict=True)]
        )

    def _assembled(self, directions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The directions that the ranks have of their own subdomains, on all of them. Collective."""
        if self._comm.size == 1:
            return list(directions)
        order = sorted(range(len(directions)), key=self._owners.__getitem__)
        sizes = [len(directions[number]) for number in order]
        ends = list(
            itertools.accumulate(
                sum(len(part) for part, owner in zip(directions, self._owners, strict=True) if owner == rank)
                for rank in range(self._comm.size)
            )
        )
        pending, mirror = self._comm.pending(), Mirror(torch.cat([directions[number] for number in order]))
        self._comm.start_gather(pending, mirror, list(itertools.pairwise([0, *ends])))
        pending.wait()
        found = dict(zip(order, mirror.tensor.split(sizes), strict=True))
        return [found[number] for number in range(len(directions))]

    def _moving(self, step: torch.Tensor, found: Gathered) -> list[Moving]:
        """The parameters that have a gradient; in the places of the others the step becomes zero."""
        group_of = {id(value): group for group in self.param_groups for value in group["params"]}
        moving = []
        parameters, flags = self._parameters(), [flag for active in found.active for flag in active]
        for parameter, view, is_active in zip(parameters, views_of(step, parameters), flags, strict=True):
            if is_active and parameter.requires_grad:
                moving.append(Moving(parameter, view, group_of[id(parameter)]))
            else:
                view.zero_()
        return moving

    def _fit(self, step: torch.Tensor, moving: Sequence[Moving]) -> float:
        """Make a direction a step, in place: in the ball, with decay and factors. Collective.

        Returns
        -------
        float
            The largest of the factors.
        """
        if not moving:
            return 0.0
        values, views = [part.parameter for part in moving], [part.view for part in moving]
        norms = torch._foreach_norm(values)
        matrices = [norm for norm, value in zip(norms, values, strict=True) if value.dim() > 1] or [0.0 * norms[0]]
        told = step, torch.stack(norms), torch.stack(matrices)
        length, size, weights = self._agree(*map(torch.linalg.vector_norm, told))
        if not 0.0 < length < math.inf:
            step.zero_()
            return 0.0
        radius = self._ball.begin(length, size)
        scale = min(1.0, radius / length)
        step.mul_(scale)
        decays = [float(part.group["weight_decay"]) if part.parameter.dim() > 1 else 0.0 for part in moving]
        if any(decays):
            pulls = [-decay * scale * length / (weights or 1.0) for decay in decays]
            torch._foreach_add_(views, torch._foreach_mul(values, pulls))
            (length,) = self._agree(torch.linalg.vector_norm(step))
            step.mul_(min(1.0, radius / length) if length > 0.0 else 1.0)
        factors = [float(part.group["lr"]) for part in moving]
        if any(factor != 1.0 for factor in factors):
            torch._foreach_mul_(views, factors)
        return max(factors)

    def _note_useless(self) -> None:
        """Undo the last step where it has led to where no gradient is finite."""
        lost = self._ball.is_lost()
        if lost:
            parameters = self._parameters()
            for parameter, view in zip(parameters, views_of(self._ball.last_step, parameters), strict=True):
                if view.any():
                    parameter.sub_(view)
        if self._ball.useless == LOST and self._comm.rank == 0:
            done = "the last step is undone and the radius halved" if lost else "no step is taken"
            warnings.warn(
                f"apts_mpi.optim: the gradients of {LOST} batches in a row are not finite, {done}; look for nan and "
                "inf in the inputs, the targets and the loss",
                stacklevel=3,
            )

    def state_dict(self) -> dict[str, Any]:
        """See ``torch.optim.Optimizer``; not collective, as all ranks have the same."""
        parameters = self._parameters()
        if len(self._ball.last_step):
            for parameter, view in zip(parameters, views_of(self._ball.last_step, parameters), strict=True):
                self.state[parameter]["last_step"] = view.clone()
            for part in self._subdomains:
                self.state[part.parameters[0]]["subdomain"] = part.state()
            self.state[parameters[0]]["ball"] = self._ball.state()
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See ``torch.optim.Optimizer``; not collective, all ranks have to be given the same.

        Raises
        ------
        InvalidInput
            For the state of another optimizer, or of one for another network.
        """
        check_state(state_dict)
        kept = [state for state in state_dict.get("state", {}).values() if isinstance(state, dict)]
        solver = solver_of([state.get("subdomain", {}) for state in kept], self._asked, self._local.solver)
        self._local = replace(self._local, solver=solver)
        super().load_state_dict(state_dict)
        parameters, saved = self._parameters(), dict(self.state)
        self.state.clear()
        balls = [kept["ball"] for kept in saved.values() if "ball" in kept]
        self._ball = Ball(self._initial_radius)
        if balls:
            steps = [saved[parameter]["last_step"].flatten() for parameter in parameters]
            self._ball.restore(balls[0], torch.cat(steps))
        for part in self._subdomains:
            part.restore(saved.get(part.parameters[0], {}).get("subdomain", {}), self._local, self._comm)
        self._listen()
