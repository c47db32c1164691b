"""The local solver Gauss-Newton: the dense matrix of the block, minimised in its ball. It waits for the device."""

from __future__ import annotations

import itertools

import torch

from apts_mpi.curvature.dense import LARGEST_DENSE, gram, of_rows, uses_rows
from apts_mpi.curvature.layer import TINY
from apts_mpi.errors import InvalidInput
from apts_mpi.local.objective import LocalObjective
from apts_mpi.local.solver import LocalSetting, LocalSolver, LocalState, SavedState, Split
from apts_mpi.options import APTSOptions
from apts_mpi.parallel.transport import Mirror
from apts_mpi.tools.schema import any_number
from apts_mpi.trust_region.norms import NormKind, clip_to_ball, euclidean_radius
from apts_mpi.trust_region.subproblem import newton_in_ball


class GaussNewton(LocalSolver):
    """Dense Gauss-Newton step of the block within the ball: ``-(J^T H J + mu I)^-1`` times the gradient.

    mu is ``damping`` times the mean diagonal of ``J^T H J``, or larger to end in the ball: a longer step cut to the
    ball is made of directions of little curvature alone, along which it leads nowhere. The matrix is formed in
    float64: it has the square of the Jacobian's condition. Of few rows it is formed in their own span.

    Attributes
    ----------
    shift : float
        By how much the ball raised mu the last time.
    """

    dense = True
    damping = 1e-7
    local_data = "full"  # it has no running means
    coarse_norm = "scaled"
    coarse_samples = 1.0

    @classmethod
    def check(cls, options: APTSOptions, split: Split) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        reason = _why_not(options, split)
        if reason:
            raise InvalidInput(f"local.solver: 'gauss-newton' cannot be used: {reason}; choose kfac or another one")
        if options.layout == "staged" and options.local.iterations > 1:
            raise InvalidInput(
                f"local.iterations: {options.local.iterations!r} is not for layout staged, where local solver "
                "gauss-newton would need the layers up to the loss again; give 1, or choose kfac"
            )

    def __init__(self, setting: LocalSetting) -> None:
        super().__init__(setting)
        self._team = setting.team
        self.shift = 0.0

    def solve(self, local: LocalObjective, radius: float, kind: NormKind) -> None:
        """See `apts_mpi.local.LocalSolver`.

        Raises
        ------
        InvalidInput
            For a block and a batch that are both too large.
        """
        start = local.block.clone()
        for gradient in local.gradients(self.setting.options.iterations):
            _check_size(local)
            reach = euclidean_radius(radius, len(gradient), kind)
            local.block += self._step(local, gradient.double(), reach).to(local.block.dtype)
            displacement = local.block - start
            clip_to_ball(displacement, radius, kind)
            torch.add(start, displacement, out=local.block)

    def _step(self, local: LocalObjective, slope: torch.Tensor, reach: float) -> torch.Tensor:
        rows = local.gauss_newton_rows().to(torch.float64, copy=True).mul_(local.weight**0.5)
        rows.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        size, basis = len(slope), None
        if uses_rows(round(len(rows) / local.weight), size):
            basis, rows, slope = of_rows(self._of_team(rows), slope)
        matrix = gram(rows)
        if basis is None and self._team.size > 1:
            self._team.sum(Mirror(matrix.view(-1)))
        damping = self.setting.options.damping
        assert damping is not None  # composed
        matrix.diagonal().add_(damping * (matrix.diagonal().sum() / size) + TINY)
        step, self.shift = newton_in_ball(matrix, slope, reach, self.shift)
        return step if basis is None else basis @ step

    def _of_team(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks of the team. Collective over it."""
        if self._team.size == 1:
            return rows
        ends = list(itertools.accumulate(self._team.numbers(len(rows)), initial=0))
        ranges = [(first * rows.shape[1], last * rows.shape[1]) for first, last in itertools.pairwise(ends)]
        gathered = rows.new_empty(ends[-1], rows.shape[1])
        gathered[ends[self._team.rank] : ends[self._team.rank + 1]] = rows
        pending = self._team.pending()
        self._team.start_gather(pending, Mirror(gathered.view(-1)), ranges)
        pending.wait()
        return gathered

    def state(self) -> LocalState:
        """See `apts_mpi.local.LocalSolver`."""
        return LocalState(numbers={"shift": self.shift})

    def check_saved(self, saved: SavedState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        self.check_numbers_and_vectors(saved, {"shift": any_number}, lambda numbers: ())

    def restore(self, state: LocalState) -> None:
        """See `apts_mpi.local.LocalSolver`."""
        self.shift = state.numbers["shift"]


def _why_not(options: APTSOptions, split: Split) -> str:
    """What keeps it from being used; empty: nothing."""
    if split.normalised:
        return "batch normalisation ties samples together"
    if options.group != 1:
        return "the loss ties samples together (group_size, coupled)"
    # In one stage the rows are not known before they are computed, neither their number nor their masks.
    if options.layout == "staged" and split.random:
        return "with layout staged dropout would draw other masks for the rows than for the loss"
    if options.layout == "staged" and split.largest > LARGEST_DENSE:
        return f"with layout staged a subdomain of {split.largest} parameters exceeds {LARGEST_DENSE}"
    return ""


def _check_size(local: LocalObjective) -> None:
    """Refuse, before there are rows, a matrix that is too large either way."""
    size = len(local.block)
    if size > LARGEST_DENSE and (count := local.count_gauss_newton_rows()) > LARGEST_DENSE:
        raise InvalidInput(
            f"local.solver: 'gauss-newton' cannot be used: a subdomain of {size} parameters and a batch of {count} "
            f"rows (samples times outputs) both exceed {LARGEST_DENSE}; give smaller batches or more subdomains, or "
            "choose kfac or another one"
        )
