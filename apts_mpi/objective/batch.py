"""A batch as a rank sees it: the samples that it runs the network over, in passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from apts_mpi.errors import InvalidInput
from apts_mpi.network.decomposition import Decomposition
from apts_mpi.network.partition import split
from apts_mpi.network.teams import Teams
from apts_mpi.objective.passes import Pass
from apts_mpi.options import LocalData
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.trees import Tree, as_samples, count_samples, take

# Trees of inputs and of targets, with the samples in the first dimension, or what is read as it is cut
# (`apts_mpi.tools.trees.Unread`); None where another stage has them.
Samples = tuple[Tree | None, Tree | None]

# Numbers of the samples that count, in this order; None: all.
Rows = torch.Tensor | None


@dataclass(frozen=True)
class Batch:
    """The samples of the present function.

    Attributes
    ----------
    samples
        What the user gave, as tensors.
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
    """The samples of a tree that count.

    Attributes
    ----------
    data : tree of Tensor
        Samples in the first dimension.
    rows : Tensor of int or None
        Which of them, in this order; None: all.
    """

    data: Tree
    rows: torch.Tensor | None = None

    def __len__(self) -> int:
        return count_samples(self.data) if self.rows is None else len(self.rows)

    def part(self, start: int, stop: int) -> Tree:
        """A range of them: a copy of no more than that, or a view; what has to be read is read here."""
        return take(self.data, slice(start, stop) if self.rows is None else self.rows[start:stop])


def check_call(has_batch: bool, done: float | None) -> None:
    """Raise `InvalidInput` where no step can be made.

    That is before the first batch, where torch takes no gradients, and for a ``done`` that is no share of a run.
    """
    if done is not None and not (isinstance(done, float | int) and 0.0 <= done <= 1.0):
        raise InvalidInput(f"done: {done!r} is no share of a run; give a number from 0 to 1, or None")
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


def check_rows(rows: torch.Tensor, count: int) -> None:
    """Raise `InvalidInput` unless ``rows`` are numbers of ``count`` samples."""
    if not isinstance(rows, torch.Tensor) or rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise InvalidInput("rows: give the numbers of the samples as a Tensor of int64, shape (samples,)")
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < count:
        wrong = int(rows.min()) if int(rows.min()) < 0 else int(rows.max())
        raise InvalidInput(f"rows: there is no sample {wrong} among {count}; number them from 0")


def as_batch(samples: Samples) -> Samples:
    """Inputs and targets with arrays as tensors, see `apts_mpi.tools.trees.as_samples`."""
    if not isinstance(samples, tuple | list) or len(samples) != 2:
        raise InvalidInput(f"batch: {type(samples).__name__} is not allowed; give a tuple (inputs, targets)")
    inputs, targets = samples
    return (
        None if inputs is None else as_samples(inputs, "inputs"),
        None if targets is None else as_samples(targets, "targets"),
    )


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
    group: int | None = 1,
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
    group
        Number of consecutive samples that belong together; None: all, which then every rank has.

    Raises
    ------
    InvalidInput
        On every rank, if inputs and targets differ in samples on one, or if a pass would have too few.
    """
    teams, comm, team = decomposition.teams, decomposition.comm, decomposition.team
    local_data = "full" if group is None else local_data
    full, shared, carried = local_data == "full", local_data == "shared", decomposition.carried
    whole_passes = {"full": [carried], "shared": [tuple(decomposition.subdomains)]}
    groups = whole_passes.get(local_data) or [(subdomain,) for subdomain in carried]
    with comm.shared_errors():
        inputs, targets = samples = as_batch(samples)
        if inputs is None or targets is None:
            raise InvalidInput("batch: it has no inputs or no targets; give both, samples in the first dimension")
        check_counts(count_samples(inputs), count_samples(targets))
        if rows is not None:
            check_rows(rows, count_samples(inputs))
        count = count_samples(inputs) if rows is None else len(rows)
        check_groups(count, group)
        size = group or max(count, 1)
        if whole:
            ranges = teams.shards(comm.rank, count // size, local_data) if group else [(0, 1)]
        else:
            ranges = [split(count // size, len(groups), index) for index in range(len(groups))]
        ranges = [(start * size, stop * size) for start, stop in ranges]
        least_groups = 1 if group is None else teams.smallest_batch(local_data) if whole else len(groups)
        _check_size(count, least, size, least_groups * samples_of_groups(least, group), whole, teams)
        entering, compared = Selection(inputs, rows), Selection(targets, rows)
        parts = [(entering.part(*place), compared.part(*place)) for place in ranges]
    own = sum(stop - start for start, stop in ranges)
    # With local_data full every team evaluates the whole batch, so that samples are seen more than once.
    copies = comm.size if group is None else teams.count if full else 1
    total = count * copies if whole else comm.total(own)
    # Ranks that have the same samples draw the same numbers.
    member = 0 if group is None else comm.rank if shared else team.rank
    passes = []
    for (start, stop), carried_there, part in zip(ranges, groups, parts, strict=True):
        of_shard = 0, count // size
        if not (full or shared):
            of_shard = split(count // size, teams.subdomains, carried_there[0].index)
        first, last = (edge * size for edge in of_shard)
        passes.append(
            Pass(
                *part,
                weight=(stop - start) / total,
                stream=(*stream, 0 if full or shared else carried_there[0].index, member),
                subdomains=carried_there,
                position=start - first if whole else 0,
                shard_size=last - first if whole else stop - start,
                group=size,
            )
        )
    shares = [part.weight for part in passes] if shared else team_shares(passes, team)
    return Batch(samples, rows, passes, total // copies, shares)


def check_groups(count: int, group: int | None) -> None:
    """Raise `InvalidInput` unless so many samples are whole groups."""
    if group is not None and count % group:
        raise InvalidInput(
            f"batch_size: {count} samples are no whole number of groups of {group} (group_size); give a multiple of it"
        )


def check_micro_batches(most: int | None, least: int, group: int | None) -> None:
    """Raise `InvalidInput` where parts of at most ``most`` samples, as even as may be, may have less than ``least``."""
    if most is not None and group == 1 and most < 2 * least - 1:
        raise InvalidInput(
            f"micro_batch_size: {most} may leave single samples, of which batch normalisation takes no statistics; "
            f"give {2 * least - 1} or more"
        )


def samples_of_groups(least: int, group: int | None) -> int:
    """Number of samples of the fewest groups that have ``least`` samples."""
    return least if group is None else -(-least // group) * group


def _check_size(count: int, least: int, group: int, needed: int, whole: bool, teams: Teams) -> None:
    if count < needed:
        reasons = [f"{least} a pass for batch normalisation"] if least > 1 else []
        reasons += [f"in whole groups of {group} (group_size)"] if 1 < group < count else []
        each = "".join(f", {reason}" for reason in reasons)
        where = "the batch" if whole else "a rank's shard of the batch"
        raise InvalidInput(
            f"batch_size: {where} has {count} samples, but {teams.ranks} ranks with {teams.subdomains} subdomains need "
            f"{needed}{each}; give a larger batch, or fewer ranks or subdomains"
        )


def team_shares(passes: Sequence[Pass], team: Communicator) -> list[float]:
    """This rank's share of its team's samples in each pass. Collective over the team."""
    if team.size == 1:
        return [1.0] * len(passes)
    return [part.samples / team.total(part.samples) for part in passes]
