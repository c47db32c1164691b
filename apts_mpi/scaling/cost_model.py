"""How long an iteration takes by an alpha-beta-gamma model, term by term; the formulas stand in docs/scaling.md.

A collective costs a number of messages in a row (each alpha seconds) and of bytes in a row (each beta seconds), by the
algorithms that MPICH chooses by size (Thakur, Rabenseifner, Gropp, doi 10.1177/1094342005051521).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from apts_mpi.options import ENOUGH_TARGETS

# Sizes in bytes at which other algorithms are taken, that of a gather within a broadcast too, and the ranks below which
# a long broadcast is a tree.
LONG_REDUCTION, LONG_GATHER, LONG_BROADCAST, FEW_RANKS = 2048, 524288, 12288, 8

# What the product sends: bytes of a bucket of gradients, of a scalar, and of a small pickled object.
BUCKET, SCALAR, OBJECT = 1 << 20, 8, 64

# Passes of an iteration through the network: forwards, backwards, forwards at the trial point. The first two together
# are one gradient evaluation, the third is a third of one.
PASSES, EVALUATIONS = 3, 4.0 / 3.0

BUBBLE = "pipeline bubble"

# Amounts of what costs time, by the name of the unknown in `UNITS`.
Amounts = dict[str, float]

# The unknowns and their units.
UNITS = {
    "latency": "s a message (α)",
    "byte": "s a byte (β)",
    "gradient": "s a gradient evaluation of a sample (γ)",
    "pass": "s a pass, whatever its samples",
    "tangent": "s a Jacobian product of a sample, by three",
    "statistics": "s a sample, for the local solves of all subdomains",
    "factorisation": "s, for the local solves of all subdomains",
    "fixed": "s an iteration",
    "column": "s a column of the reduced model",
    "pair": "s a pair of columns",
    "cube": "s a cubed column, the eigen-decompositions",
}


@dataclass(frozen=True)
class Shape:
    """What the time of an iteration depends on.

    Attributes
    ----------
    layout
        ``replicated`` or ``staged``.
    ranks, subdomains
        Their numbers.
    batch_size
        Samples, over all ranks.
    parameters, element_size
        Their number, and the bytes of one.
    columns
        Columns of the coarse level that a subdomain gives; 0 without one.
    coarse_share
        Share of the batch on which its curvature is measured; None: `ENOUGH_TARGETS` of its targets.
    targets
        Of a sample.
    micro_batches
        Of a replica, for layout staged.
    activation_bytes
        Bytes a sample between two stages.
    cores
        That the ranks share; 0: each has its own.
    """

    layout: str
    ranks: int
    subdomains: int
    batch_size: int
    parameters: int
    element_size: int = 4
    columns: int = 2
    coarse_share: float | None = None
    targets: int = 1
    micro_batches: int = 4
    activation_bytes: float = 0.0
    cores: int = 0

    @property
    def sharing(self) -> float:
        """Ranks a core, at least 1: how much longer everything takes."""
        return max(1.0, self.ranks / self.cores) if self.cores else 1.0

    @property
    def thinning(self) -> float:
        """Share of the batch on which the curvature of the coarse level is measured."""
        if self.coarse_share is not None:
            return self.coarse_share
        return min(1.0, ENOUGH_TARGETS / (self.batch_size * self.targets))

    @property
    def all_columns(self) -> int:
        """m, the columns of the coarse level."""
        return self.columns * self.subdomains


def messages(count: float, size: float) -> Amounts:
    """So many messages in a row, and bytes in a row."""
    return {"latency": count, "byte": size}


def rounds(ranks: int) -> int:
    """log2 of the ranks, rounded up."""
    return math.ceil(math.log2(ranks))


def barrier(ranks: int) -> Amounts:
    """Dissemination."""
    return messages(rounds(ranks), 0.0)


def broadcast(ranks: int, size: float) -> Amounts:
    """``size`` bytes to all: a binomial tree; long ones by a scatter and an allgather.

    That is recursive doubling for powers of two; for other numbers of ranks and the longest ones it is a ring.
    """
    if size < LONG_BROADCAST or ranks < FEW_RANKS:
        return messages(rounds(ranks), rounds(ranks) * size)
    doubling = size < LONG_GATHER and ranks == 2 ** rounds(ranks)
    steps = rounds(ranks) if doubling else ranks - 1
    return messages(rounds(ranks) + steps, 2.0 * size * (ranks - 1) / ranks)


def gather(ranks: int, size: float) -> Amounts:
    """A binomial tree that brings ``size`` bytes of all ranks together to one."""
    return messages(rounds(ranks), size * (ranks - 1) / ranks)


def allgather(ranks: int, size: float) -> Amounts:
    """``size`` bytes of all ranks together to all: recursive doubling; long ones in a ring."""
    steps = rounds(ranks) if size < LONG_GATHER else ranks - 1
    return messages(steps, size * (ranks - 1) / ranks)


def reduction(ranks: int, size: float) -> Amounts:
    """The sum of ``size`` bytes of each on one rank: a binomial tree; long ones by Rabenseifner's algorithm."""
    if size < LONG_REDUCTION:
        return messages(rounds(ranks), rounds(ranks) * size)
    return messages(2 * rounds(ranks), 2.0 * size * (ranks - 1) / ranks)


