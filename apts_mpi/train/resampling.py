"""Training samples that are drawn anew every so many iterations, the same on any number of ranks.

What is drawn depends on the seed and on how often it was drawn before; where residuals decide, rank 0 evaluates all of
them, and a checkpoint has which candidates it took.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.func import vmap

from apts_mpi.checkpoint import Array, Checkpoint, Slab
from apts_mpi.errors import InvalidInput, require
from apts_mpi.network.segments import segments_of
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.sameness import check_same_trees
from apts_mpi.problems import Problem, Redraw
from apts_mpi.tools.tensors import checksum, default_dtype, first_not_finite
from apts_mpi.tools.trees import Data, Tree, Unread, count_samples, map_tensors, named_leaves, take, tensors_of
from apts_mpi.train.batches import Batches
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.progress import Progress

# Candidates for each sample, of which residuals choose.
CANDIDATES = 10

# Candidates that are evaluated at once.
PIECE = 4096

# The array of a checkpoint with the numbers of the candidates that were taken.
TAKEN = "training/taken"

# Between the seeds of one run, and apart from those of its order.
_STRIDE, _OFFSET = 1_000_003, 500_009


class Resampling:
    """Draws training samples anew. Making one, `renew` and `load` are collective.

    Parameters
    ----------
    problem, options
        Which samples can be drawn, when and how.
    comm
        All ranks.

    Attributes
    ----------
    number : int
        How often samples were drawn so far.

    Raises
    ------
    SharedInvalidInput
        Where the problem cannot draw samples, or has not all of them in memory on each rank.
    """

    def __init__(self, problem: Problem, options: TrainingOptions, comm: Communicator) -> None:
        self._problem, self._comm, self._seed = problem, comm, options.seed
        self._every, self._by = options.resample, options.resample_by
        self.number = 0
        self._checksum = 0
        self._taken: torch.Tensor | None = None
        if self._every is not None:
            with comm.shared_errors():
                self._check(options)

    def _check(self, options: TrainingOptions) -> None:
        name, redraw = self._problem.name, self._problem.redraw
        remedy = f"problem {name} has no samples that can be drawn anew (Problem.redraw); leave it out"
        require(redraw is not None, "resample", self._every, remedy)
        read = any(isinstance(half, Unread) for half in self._problem.train)
        require(not read, "resample", self._every, f"problem {name} reads its samples as it needs them; leave it out")
        require(options.layout == "replicated", "resample", self._every, "it needs --layout replicated")
        require(options.train_samples is None, "resample", self._every, "leave out --train-samples, or this")
        last = count_samples(self._problem.train[0]) - 1
        rows = self._rows().tolist()
        remedy = f"problem {name} has Redraw.rows that are no different numbers from 0 to {last}; mend them"
        fits = rows and len(set(rows)) == len(rows) and min(rows) >= 0 and max(rows) <= last
        require(bool(fits), "resample", self._every, remedy)
        alone = self._problem.group_size == 1 and not self._problem.coupled
        remedy = f"problem {name} takes samples together; choose uniform"
        require(alone or self._by == "uniform", "resample_by", self._by, remedy)

    def renew(self, batches: Batches, progress: Progress) -> bool:
        """Draw samples before the next iteration if it is time to; return whether that was so."""
        iteration, every = progress.iteration, self._every
        if every is None or iteration == 0 or iteration % every != 0:
            return False
        self.number = iteration // every
        batches.replace(self._draw())
        # What was rejected before was another function.
        progress.tries = 0
        return True

    def _draw(self) -> Data:
        candidates, generator = self._candidates(self._by)
        self._taken = None
        if self._by == "residual":
            count = count_samples(candidates[0]) // CANDIDATES
            taken = torch.empty(count, dtype=torch.int64)
            with self._comm.shared_errors():
                if self._comm.rank == 0:
                    taken = likely(residuals(self._problem, candidates), count, generator)
            self._comm.share_tensors([taken])
            self._taken = taken
        return self._in_place(candidates)

    def _candidates(self, by: str) -> tuple[Data, torch.Generator]:
        """Samples to take, or to take some of, the same on all ranks; and the generator that drew them."""
        generator = torch.Generator().manual_seed(self._seed * _STRIDE + _OFFSET + self.number)
        with self._comm.shared_errors():
            count = len(self._rows()) * (CANDIDATES if by == "residual" else 1)
            candidates = drawn(self._redraw, generator, count, self._problem)
        self._checksum = _sum_of(candidates)
        own = {"drawn inputs": candidates[0], "drawn targets": candidates[1]}
        remedy = "draw by the generator alone, and let nothing depend on the rank"
        check_same_trees(own, None, self._comm, f"problem {self._problem.name}", remedy)
        return candidates, generator

    def _in_place(self, candidates: Data) -> Data:
        """The training samples, with those of the candidates that were taken in their places."""
        places, taken = self._rows(), self._taken
        chosen = candidates if taken is None else tuple(take(half, taken) for half in candidates)
        return tuple(_replaced(*halves, places) for halves in zip(self._problem.train, chosen, strict=True))

    @property
    def _redraw(self) -> Redraw:
        assert self._problem.redraw is not None  # see `_check`
        return self._problem.redraw

    def _rows(self) -> torch.Tensor:
        rows = self._redraw.rows
        return torch.arange(count_samples(self._problem.train[0])) if rows is None else rows

    def metadata(self) -> dict[str, Any]:
        """Metadata of a checkpoint; none as long as no samples were drawn."""
        return {"resampling": {"number": self.number, "checksum": self._checksum}} if self.number else {}

    def arrays(self) -> list[Array]:
        """Arrays of a checkpoint."""
        if self._taken is None:
            return []
        slabs = [Slab(0, self._taken.numpy())] if self._comm.rank == 0 else []
        return [Array(TAKEN, tuple(self._taken.shape), np.dtype(np.int64), slabs)]

    def load(self, checkpoint: Checkpoint, batches: Batches) -> None:
        """Have the samples of a run that goes on, where it has drawn some anew."""
        saved = checkpoint.metadata.get("resampling")
        if saved is None:
            return
        name = self._problem.name
        with self._comm.shared_errors():
            if self._problem.redraw is None:
                raise InvalidInput(
                    f"{checkpoint.path}: resampling: problem {name} cannot draw samples anew as the run did; give the "
                    "problem of the run"
                )
            self._taken = self._read_taken(checkpoint) if TAKEN in checkpoint.names else None
        self.number = saved["number"]
        candidates, _ = self._candidates("uniform" if self._taken is None else "residual")
        with self._comm.shared_errors():
            if self._checksum != saved["checksum"]:
                raise InvalidInput(
                    f"{checkpoint.path}: resampling: problem {name} draws other samples than it did; give the problem "
                    "of the run"
                )
        batches.replace(self._in_place(candidates))

    def _read_taken(self, checkpoint: Checkpoint) -> torch.Tensor:
        count = len(self._rows())
        there = checkpoint.shape(TAKEN), checkpoint.dtype(TAKEN)
        taken = checkpoint.read(TAKEN) if there == ((count,), np.int64) else np.array([-1])
        if taken.min() < 0 or taken.max() >= count * CANDIDATES:
            raise InvalidInput(f"{checkpoint.path}: {TAKEN} does not name {count} candidates; give another checkpoint")
        return torch.from_numpy(taken)


def drawn(redraw: Redraw, generator: torch.Generator, count: int, problem: Problem) -> Data:
    """Samples as the problem draws them, such as its training samples are.

    Raises
    ------
    InvalidInput
        For others, and for nan or inf.
    """
    where = f"problem {problem.name}: redraw"
    with default_dtype(problem.dtype):
        pair = redraw.draw(generator, count)
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise InvalidInput(f"{where} returned {type(pair).__name__}; return inputs and targets")
    for name, own, first in zip(("inputs", "targets"), pair, problem.train, strict=True):
        mine, theirs = (named_leaves(tree, name) for tree in (own, first))
        for place in theirs.keys() | mine.keys():
            here, there = mine.get(place), theirs.get(place)
            kinds = [None if leaf is None else (leaf.dtype, tuple(leaf.shape[1:])) for leaf in (here, there)]
            if kinds[0] != kinds[1] or here is None or len(here) != count:
                shape = None if here is None else (here.dtype, tuple(here.shape))
                wanted = None if there is None else (there.dtype, (count, *there.shape[1:]))
                raise InvalidInput(f"{where} returned {place} of {shape}; give {wanted}")
            if (bad := first_not_finite(here)) is not None:
                raise InvalidInput(f"{where} returned {float(here[bad])} in sample {bad[0]} of the {place}; mend it")
    return pair


def likely(sizes: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers of ``count`` different candidates, drawn in proportion to 1 plus the share of the mean residual."""
    mean = sizes.mean()
    weights = torch.ones_like(sizes) if float(mean) == 0.0 else 1.0 + sizes / mean
    return torch.multinomial(weights, count, replacement=False, generator=generator).sort().values


