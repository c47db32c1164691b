"""What a local solver is: what it says of itself, what it is made for, and what it keeps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from apts_mpi.curvature.layer import Curvature
from apts_mpi.local.objective import LocalObjective
from apts_mpi.network.partition import Layer
from apts_mpi.network.recorder import LayerRecord
from apts_mpi.network.shared_work import Work
from apts_mpi.objective.passes import Sums
from apts_mpi.options import APTSOptions, LocalOptions, TrustRegionOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.schema import Check, allow, record
from apts_mpi.trust_region.norms import NormKind, steepest_descent
from apts_mpi.trust_region.same_function import NEW, SameFunction


@dataclass
class LayerState:
    """Tensors that belong to a layer, and the kind of curvature that made them."""

    kind: str
    tensors: list[torch.Tensor]


@dataclass
class LocalState:
    """State of the local solver of one subdomain, in a form that a checkpoint can hold.

    Attributes
    ----------
    numbers : dict
        Numbers by name.
    vectors : dict of str to Tensor, shape (stop - start,)
        What has one element a parameter, by name.
    layers : list of LayerState
        One for each layer of the subdomain; empty as long as there are none.
    """

    numbers: dict[str, Any] = field(default_factory=dict)
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: list[LayerState] = field(default_factory=list)


class SavedTensor(NamedTuple):
    """Shape and type, as numpy writes it, of a tensor in a file."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class SavedState:
    """What a file says of the `LocalState` of a subdomain, before its arrays are read.

    Attributes
    ----------
    place : str
        Where it stands, for messages.
    numbers : dict
        Numbers by name, which may be anything.
    vectors : dict of str to SavedTensor
        By name.
    layers : list of (str, list of SavedTensor)
        The kind and the tensors of each layer.
    """

    place: str
    numbers: Mapping[str, Any]
    vectors: Mapping[str, SavedTensor]
    layers: Sequence[tuple[str, Sequence[SavedTensor]]]


class WholeLayer(NamedTuple):
    """A layer of a subdomain: its curvature, its module, and its range within the block."""

    curvature: Curvature
    module: torch.nn.Module
    part: slice


@dataclass(frozen=True)
class LocalSetting:
    """What a local solver is made for: one subdomain on one team.

    Attributes
    ----------
    options, trust_region
        Those of local solvers, composed, and those of the ball.
    block : Tensor, shape (stop - start,)
        The subdomain's parameters.
    layers : sequence of WholeLayer
        Its layers, for a solver that asks for whole ones; else empty.
    team
        The ranks that share the subdomain's samples.
    """

    options: LocalOptions
    trust_region: TrustRegionOptions
    block: torch.Tensor
    layers: Sequence[WholeLayer]
    team: Communicator


@dataclass(frozen=True)
class Split:
    """A network as its subdomains have it.

    Attributes
    ----------
    called : bool
        Whether a function calls the network, for more than its outputs.
    normalised, random : bool
        Whether it has batch normalisation, and dropout.
    whole : bool
        Whether every subdomain consists of whole layers.
    largest : int
        Parameters of the largest subdomain.
    """

    called: bool
    normalised: bool
    random: bool
    whole: bool
    largest: int