def allreduce(ranks: int, size: float) -> Amounts:
    """The sum of ``size`` bytes of each on all: recursive doubling; long ones by Rabenseifner's algorithm."""
    return reduction(ranks, size)


def _bucketed_allreduce(ranks: int, size: float) -> Amounts:
    """The same bucket by bucket."""
    buckets = math.ceil(size / BUCKET)
    return _times(buckets, allreduce(ranks, size / buckets))


def _times(factor: float, amounts: Mapping[str, float]) -> Amounts:
    return {name: factor * amount for name, amount in amounts.items()}


def added(*parts: Mapping[str, float]) -> Amounts:
    """What all parts take together."""
    total: Amounts = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _decision(ranks: int, size: float) -> Amounts:
    """A pickled record of rank 0 to all: its length, then it."""
    return added(broadcast(ranks, SCALAR), broadcast(ranks, size))


def _agreement(ranks: int, numbers: int) -> Amounts:
    """Rank 0 gathers some scalars of each rank, and broadcasts a record."""
    return added(gather(ranks, SCALAR * numbers * ranks), _decision(ranks, OBJECT))


def _exchange(ranks: int) -> Amounts:
    """Small pickled objects of all ranks to all: their lengths, then they."""
    return added(allgather(ranks, SCALAR * ranks), allgather(ranks, OBJECT * ranks))


def terms(shape: Shape) -> dict[str, Amounts]:
    """What an iteration with an accepted step does one after the other, by the name of the term.

    Returns
    -------
    dict
        For each term the amounts of the unknowns in `UNITS`; its seconds are their sum, each times its value.
    """
    found = _staged(shape) if shape.layout == "staged" else _replicated(shape)
    found["fixed"] = {"fixed": 1.0}
    # A rank that stands in the bubble leaves its core to another.
    return {name: _times(1.0 if name == BUBBLE else shape.sharing, amounts) for name, amounts in found.items()}


