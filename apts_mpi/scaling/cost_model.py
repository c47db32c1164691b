"""How long an iteration takes, term by term; the formulas stand in docs/scaling.md.

A term is work, whose seconds are fitted to runs, and calls of collectives. A call costs what it takes before and after
MPI has it (Python, above all), which is fitted, and the seconds that its rounds take on the network, which are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from apts_mpi.options import ENOUGH_TARGETS, USUAL_LARGEST
from apts_mpi.scaling.calls import NETWORK, NUMBER, RECORD, SCALAR, SEND, Amounts, Call, Exchanges, Machine, Term

# Bytes of a bucket of gradients.
BUCKET = 1 << 20

# Passes of an iteration through the network: forwards, backwards, forwards at the trial point. The first two together
# are one gradient evaluation, the third is a third of one.
PASSES, EVALUATIONS = 3, 4.0 / 3.0

BUBBLE = "pipeline bubble"

# The unknowns and their units.
UNITS = {
    "call": "s a call of a collective, before and after MPI has it",
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
    columns, largest
        Columns of the coarse level that a subdomain gives, 0 without one; and the most of all.
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
    exchanges
        What ranks of layout replicated exchange in an iteration, as a run has counted it.
    """

    layout: str
    ranks: int
    subdomains: int
    batch_size: int
    parameters: int
    element_size: int = 4
    columns: int = 2
    largest: int = USUAL_LARGEST
    coarse_share: float | None = None
    targets: int = 1
    micro_batches: int = 4
    activation_bytes: float = 0.0
    cores: int = 0
    exchanges: Exchanges = field(default_factory=Exchanges)

    @property
    def stages(self) -> int:
        """Of layout staged."""
        return min(self.ranks, self.subdomains)

    @property
    def replicas(self) -> int:
        """Ranks of a stage; 1 for layout replicated."""
        return max(1, self.ranks // self.stages) if self.layout == "staged" else 1

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
        """m, the columns of the coarse level, where neighbouring subdomains are grouped below its bound."""
        if not self.columns:
            return 0
        groups = min(self.subdomains, self.largest // self.columns)
        return self.columns * max(groups, self.stages if self.layout == "staged" else 1)


def _times(factor: float, amounts: Mapping[str, float]) -> Amounts:
    return {name: factor * amount for name, amount in amounts.items()}


def added(*parts: Mapping[str, float]) -> Amounts:
    """What all parts take together."""
    total: Amounts = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _decision(ranks: int, size: float) -> tuple[Call, ...]:
    """A record of rank 0 to all: its count and first numbers, then the rest of a longer one."""
    rest = (Call("broadcast", ranks, size),) if size > RECORD else ()
    return (Call("broadcast", ranks, RECORD), *rest)


def _agreement(ranks: int, numbers: int) -> tuple[Call, ...]:
    """Some numbers of the ranks are put together on rank 0, which broadcasts a record."""
    return (Call("reduction", ranks, NUMBER * numbers), *_decision(ranks, RECORD))


def _exchange(ranks: int, group: str = "world") -> tuple[Call, ...]:
    """Whether all ranks say the same, or nothing: a few numbers of each."""
    return (Call("allreduce", ranks, 4 * SCALAR, group=group),)


def parts(shape: Shape) -> dict[str, Term]:
    """What an iteration with an accepted step does one after the other, by the name of the term."""
    found = _staged(shape) if shape.layout == "staged" else _replicated(shape)
    found["fixed"] = Term({"fixed": 1.0})
    return found


def terms(shape: Shape, machine: Machine) -> dict[str, Amounts]:
    """The same as amounts.

    Returns
    -------
    dict
        For each term the amounts of the unknowns in `UNITS` and of `NETWORK`; see `seconds_of`.
    """
    found = {
        name: added(term.work, machine.amounts(term.calls, shape.replicas)) if term.calls else term.work
        for name, term in parts(shape).items()
    }
    # A rank that stands in the bubble leaves its core to another.
    return {name: _times(1.0 if name == BUBBLE else shape.sharing, amounts) for name, amounts in found.items()}


def _replicated(shape: Shape) -> dict[str, Term]:
    ranks, count, columns = shape.ranks, shape.subdomains, shape.all_columns
    # Of the busiest rank: its subdomains, each with a pass, and the ranks with which it shares them.
    carried, members = math.ceil(count / ranks), max(1, ranks // count)
    samples = carried * max(1.0, shape.batch_size / (count * members))
    thinned = samples * shape.thinning
    sent = shape.exchanges
    return {
        "gradient evaluations": Term({"gradient": EVALUATIONS * samples, "pass": PASSES * carried}),
        "local solves": Term({"statistics": samples * carried / count, "factorisation": carried / count}),
        "Jacobian products": Term(_tangents(shape, thinned, carried)),
        "reduced model": Term({"column": columns, "pair": columns**2, "cube": columns**3}),
        "gradient sum": Term(calls=sent.sums("global evaluation", ranks)),
        "statistics sum": Term(calls=sent.sums("local solves", ranks)),
        "assembly": Term(calls=(Call("allgather", ranks, shape.element_size * shape.parameters),)),
        "coarse reduction": Term(calls=_coarse_reduction(shape, columns**2)),
        "agreement": Term(calls=sent.agreement(ranks)),
    }


def _tangents(shape: Shape, samples: float, passes: float) -> Amounts:
    """Jacobian products of all columns: one joins where its subdomain begins, so that it costs half of the network."""
    if not shape.columns:
        return {}
    return {"tangent": samples * (1.0 + (shape.all_columns + shape.columns) / 2.0) / 3.0, "pass": passes}


def _coarse_reduction(shape: Shape, numbers: int) -> tuple[Call, ...]:
    """The sum of the reduced matrices on rank 0, and its coefficients to all."""
    if not shape.columns:
        return ()
    summed = Call("reduction", shape.ranks, SCALAR * numbers)
    return (summed, *_decision(shape.ranks, SCALAR * shape.all_columns))


def _staged(shape: Shape) -> dict[str, Term]:
    ranks, columns, micro_batches = shape.ranks, shape.all_columns, shape.micro_batches
    stages, replicas = shape.stages, shape.replicas
    samples = max(float(micro_batches), shape.batch_size / replicas)
    work = {"gradient": EVALUATIONS * samples / stages, "pass": PASSES * micro_batches}
    thinned = samples * shape.thinning / micro_batches
    size = shape.element_size * shape.parameters / stages
    buckets = math.ceil(size / BUCKET)
    meetings = tuple(Call("barrier", ranks, 0.0) for _ in range(3)) if columns else ()
    judged = (*_agreement(ranks, 17), *(Call("barrier", ranks, 0.0),) * 2)
    said = (*_exchange(stages, "replica"), Call("barrier", stages, 0.0, group="replica"))
    return {
        "gradient evaluations": Term(work),
        "local solves": Term({"statistics": samples / stages, "factorisation": 1.0 / stages}),
        "Jacobian products": Term(_staged_tangents(shape, stages, thinned)),
        "reduced model": Term({"column": columns, "pair": (columns / stages) ** 2, "cube": columns**3}),
        BUBBLE: Term(_times((stages - 1) / micro_batches, work)),
        "pipeline messages": Term(calls=pipeline_messages(shape, samples / micro_batches, thinned)),
        "gradient sum": Term(calls=(Call("allreduce", replicas, size / buckets, buckets, "stage"),)),
        # The predicted reduction goes to all as well; a barrier is before each of the three.
        "coarse reduction": Term(
            calls=(
                *_coarse_reduction(shape, (2 * columns + 1) * columns),
                *(_decision(ranks, RECORD) if columns else ()),
                *meetings,
            )
        ),
        # To be judged, and the norm of the step; what is said of the batch, within the replica and to all.
        "agreement": Term(calls=(*judged * 2, *said * 2, *_exchange(ranks), Call("barrier", ranks, 0.0))),
    }


def _staged_tangents(shape: Shape, stages: int, samples: float) -> Amounts:
    """Of a micro-batch through all stages, then of the others through the last, which carries all columns."""
    if not shape.columns:
        return {}
    rest = shape.micro_batches - 1
    filling = _tangents(shape, samples, stages)
    last = {"tangent": samples * (1.0 + shape.all_columns) / (3.0 * stages), "pass": 1.0}
    return added(filling, _times(rest, last))


def pipeline_messages(shape: Shape, samples: float, thinned: float) -> tuple[Call, ...]:
    """Activations or gradients of a micro-batch from stage to stage, then of the others over one border."""
    stages = shape.stages
    rest, columns = shape.micro_batches - 1, shape.all_columns
    hops = stages - 1 + rest
    found = Call(SEND, stages, shape.activation_bytes * samples, PASSES * hops, "replica")
    if not columns or stages == 1:
        return (found,)
    # Activations, and beside them a tangent of each column so far.
    carried = (stages - 1) * (1.0 + columns / 2.0) + rest * (1.0 + columns * (stages - 1) / stages)
    return (found, Call(SEND, stages, carried / hops * shape.activation_bytes * thinned, hops, "replica"))


def seconds_of(amounts: Mapping[str, float], values: Mapping[str, float]) -> float:
    """Amounts times the values of the unknowns, and the seconds on the network."""
    return sum(amount * (1.0 if name == NETWORK else values[name]) for name, amount in amounts.items())