class LocalSolver(ABC):
    """Moves the block of a subdomain to a better point of its ball.

    The class attributes say what a solver needs; all have a default. An instance is made for each subdomain that a rank
    carries, from a `apts_mpi.local.LocalSetting`.

    Attributes
    ----------
    evaluates : bool
        Whether it evaluates the local objective at its first iteration already, beyond the global gradient.
    whole_layers : bool
        Whether it needs whole layers: ``LocalSetting.layers``, and ``LocalObjective.records`` of their inputs and
        output gradients.
    dense : bool
        Whether it takes ``LocalObjective.gauss_newton_rows``, so that blocks have to be small. The coarse level then
        uses these rows as well.
    divisible : bool
        Whether its state can be given to other subdomains than those that it was saved of.
    takes_sums : bool
        Whether ``LocalObjective.sums`` of `sums` may take the place of the records, which then need not be kept.
    preconditions : bool
        Whether `direction` knows the curvature.
    averages : bool
        Whether `unbounded` is along a running mean of gradients by ``local.momentum``, as ``noise batches`` wants it.
    divides_work : bool
        Whether `unbounded` is limited to ``own_part``, as other ranks have the rest of the block. Not inherited.
    own_part : slice or None
        That part of the block; None: all of it.
    damping, quadratic_damping : float or None
        What ``local.damping`` is unless the user says otherwise, and what it is for a loss that is quadratic in the
        outputs; None: the same.
    updates : int
        How often it has taken in statistics.
    same : SameFunction
        What is known of the present function; set before each `solve`.
    local_data, coarse_norm, coarse_samples
        What ``schwarz.local_data auto``, ``coarse.norm auto`` and ``coarse.samples null`` stand for with it.
    """

    evaluates: ClassVar[bool] = False
    whole_layers: ClassVar[bool] = False
    dense: ClassVar[bool] = False
    divisible: ClassVar[bool] = True
    takes_sums: ClassVar[bool] = False
    preconditions: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    divides_work: ClassVar[bool] = False
    damping: ClassVar[float | None] = None
    quadratic_damping: ClassVar[float | None] = None
    local_data: ClassVar[Literal["shared", "shard", "full"]] = "shard"
    coarse_norm: ClassVar[Literal["2", "scaled"]] = "2"
    coarse_samples: ClassVar[float | None] = None
    updates = 0
    own_part: slice | None = None
    same: SameFunction = NEW

    @classmethod
    def needs_exact(cls, options: LocalOptions) -> bool:
        """Whether it needs the exact local objective."""
        return False

    @classmethod
    def check(cls, options: APTSOptions, split: Split) -> None:
        """Raise `apts_mpi.InvalidInput` for options, their variant chosen, or a network that it cannot work with."""

    def __init__(self, setting: LocalSetting) -> None:
        self.setting = setting

    @abstractmethod
    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """Move ``local.block`` from R_d theta_k by at most ``radius``. Collective over the team where it evaluates."""

    def unbounded(self, local: LocalObjective) -> torch.Tensor:
        """How far `solve` moves the block in a ball without end; the block is afterwards as before."""
        return displacement_of(self, local, math.inf, "2")

    @classmethod
    def work(cls, layer: Layer, module: torch.nn.Module, refresh: int) -> Work:
        """What an iteration costs in a layer, in multiplications up to a factor, and where it can be divided.

        Parameters
        ----------
        layer, module
            Its range of the flat vector, and what owns the parameters there.
        refresh
            Iterations from one update of statistics to the next.
        """
        return Work(layer.start, layer.stop, range(1), 0.0, 1.0)

    @property
    def is_due(self) -> bool:
        """Whether it wants statistics in this iteration, the same for all subdomains; for whole layers alone."""
        return False

    @property
    def observes(self) -> bool:
        """Whether the next `solve` or `measure` looks at calls of layers, or at outputs of the local objective."""
        return True

    def measure(self, local: LocalObjective, key: int) -> list[list[torch.Tensor]]:
        """Statistics of each layer, of the samples of all who measure together; ``key`` for random numbers."""
        return []

    def sums(self, records: Sequence[LayerRecord], samples: int, part: tuple[int, int]) -> Sums:
        """What of ``records`` adds up, of calls on a part of the samples of this rank; where ``takes_sums``."""
        return {}

    def take_in(self, fresh: list[list[torch.Tensor]]) -> None:
        """Take in what `measure` returned."""

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Minus an approximate inverse curvature times a gradient, both of shape (stop - start,)."""
        return -gradient

    def state(self) -> LocalState:
        """What it keeps from one iteration to the next."""
        return LocalState()

    def check_saved(self, saved: SavedState) -> None:
        """Raise `apts_mpi.InvalidInput` for what `restore` could not take over. A file may hold anything."""

    def restore(self, state: LocalState) -> None:
        """Take over the state of a solver of the same kind."""

    def check_numbers_and_vectors(
        self, saved: SavedState, numbers: Mapping[str, Check], vectors: Callable[[Mapping[str, Any]], Collection[str]]
    ) -> None:
        """What `check_saved` of most solvers consists of.

        Parameters
        ----------
        saved
            What the file says.
        numbers
            Checks of the numbers, by name.
        vectors
            Gives the names of the vectors for these numbers.
        """
        found = record(numbers)(saved.numbers, f"{saved.place}.numbers")
        record(dict.fromkeys(vectors(found), self.check_tensor))(saved.vectors, f"{saved.place}.vectors")

    def check_tensor(self, tensor: SavedTensor, place: str) -> SavedTensor:
        """Raise `apts_mpi.InvalidInput` unless it has the type of the parameters."""
        own = self.setting.block[:0].cpu().numpy().dtype.str
        allow(tensor.dtype == own, place, tensor.dtype, f"{own!r}, as the parameters are")
        return tensor


def displacement_of(solver: LocalSolver, local: LocalObjective, radius: float, kind: NormKind) -> torch.Tensor:
    """How far a solver moves the block, which is afterwards as before. Collective over the team as ``solve`` is."""
    start = local.block.clone()
    solver.solve(local, radius, kind)
    moved = local.block - start
    local.block.copy_(start)
    return moved


def ensure_descent(gradient: torch.Tensor, displacement: torch.Tensor, radius: float, kind: NormKind) -> torch.Tensor:
    """``displacement``, or the steepest descent where it does not go down, or is not finite.

    Directions with memory may point uphill after the batch or the point changed. Displacements that each go down have
    a sum with a positive predicted reduction, so that a shrinking radius ends in an accepted step.
    """
    slope = torch.dot(gradient, displacement)
    downhill = (slope < 0.0) & slope.isfinite()
    return torch.where(downhill, displacement, steepest_descent(gradient, radius, kind))