def _replicated(shape: Shape) -> dict[str, Amounts]:
    ranks, count, columns = shape.ranks, shape.subdomains, shape.all_columns
    # Of the busiest rank: its subdomains, each with a pass, and the ranks with which it shares them.
    carried, members = math.ceil(count / ranks), max(1, ranks // count)
    samples = carried * max(1.0, shape.batch_size / (count * members))
    thinned = samples * shape.thinning
    size = shape.element_size * shape.parameters
    return {
        "gradient evaluations": {"gradient": EVALUATIONS * samples, "pass": PASSES * carried},
        "local solves": {"statistics": samples * carried / count, "factorisation": carried / count},
        "Jacobian products": _tangents(shape, thinned, carried),
        "reduced model": {"column": columns, "pair": columns**2, "cube": columns**3},
        "gradient sum": _bucketed_allreduce(ranks, size),
        "assembly": allgather(ranks, size),
        "coarse reduction": _coarse_reduction(shape, columns**2),
        "agreement": added(_agreement(ranks, 6), _times(2, _exchange(ranks))),
    }


def _tangents(shape: Shape, samples: float, passes: float) -> Amounts:
    """Jacobian products of all columns: one joins where its subdomain begins, so that it costs half of the network."""
    if not shape.columns:
        return {}
    return {"tangent": samples * (1.0 + (shape.all_columns + shape.columns) / 2.0) / 3.0, "pass": passes}


def _coarse_reduction(shape: Shape, numbers: int) -> Amounts:
    """The sum of the reduced matrices on rank 0, and its coefficients to all."""
    if not shape.columns:
        return {}
    return added(reduction(shape.ranks, SCALAR * numbers), _decision(shape.ranks, SCALAR * shape.all_columns))


def _staged(shape: Shape) -> dict[str, Amounts]:
    ranks, count, columns, micro_batches = shape.ranks, shape.subdomains, shape.all_columns, shape.micro_batches
    stages = min(ranks, count)
    replicas = max(1, ranks // stages)
    samples = max(float(micro_batches), shape.batch_size / replicas)
    work = {"gradient": EVALUATIONS * samples / stages, "pass": PASSES * micro_batches}
    thinned = samples * shape.thinning / micro_batches
    return {
        "gradient evaluations": work,
        "local solves": {"statistics": samples / stages, "factorisation": 1.0 / stages},
        "Jacobian products": _staged_tangents(shape, stages, thinned),
        "reduced model": {"column": columns, "pair": (columns / stages) ** 2, "cube": columns**3},
        BUBBLE: _times((stages - 1) / micro_batches, work),
        "pipeline messages": _pipeline_messages(shape, stages, samples / micro_batches, thinned),
        "gradient sum": _bucketed_allreduce(replicas, shape.element_size * shape.parameters / stages),
        # The predicted reduction goes to all as well; a barrier is before each of the three.
        "coarse reduction": added(
            _coarse_reduction(shape, (2 * columns + 1) * columns),
            added(_decision(ranks, OBJECT), _times(3, barrier(ranks))) if columns else {},
        ),
        # To be judged, and the norm of the step; what is said of the batch, within the replica and to all.
        "agreement": added(
            _times(2, added(_agreement(ranks, 6), _times(2, barrier(ranks)))),
            _times(2, added(_exchange(stages), barrier(stages))),
            _exchange(ranks),
            barrier(ranks),
        ),
    }


def _staged_tangents(shape: Shape, stages: int, samples: float) -> Amounts:
    """Of a micro-batch through all stages, then of the others through the last, which carries all columns."""
    if not shape.columns:
        return {}
    rest = shape.micro_batches - 1
    filling = _tangents(shape, samples, stages)
    last = {"tangent": samples * (1.0 + shape.all_columns) / (3.0 * stages), "pass": 1.0}
    return added(filling, _times(rest, last))


def _pipeline_messages(shape: Shape, stages: int, samples: float, thinned: float) -> Amounts:
    """Activations or gradients of a micro-batch from stage to stage, then of the others over one border."""
    if stages == 1:
        return {}
    rest, columns = shape.micro_batches - 1, shape.all_columns
    hops = stages - 1 + rest
    found = _times(PASSES, messages(hops, hops * shape.activation_bytes * samples))
    if columns:
        # Activations, and beside them a tangent of each column so far.
        carried = (stages - 1) * (1.0 + columns / 2.0) + rest * (1.0 + columns * (stages - 1) / stages)
        found = added(found, messages(hops, carried * shape.activation_bytes * thinned))
    return found


def seconds_of(amounts: Mapping[str, float], values: Mapping[str, float]) -> float:
    """Amounts times the values of the unknowns."""
    return sum(amount * values[name] for name, amount in amounts.items())
