"""Which parameters belong to which subdomain. Index arithmetic only."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from apts_mpi.errors import InvalidInput


def split(size: int, parts: int, part: int) -> tuple[int, int]:
    """Range of the ``part``-th of ``parts`` contiguous parts of ``size`` items, whose sizes differ by one at most."""
    return size * part // parts, size * (part + 1) // parts


def part_of(size: int, parts: int, item: int) -> int:
    """The part of `split` that holds ``item``."""
    return ((item + 1) * parts - 1) // size


def balanced_cuts(costs: Sequence[float], parts: int) -> list[int]:
    """Cut a sequence into contiguous parts, each non-empty, so that the largest cost of a part is least.

    Parameters
    ----------
    costs
        Costs of the items.
    parts
        Number of parts, at most the number of items.

    Returns
    -------
    list of int
        ``parts + 1`` cuts; part p holds items ``cuts[p]`` to ``cuts[p + 1] - 1``.
    """
    low, capacity = max(costs), sum(costs)
    for _ in range(60):  # bisection to rounding
        middle = 0.5 * (low + capacity)
        if len(_fill(costs, parts, middle)) <= parts:
            capacity = middle
        else:
            low = middle
    return [*_fill(costs, parts, capacity), len(costs)]


def _fill(costs: Sequence[float], parts: int, capacity: float) -> list[int]:
    """Starts of parts filled in turn up to ``capacity``, leaving at least one item for each of ``parts`` parts."""
    starts = [0]
    load = 0.0
    for item, cost in enumerate(costs):
        full = load + cost > capacity or len(costs) - item <= parts - len(starts)
        if full and item > starts[-1]:
            starts.append(item)
            load = 0.0
        load += cost
    return starts


@dataclass(frozen=True)
class Layer:
    """The smallest unit of the ``layer`` partition: a range of the flat vector and the segments that use it.

    Attributes
    ----------
    start, stop
        Range of the flat parameter vector.
    first_segment, last_segment
        First and last segment of the network that uses these parameters.
    name
        Name of the module that owns them.
    """

    start: int
    stop: int
    first_segment: int
    last_segment: int
    name: str = ""


@dataclass(frozen=True)
class Subdomain:
    """A contiguous range of the flat parameter vector that is corrected by itself.

    Attributes
    ----------
    index
        Number of the subdomain.
    start, stop
        Range of the flat parameter vector, overlap included.
    owned_start, owned_stop
        The range without the overlap; these ranges are disjoint and cover the vector.
    first_segment, last_segment
        Segments of the network between which the parameters are used.
    """

    index: int
    start: int
    stop: int
    owned_start: int
    owned_stop: int
    first_segment: int
    last_segment: int


def most_subdomains(layers: Sequence[Layer], kind: Literal["layer", "index"]) -> int:
    """Number of subdomains that a partition of this kind can make at most."""
    return len(layers) if kind == "layer" else layers[-1].stop


def make_subdomains(
    layers: Sequence[Layer], count: int, kind: Literal["layer", "index"], overlap: int
) -> tuple[Subdomain, ...]:
    """Split the parameters into ``count`` subdomains.

    Parameters
    ----------
    layers
        The layers of the network in the order of the flat vector, without gaps.
    count
        Number of subdomains.
    kind
        ``layer``: whole layers, balanced by their numbers of parameters; ``index``: equal ranges of the vector.
    overlap
        Layers or indices taken from each neighbour.

    Raises
    ------
    InvalidInput
        If the partition cannot make that many subdomains.
    """
    most = most_subdomains(layers, kind)
    if count > most:
        remedy = "; --schwarz.partition index makes more" if kind == "layer" else ""
        raise InvalidInput(f"subdomains: {count} is too many; the {kind} partition makes at most {most}{remedy}")
    if kind == "layer":
        starts = [
            layers[item].start for item in balanced_cuts([layer.stop - layer.start for layer in layers], count)[:-1]
        ]
    else:
        starts = [split(most, count, part)[0] for part in range(count)]
    return subdomains_at(layers, starts, kind, overlap)


def subdomains_at(
    layers: Sequence[Layer], cuts: Sequence[int], kind: Literal["auto", "layer", "index"], overlap: int
) -> tuple[Subdomain, ...]:
    """Split the parameters at given places.

    Parameters
    ----------
    layers
        As in `make_subdomains`.
    cuts
        Where in the flat vector subdomains begin, rising from 0.
    kind
        What the overlap is counted in; ``auto``: layers, where no cut is within one.
    overlap
        As in `make_subdomains`.

    Raises
    ------
    InvalidInput
        For a cut that is not within the vector, or with kind ``layer`` within a layer.
    """
    size = layers[-1].stop
    if cuts[-1] >= size:
        raise InvalidInput(
            f"schwarz.cuts: {cuts[-1]} is not within the {size} parameters; give cuts, or a checkpoint, of this network"
        )
    within = [(cut, layer) for cut in cuts for layer in layers_between(layers, cut, cut + 1) if layer.start != cut]
    if kind == "layer" and within:
        cut, layer = within[0]
        raise InvalidInput(
            f"schwarz.cuts: {cut} is within layer {layer.name!r}, from {layer.start} to {layer.stop}; give where "
            "layers begin, or --schwarz.partition index"
        )
    by_index = kind == "index" or within
    edges: Sequence[int] = range(size + 1) if by_index else [*(layer.start for layer in layers), size]
    owned = itertools.pairwise([*cuts, size])
    return tuple(
        _subdomain(layers, index, owned=(start, stop), extended=_extend(edges, start, stop, overlap))
        for index, (start, stop) in enumerate(owned)
    )


def _extend(edges: Sequence[int], start: int, stop: int, overlap: int) -> tuple[int, int]:
    """The range between two of the edges, and so many units between edges more on either side, as far as there are."""
    first, last = bisect_left(edges, start), bisect_left(edges, stop)
    return edges[max(first - overlap, 0)], edges[min(last + overlap, len(edges) - 1)]


def _subdomain(layers: Sequence[Layer], index: int, owned: tuple[int, int], extended: tuple[int, int]) -> Subdomain:
    touched = layers_between(layers, *extended)
    return Subdomain(
        index,
        *extended,
        *owned,
        first_segment=min(layer.first_segment for layer in touched),
        last_segment=max(layer.last_segment for layer in touched),
    )


def layers_between(layers: Sequence[Layer], start: int, stop: int) -> list[Layer]:
    """The layers that have parameters in a range of the flat vector."""
    return [layer for layer in layers if layer.start < stop and start < layer.stop]


def whole_subdomains(layers: Sequence[Layer], count: int) -> tuple[Subdomain, ...]:
    """``count`` subdomains that each have all parameters, for the decomposition of data."""
    first = min(layer.first_segment for layer in layers)
    last = max(layer.last_segment for layer in layers)
    size = layers[-1].stop
    return tuple(Subdomain(index, 0, size, 0, size, first, last) for index in range(count))


def multiplicity(subdomains: Sequence[Subdomain], subdomain: Subdomain) -> list[tuple[int, int, int]]:
    """Ranges of a subdomain on which the number of subdomains that share each index is constant.

    Returns
    -------
    list of (start, stop, count)
        In the order of the flat vector; they cover the subdomain.
    """
    edges = {subdomain.start, subdomain.stop}
    for other in subdomains:
        edges.update(edge for edge in (other.start, other.stop) if subdomain.start < edge < subdomain.stop)
    ordered = sorted(edges)
    return [
        (start, stop, sum(other.start <= start and stop <= other.stop for other in subdomains))
        for start, stop in itertools.pairwise(ordered)
    ]
