"""A batch as a rank sees it: the samples that it runs the network over, in passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apts_mpi.data import Half
from apts_mpi.errors import InvalidInput
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.partition import split
from apts_mpi.network.teams import Teams
from apts_mpi.objective.passes import Pass
from apts_mpi.options import LocalData
from apts_mpi.parallel.communicator import Communicator

# Inputs and targets, with the samples in the first dimension; None where another stage has them. Halves of a source are
# read as they are cut.
Samples = tuple[torch.Tensor | Half | None, torch.Tensor | Half | None]

# Numbers of the samples that count, in this order; None: all.
Rows = torch.Tensor | None


@dataclass(frozen=True)
class Batch:
    """The samples of the present function.

    Attributes
    ----------
    samples
        What the user gave.
    rows : Tensor of int or None
        Which of them count, in this order; None: all.
    passes : list of Pass
        Those of this rank.
    size : int
        Number of samples, of all ranks together.
    shares : list of float
        This rank's share in each pass of the samples of all who measure together: of its team's, or (local_data shared)
        of all ranks'.
    """

    samples: Samples
    rows: torch.Tensor | None
    passes: list[Pass]
    size: int
    shares: list[float]


@dataclass(frozen=True)
class Selection:
    """The samples of a tensor, or of half a source, that count.

    Attributes
    ----------
    data : Tensor or Half
        Samples in the first dimension.
    rows : Tensor of int or None
        Which of them, in this order; None: all.
    """

    data: torch.Tensor | Half
    rows: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.data if self.rows is None else self.rows)

    def part(self, start: int, stop: int) -> torch.Tensor:
        """A range of them: a copy of no more than that, or a view; what has to be read is read here."""
        return self.data[start:stop] if self.rows is None else self.data[self.rows[start:stop]]


def check_call(has_batch: bool) -> None:
    """Raise `InvalidInput` where no step can be made: before the first batch, and where torch takes no gradients."""
    if not has_batch:
        raise InvalidInput("step: there is no batch yet to go on with; give inputs and targets to the first step")
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        raise InvalidInput(
            "step: torch takes no gradients here; call it outside of torch.no_grad() and torch.inference_mode()"
        )
    if torch.is_anomaly_enabled():
        raise InvalidInput(
            "step: torch's anomaly detection is on, under which it has no tangents of several directions at once; "
            "switch it off: what is not finite is named in the result's reason"
        )


def check_done(done: float | None) -> None:
    """Raise `InvalidInput` unless ``done`` is a share of a run."""
    if done is not None and not (isinstance(done, float | int) and 0.0 <= done <= 1.0):
        raise InvalidInput(f"done: {done!r} is no share of a run; give a number from 0 to 1, or None")


def check_rows(rows: torch.Tensor, count: int) -> None:
    """Raise `InvalidInput` unless ``rows`` are numbers of ``count`` samples."""
    if not isinstance(rows, torch.Tensor) or rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise InvalidInput("rows: give the numbers of the samples as a Tensor of int64, shape (samples,)")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        wrong = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
        raise InvalidInput(f"rows: there is no sample {wrong} among {count}; number them from 0")


def check_counts(inputs: int, targets: int) -> None:
    """Raise `InvalidInput` unless there are as many inputs as targets."""
    if inputs != targets:
        raise InvalidInput(f"batch: {inputs} inputs but {targets} targets; give as many of each")


def samples_of_pass(network: torch.nn.Module) -> int:
    """Samples that a pass needs at least: batch normalisation takes no statistics of a single one."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    return 2 if any(module.training or module.running_mean is None for module in norms) else 1


def cut_batch(
    samples: Samples,
    rows: torch.Tensor | None,
    *,
    decomposition: Decomposition,
    local_data: LocalData,
    whole: bool,
    stream: tuple[int, ...],
    least: int,
) -> Batch:
    """Cut a batch into the passes of a rank that has the whole network. Collective.

    Parameters
    ----------
    samples
        Inputs and targets: of the whole batch, or (``whole`` false) those of this rank alone, in the order of its
        passes.
    rows
        Samples that count, in this order; None: all.
    decomposition
        Who owns what.
    local_data
        See `apts_mpi.network.teams.Teams.shards`.
    whole
        Whether every rank was given the whole batch.
    stream
        First part of the keys of the random streams.
    least
        Samples that a pass needs, see `samples_of_pass`.

    Raises
    ------
    InvalidInput
        On every rank, if inputs and targets differ in samples on one, or if a pass would have too few.
    """
    teams, comm, team = decomposition.teams, decomposition.comm, decomposition.team
    full, shared, carried = local_data == "full", local_data == "shared", decomposition.carried
    whole_passes = {"full": [carried], "shared": [tuple(decomposition.subdomains)]}
    groups = whole_passes.get(local_data) or [(subdomain,) for subdomain in carried]
    with comm.shared_errors():
        inputs, targets = samples
        if inputs is None or targets is None:
            raise InvalidInput("batch: it has no inputs or no targets; give both, samples in the first dimension")
        check_counts(len(inputs), len(targets))
        if rows is not None:
            check_rows(rows, len(inputs))
        count = len(inputs if rows is None else rows)
        if whole:
            ranges = teams.shards(comm.rank, count, local_data)
        else:
            ranges = [split(count, len(groups), index) for index in range(len(groups))]
        _check_size(count, least, teams.smallest_batch(local_data) if whole else len(groups), whole, teams)
        entering, compared = Selection(inputs, rows), Selection(targets, rows)
        parts = [(entering.part(*place), compared.part(*place)) for place in ranges]
    own = sum(stop - start for start, stop in ranges)
    # With local_data full every team evaluates the whole batch, so that samples are seen more than once.
    copies = teams.count if full else 1
    total = count * copies if whole else comm.total(own)
    passes = []
    for (start, stop), group, part in zip(ranges, groups, parts, strict=True):
        first, last = (0, count) if full or shared else split(count, teams.subdomains, group[0].index)
        passes.append(
            Pass(
                *part,
                weight=(stop - start) / total,
                stream=(*stream, *((0, comm.rank) if shared else (0 if full else group[0].index, team.rank))),
                subdomains=group,
                position=start - first if whole else 0,
                shard_size=last - first if whole else stop - start,
            )
        )
    shares = [part.weight for part in passes] if shared else team_shares(passes, team)
    return Batch(samples, rows, passes, total // copies, shares)


def _check_size(count: int, least: int, passes: int, whole: bool, teams: Teams) -> None:
    if count < least * passes:
        each = f", {least} a pass for batch normalisation" if least > 1 else ""
        where = "the batch" if whole else "a rank's shard of the batch"
        raise InvalidInput(
            f"batch_size: {where} has {count} samples, but {teams.ranks} ranks with {teams.subdomains} subdomains need "
            f"{least * passes}{each}; give a larger batch, or fewer ranks or subdomains"
        )


def team_shares(passes: Sequence[Pass], team: Communicator) -> list[float]:
    """This rank's share of its team's samples in each pass. Collective over the team."""
    if team.size == 1:
        return [1.0] * len(passes)
    return [part.samples / team.total(part.samples) for part in passes]