@torch.no_grad()
def residuals(problem: Problem, samples: Data) -> torch.Tensor:
    """Of each sample the root of its loss, which is the length of its residual: float64 on the CPU, shape (count,).

    Raises
    ------
    InvalidInput
        Where one is not finite, or the loss cannot be taken of single samples.
    """
    network = torch.nn.Sequential(*segments_of(problem.network, problem.forward))
    device = next(problem.network.parameters()).device

    def loss_of_one(output: Tree, target: Tree) -> torch.Tensor:
        loss = problem.loss(*(map_tensors(lambda leaf: leaf[None], tree) for tree in (output, target)))
        return loss[0] if isinstance(loss, tuple) else loss

    found, training = [], problem.network.training
    problem.network.eval()
    try:
        for start in range(0, count_samples(samples[0]), PIECE):
            inputs, targets = (
                map_tensors(lambda leaf: leaf.to(device), take(half, slice(start, start + PIECE))) for half in samples
            )
            found.append(vmap(loss_of_one)(network(inputs), targets).double().cpu())
    except RuntimeError as error:
        raise InvalidInput(
            f"resample_by: 'residual' takes the loss of problem {problem.name} sample by sample, which failed "
            f"({error}); choose uniform"
        ) from error
    finally:
        problem.network.train(training)
    sizes = torch.cat(found).abs().sqrt()
    if (bad := first_not_finite(sizes)) is not None:
        raise InvalidInput(
            f"resample_by: the residual of candidate {bad[0]} is {float(sizes[bad])}; choose uniform, or draw where "
            "it is finite"
        )
    return sizes


def _replaced(first: Tree, chosen: Tree, places: torch.Tensor) -> Tree:
    """A tree of samples with others in some places."""
    others = iter(tensors_of(chosen))
    return map_tensors(lambda leaf: leaf.index_copy(0, places.to(leaf.device), next(others).to(leaf.device)), first)


def _sum_of(data: Data) -> int:
    """Of the bytes of all samples."""
    return sum(checksum(leaf) for half in data for leaf in tensors_of(half))
