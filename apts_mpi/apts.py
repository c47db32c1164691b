"""The Additively Preconditioned Trust-Region Strategy: the loop and its state (arXiv 2512.14286)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from apts_mpi.checkpoint import Array, Checkpoint
from apts_mpi.defaults import compose, describe, may_be_dense, split_parameters
from apts_mpi.local.gradient import needs_evaluations
from apts_mpi.local.objective import GaussNewtonRows
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.partition import Layout
from apts_mpi.network.segments import Forward, SegmentedNetwork
from apts_mpi.objective.batch import passes_of_batch, samples_of_pass, team_shares
from apts_mpi.objective.loss_check import check_objective
from apts_mpi.objective.objective import Loss, Objective, Pass, Run
from apts_mpi.options import APTSOptions, lower_precision
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.additive import AdditiveSchwarz
from apts_mpi.schwarz.coarse import CoarseLevel
from apts_mpi.state.solver import load_solver, save_solver
from apts_mpi.state.tensors import named_tensors
from apts_mpi.tools.environment import seconds
from apts_mpi.tools.events import Events
from apts_mpi.trust_region.acceptance import Judged, State, StepResult, judge_table, judged_of
from apts_mpi.trust_region.global_step import GlobalStep
from apts_mpi.trust_region.initial_radius import cauchy_length
from apts_mpi.trust_region.inner_products import InnerProducts


@dataclass(frozen=True)
class Saved:
    """What was known at the point of a checkpoint: loss, gradient, and a rejected correction to be used again."""

    evaluated: bool = False
    differentiated: bool = False
    correction: torch.Tensor | None = None


class APTS:
    """Trains a network with nonlinear additive Schwarz over its parameters inside a trust region.

    The network's own parameters are the iterate: between steps ``network(x)`` and ``network.state_dict()`` just work.
    Making a solver is collective: rank 0's parameters and buffers are given to all ranks.

    Parameters
    ----------
    network
        An ``nn.Module`` with float32 or float64 parameters; an ``nn.Sequential`` lets local solves leave layers out.
    loss
        Function of (outputs, targets) that returns the mean over samples, shape ().
    comm
        Any mpi4py intracommunicator; None is ``MPI.COMM_WORLD``.
    options
        The configuration; the attribute has what its ``auto`` values stand for.
    forward
        Function of (network, inputs) that returns the outputs, for a loss that needs more of the network than its
        values (derivatives, several calls). None is ``network(inputs)``.

    Raises
    ------
    InvalidInput
        On every rank, for a network or options that cannot be used.

    Examples
    --------
    >>> solver = APTS(network, torch.nn.functional.cross_entropy)
    >>> result = solver.step((inputs, targets))
    """

    def __init__(
        self,
        network: torch.nn.Module,
        loss: Loss,
        *,
        comm: MPI.Intracomm | None = None,
        options: APTSOptions | None = None,
        forward: Forward | None = None,
    ) -> None:
        options = options or APTSOptions()
        self.network = network
        self.events = Events()
        self.comm = Communicator(MPI.COMM_WORLD if comm is None else comm, self.events)
        with self.comm.shared_errors():
            segmented = SegmentedNetwork(network, forward, lower_precision(options.autocast))
            self.vector = FlatParameters(network)
            self.layers = segmented.layers(self.vector)
            dense = may_be_dense(options, network, called=forward is not None)
            self.subdomains = split_parameters(options, self.layers, self.comm.size, dense)
            count = len(self.subdomains)
            self.layout = Layout(self.comm.size, count, options.replicas)
            options = compose(
                options,
                network=network,
                loss=loss,
                called=forward is not None,
                layers=self.layers,
                subdomains=self.subdomains,
            )
        self.options = options
        self.products = InnerProducts(options.trust_region.norm)
        self.comm.share_tensors([self.vector.values, *network.buffers()])
        team = self.comm.group(self.layout.team_of(self.comm.rank))
        self.objective = Objective(
            network=network,
            segmented=segmented,
            vector=self.vector,
            loss=loss,
            inexact=options.schwarz.variant == "inexact",
            keep_gradients=needs_evaluations(options.local),
            recorded=self._recorded() if options.local.solver == "kfac" else (),
            comm=self.comm,
            events=self.events,
        )
        self.schwarz = AdditiveSchwarz(
            options=options.schwarz,
            local_options=options.local,
            trust_region=options.trust_region,
            objective=self.objective,
            subdomains=self.subdomains,
            layers=self.layers,
            layout=self.layout,
            comm=self.comm,
            team=team,
            count=len(self.subdomains),
            recombined=options.coarse.model != "none",
            events=self.events,
        )
        self.coarse = None
        if options.coarse.model != "none":
            self.coarse = CoarseLevel(
                options=options.coarse,
                objective=self.objective,
                subdomains=self.subdomains,
                comm=self.comm,
                events=self.events,
                kind=options.trust_region.norm,
            )
        self.global_step = None
        if options.global_step.model != "none":
            blocks = options.local.solver == "kfac" and options.schwarz.decomposition == "parameters"
            self.global_step = GlobalStep(
                options=options.global_step,
                objective=self.objective,
                schwarz=self.schwarz if blocks else None,
                comm=self.comm,
                events=self.events,
                products=self.products,
            )
        self._begin(team)

    def _begin(self, team: Communicator) -> None:
        """Have done no iteration yet."""
        self.state = State(radius=self.options.trust_region.initial_radius)
        self._team = team
        # Of the evaluations.
        self._epsilon = torch.finfo(lower_precision(self.options.autocast) or self.vector.values.dtype).eps
        self._accepted_values = self.vector.values.clone()
        self._versions = self.vector.versions()
        self._passes: list[Pass] = []
        self._team_shares: list[float] = []
        self._run: Run | None = None
        self._loss_is_checked = False
        self._has_gradient = False
        self._has_correction = False
        self._saved = Saved()

    def step(
        self, batch: tuple[torch.Tensor, torch.Tensor] | None = None, rows: torch.Tensor | None = None
    ) -> StepResult:
        """Do one iteration: evaluate, solve locally, assemble, judge. Collective.

        Parameters
        ----------
        batch
            Inputs and targets, with the samples in the first dimension: the whole batch on every rank, or this rank's
            own shard (``options.batch``). None is the batch of the step before: after an accepted step its forward
            pass is not done again, after a rejected one gradient and corrections are not computed again.
        rows : Tensor of int, optional
            The samples of ``batch`` that count, in this order, the same on every rank: a rank copies its own part only.

        Raises
        ------
        InvalidInput
            On every rank, for a batch that is too small, a network whose parameters were moved, or, in the first step,
            a loss that is not the mean over the samples.
        """
        started = seconds()
        self.events.work = 0.0
        repeated = batch is None
        if batch is not None:
            self._take(batch, rows)
        elif self.vector.versions() != self._versions:  # the user has loaded other parameters
            self.vector.check_alias()
            self._forget()
        self._versions = self.vector.versions()
        self._evaluate()
        if self.state.radius is None:
            with self.events.timed("global evaluation"):
                self.state.radius = cauchy_length(
                    self.objective,
                    self._passes,
                    self.products,
                    self.comm,
                    self.options.trust_region,
                    epsilon=self._epsilon,
                    scratch=self._accepted_values,
                )
        schwarz = self._judge(*self._correct(), keep_graph=repeated)
        if self.coarse is not None:
            self.coarse.follow(schwarz.accepted, schwarz.rho < self.options.trust_region.shrink_below)
        global_step = self._take_global_step(repeated) if self.global_step is not None else None
        self.state.iteration += 1
        moved = schwarz.accepted or (global_step is not None and global_step.accepted)
        self.state.accepted += moved
        self.state.rejected += not moved
        evaluations = self._most_work * self.comm.size / self._batch_size
        self.state.gradient_evaluations += evaluations
        return StepResult(self.state.iteration, schwarz, global_step, evaluations, seconds() - started)

    def _take(self, batch: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor | None) -> None:
        """Make a new batch the present function f_k."""
        self.state.functions += 1
        with self.events.timed("data"):
            self._cut(batch, rows)
            if not self._loss_is_checked:
                self._check_loss(batch, rows)
                self._loss_is_checked = True

    def _check_loss(self, batch: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor | None) -> None:
        check_objective(self.objective, self._passes[0], batch, rows, self.comm)

    def _cut(self, batch: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor | None) -> None:
        """Cut the batch of the present function into this rank's passes."""
        with self.comm.shared_errors():
            self.vector.check_alias()
        local_data = self.options.schwarz.local_data
        self._passes, self._batch_size = passes_of_batch(
            batch,
            rows,
            layout=self.layout,
            subdomains=self.subdomains,
            comm=self.comm,
            local_data=local_data,
            whole=self.options.batch == "whole",
            stream=(self.options.seed, self.state.functions),
            least=samples_of_pass(self.network),
        )
        self._team_shares = team_shares(self._passes, self._team)
        self._forget()

    def _forget(self) -> None:
        """The point or the function changed: nothing known of it holds any more."""
        self._run = None
        self._has_gradient = self._has_correction = False

    def _evaluate(self) -> None:
        """Have loss, gradient and caches at the present point."""
        with self.events.timed("global evaluation"):
            if self._run is None:
                self._run = self.objective.evaluate(self._passes)
            elif not self._has_gradient:
                self.objective.backward(self._passes, self._run)
            if not self._has_gradient:
                self._has_gradient = True
                if self.global_step is not None:
                    self.global_step.observe(self.state.functions, self._gradient)

    @property
    def _radius(self) -> float:
        """Of the ball, which the first gradient gives at the latest."""
        assert self.state.radius is not None
        return self.state.radius

    @property
    def _evaluated(self) -> Run:
        """The evaluation at the present point."""
        assert self._run is not None
        return self._run

    @property
    def _gradient(self) -> torch.Tensor:
        return self.objective.reduction.total

    def _correct(self) -> tuple[torch.Tensor, float | None]:
        """The Schwarz step within the ball of the present radius, and its predicted reduction if a model gave it."""
        correction = self.schwarz.correction
        if not self._has_correction:
            pending = self.schwarz.start_correction(
                self._evaluated.caches, self._team_shares, self._batch_size, self._gradient, self._radius
            )
            with self.events.timed("assembly"):
                pending.wait()
            self._prepare_coarse()
            self._has_correction = True
        if self.coarse is not None:
            predicted = self.coarse.recombine(self._radius)
            return self.coarse.step, predicted
        # After a rejection the corrections of the larger ball are scaled into the smaller one.
        with self.events.timed("assembly"):
            self.products.clip(correction, self._radius)
        return correction, None

    def _prepare_coarse(self) -> None:
        if self.coarse is not None:
            self.coarse.prepare(
                self._passes, self.schwarz.columns(), self._gradient, self._batch_size, self._coarse_rows()
            )

    def _coarse_rows(self) -> Sequence[GaussNewtonRows]:
        """The rows of the local solvers, if those of all ranks together are on the samples of the coarse level."""
        options = self.options
        own = options.local.solver == "gauss-newton" and options.schwarz.local_data == "full"
        return self.schwarz.rows if own and options.batch == "whole" and options.coarse.samples == 1.0 else ()

    def _recorded(self) -> list[torch.nn.Module]:
        """The layers of the subdomains that this rank carries."""
        carried = [self.subdomains[index] for index in self.layout.subdomains_of(self.layout.team_of(self.comm.rank))]
        return [
            self.network.get_submodule(layer.name)
            for layer in self.layers
            if any(part.start < layer.stop and layer.start < part.stop for part in carried)
        ]

    def _judge(self, step: torch.Tensor, predicted_reduction: float | None, keep_graph: bool) -> Judged:
        """Evaluate f_k at the end of ``step``, let rank 0 judge, and take the step or restore the point.

        Without a ``predicted_reduction`` the model is the first-order one.
        """
        rounding = self._epsilon
        if self.options.autocast != "none":
            # Samples are rounded independently of each other; what is summed of them is rounded much less.
            rounding /= self._batch_size**0.5
        with self.events.timed("judge"):
            self._accepted_values.copy_(self.vector.values)
            self.vector.values.add_(step)
            trial = self.objective.forward(self._passes, keep_graph)

            def decide(table: np.ndarray) -> Sequence[float]:
                judged = judge_table(
                    table[:, 1:],
                    options=self.options.trust_region,
                    products=self.products,
                    radius=self._radius,
                    predicted_reduction=predicted_reduction,
                    earlier_losses=self.state.losses,
                    rounding=rounding,
                )
                return [*judged, table[:, 0].max()]

            # The device is waited for here, once for all numbers.
            products = self.products.own(self._gradient, step)
            own = torch.stack([self._evaluated.loss, trial.loss, *products]).tolist()
            *record, self._most_work = self.comm.agree([self.events.work, *own], decide)
            judged = judged_of(record)
            self.state.radius = judged.next_radius
            if judged.accepted:
                self.objective.buffers.accept()
                self._remember(judged.loss)
                self._forget()
                self._run = trial if keep_graph else None
            else:
                self.vector.values.copy_(self._accepted_values)
            return judged

    def _remember(self, loss: float) -> None:
        window = self.options.trust_region.window
        self.state.losses = [*self.state.losses, loss][-window:] if window else []

    def _take_global_step(self, repeated: bool) -> Judged:
        """Trust-region step over all parameters at the point that the Schwarz step led to."""
        assert self.global_step is not None
        self._evaluate()
        with self.events.timed("global step"):
            step, predicted = self.global_step.find(self._passes, self._gradient, self._radius)
        return self._judge(step, predicted, keep_graph=repeated)

    def save(self) -> tuple[list[Array], dict[str, Any]]:
        """Network and state of the solver, for `apts_mpi.checkpoint.CheckpointDirectory.save`. Collective.

        The arrays are views where the values are in host memory: save them before the next `step`.

        Returns
        -------
        arrays
            Named arrays, of which each rank has a share.
        metadata
            The rest, for JSON.
        """
        # After a rejection the next step on the same batch uses the corrections again.
        correction = self.schwarz.assembled if self._has_correction else None
        arrays, metadata = save_solver(self.network, self._parts, correction, self.schwarz, self.comm)
        return arrays, metadata | self._known()

    def _known(self) -> dict[str, Any]:
        """What is known at the present point, and how far the solver has come."""
        known = {"evaluated": self._run is not None, "differentiated": self._has_gradient}
        return known | {"state": asdict(self.state)}

    def load(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> list[str]:
        """Take over network and state from a checkpoint of any number of ranks and subdomains. Collective.

        If the next step is to be one without a batch, as after a rejection, `repeat` has to give the batch before.

        Parameters
        ----------
        checkpoint
            The file, from `apts_mpi.checkpoint.open_checkpoint` or `apts_mpi.checkpoint.newest_valid`.
        metadata
            What `save` returned.

        Returns
        -------
        list of str
            What could not be taken over because the options are others now, one sentence each.

        Raises
        ------
        SharedInvalidInput
            If the checkpoint is of another network, naming the first difference.
        """
        with self.comm.shared_errors():
            self.vector.check_alias()
            correction, notices = self._load(checkpoint, metadata)
            self.state = State(**metadata["state"])
        self._forget()
        self._saved = Saved(metadata["evaluated"], metadata["differentiated"], correction)
        return notices

    def _load(self, checkpoint: Checkpoint, metadata: dict[str, Any]) -> tuple[torch.Tensor | None, list[str]]:
        return load_solver(self.network, self._parts, self.schwarz, checkpoint, metadata)

    @property
    def parameters(self) -> int:
        """Number of parameters that are trained."""
        return self.vector.values.numel()

    @property
    def smallest_batch(self) -> int:
        """Samples that a batch needs."""
        return samples_of_pass(self.network) * self.layout.smallest_batch(self.options.schwarz.local_data)

    def shared(self) -> tuple[list[torch.Tensor], object]:
        """Tensors that have the same bits on all ranks that hold them, and numbers that have on all ranks."""
        last_step = [] if self.coarse is None else [self.coarse.last_step]
        return [*named_tensors(self.network).values(), *last_step], self.state

    @property
    def _parts(self) -> dict[str, CoarseLevel | GlobalStep | None]:
        return {"coarse": self.coarse, "global_step": self.global_step}

    def repeat(self, batch: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor | None = None) -> None:
        """Give the batch of the last step again after `load`, so that `step` goes on without one. Collective."""
        with self.events.timed("data"):
            self._cut(batch, rows)
        if self._saved.differentiated:
            self._evaluate()
        elif self._saved.evaluated:
            with self.events.timed("global evaluation"):
                self._run = self.objective.forward(self._passes, keep_graph=True)
        if self._saved.correction is not None:
            self.schwarz.assembled.copy_(self._saved.correction)
            self.schwarz.open_rows(self._evaluated.caches)
            self._prepare_coarse()
            self._has_correction = True

    def describe(self) -> str:
        """The composed solver, in words, for ``--view``."""
        return describe(
            self.options,
            self.layout,
            self.subdomains,
            f"{self.vector.values.numel()} parameters, {self.vector.values.dtype}, "
            f"{len(self.objective.segmented)} segments",
        )
