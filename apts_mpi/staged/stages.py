"""Stages of a network: where a sequence of modules is cut, and what a rank keeps of it. No communication."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from apts_mpi.errors import InvalidInput
from apts_mpi.network.activations import Bundle
from apts_mpi.network.partition import balanced_cuts
from apts_mpi.network.segments import SegmentedNetwork, segments_of
from apts_mpi.options import PipelineOptions
from apts_mpi.tools.trees import Tree, as_samples, map_tensors


@dataclass(frozen=True)
class Place:
    """A module of the flattened sequence: its name in the network, and the sequence in which it stands."""

    name: str
    parent: nn.Sequential
    key: str

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self.parent[int(self.key)] if self.key.isdigit() else getattr(self.parent, self.key)


@dataclass(frozen=True)
class Stage:
    """The modules ``start`` to ``stop`` of the flattened sequence; ``names`` are those of its first and last module."""

    index: int
    start: int
    stop: int
    names: tuple[str, str]

    def __str__(self) -> str:
        first, last = self.names
        return f"stage {self.index} (" + (f"module {first})" if first == last else f"modules {first} to {last})")


class Elsewhere(nn.Module):
    """In the place of a module that another rank holds.

    Attributes
    ----------
    stages : list of Stage
        All stages of the network.
    """

    def __init__(self, stage: Stage, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.stages = list(stages)
        self._stage = stage

    def forward(self, *_: object) -> torch.Tensor:
        """Raise: the module is not here."""
        raise RuntimeError(f"this module belongs to {self._stage}, which another rank holds")


def places_of(network: nn.Module) -> list[Place]:
    """The modules of a network that is a sequence, nested sequences flattened.

    Raises
    ------
    InvalidInput
        If it is none.
    """
    if type(network) is not nn.Sequential:
        raise InvalidInput(
            f"layout: 'staged' needs a network that is an nn.Sequential, between whose modules it can be cut, and this "
            f"one is a {type(network).__name__}; write it as one, or give --layout replicated"
        )
    return list(_places("", network))


def _places(prefix: str, sequence: nn.Sequential) -> Iterator[Place]:
    for key, module in sequence._modules.items():  # named_children leaves out a module that comes again
        if type(module) is nn.Sequential:
            yield from _places(f"{prefix}{key}.", module)
        else:
            yield Place(prefix + key, sequence, key)


def cut(
    places: Sequence[Place],
    stages: int,
    options: PipelineOptions,
    costs: Sequence[float] | None,
    beginnings: Collection[int] | None = None,
) -> list[Stage]:
    """The stages.

    Parameters
    ----------
    places
        The flattened sequence, on any device.
    stages
        Their number.
    options
        Named cuts, or what to balance.
    costs
        Cost of each module; None takes the number of its parameters.
    beginnings
        Modules with which subdomains begin; balanced stages begin with others only where these are too few. None: all.

    Raises
    ------
    InvalidInput
        If the network cannot be cut that way, or stages would share parameters.
    """
    sizes = [sum(value.numel() for value in place.module.parameters() if value.requires_grad) for place in places]
    # A stage begins with a module that has parameters; those without go with the one before.
    heads = [index for index, size in enumerate(sizes) if size]
    if options.cuts is not None:
        starts = _named_starts(places, heads, stages, options.cuts.split(","))
    else:
        if stages > len(heads):
            raise InvalidInput(
                f"layout: 'staged' on {stages} stages needs as many modules with parameters, and the network has "
                f"{len(heads)} in its sequence; start fewer ranks, or give --replicas"
            )
        weights = sizes if costs is None else costs
        possible = [0, *heads[1:]]
        if beginnings is not None:
            possible = _whole_subdomains(places, possible, beginnings, weights, stages)
        starts = _balance([*possible, len(places)], weights, stages)
    edges = [*starts, len(places)]
    found = [
        Stage(index, start, stop, (places[start].name, places[stop - 1].name))
        for index, (start, stop) in enumerate(itertools.pairwise(edges))
    ]
    _check_untied(places, found)
    return found


def _balance(edges: Sequence[int], weights: Sequence[float], parts: int) -> list[int]:
    """The edges with which so many parts begin, of which the heaviest is as light as can be."""
    groups = [sum(weights[start:stop]) for start, stop in itertools.pairwise(edges)]
    return [edges[index] for index in balanced_cuts(groups, parts)[:-1]]


def _whole_subdomains(
    places: Sequence[Place], heads: Sequence[int], beginnings: Collection[int], weights: Sequence[float], stages: int
) -> list[int]:
    """The heads with which subdomains begin; where these are too few, the heaviest parts between them are halved."""
    crossed = _crossed(places)
    untied = [head for head in heads if head not in crossed]
    heads = untied if len(untied) >= stages else heads
    edges = sorted({0, *(head for head in heads if head in beginnings), len(places)})
    while len(edges) <= stages:
        within = {
            (start, stop): [head for head in heads if start < head < stop] for start, stop in itertools.pairwise(edges)
        }
        start, stop = max((span for span in within if within[span]), key=lambda span: sum(weights[slice(*span)]))
        edges.append(_balance([start, *within[start, stop], stop], weights, 2)[1])
        edges.sort()
    return edges[:-1]


def _crossed(places: Sequence[Place]) -> set[int]:
    """The places where no stage can begin, as modules before and after share a parameter."""
    first: dict[int, int] = {}
    crossed: set[int] = set()
    for index, place in enumerate(places):
        for parameter in place.module.parameters():
            crossed.update(range(first.setdefault(id(parameter), index) + 1, index + 1))
    return crossed


def _named_starts(places: Sequence[Place], heads: Sequence[int], stages: int, cuts: Sequence[str]) -> list[int]:
    names = [place.name for place in places]
    if len(cuts) != stages - 1:
        raise InvalidInput(f"cuts: {len(cuts)} names are given, but {stages} stages need {stages - 1}")
    for name in cuts:
        if name not in names:
            raise InvalidInput(f"cuts: {name!r} is no module of the sequence; choose from {', '.join(names)}")
    starts = [0, *map(names.index, cuts)]
    edges = [*starts, len(names)]
    for start, stop in itertools.pairwise(edges):
        if not any(start <= head < stop for head in heads):
            raise InvalidInput(
                f"cuts: {','.join(cuts)} leave a stage without trainable parameters from {names[start]!r} on; give "
                "them in the order of the sequence, with parameters in each stage"
            )
    return starts


def _check_untied(places: Sequence[Place], stages: Sequence[Stage]) -> None:
    owners: dict[int, tuple[Stage, str]] = {}
    for stage in stages:
        for place in places[stage.start : stage.stop]:
            for name, parameter in place.module.named_parameters():
                full = f"{place.name}.{name}"
                owner, other = owners.setdefault(id(parameter), (stage, full))
                if owner is not stage:
                    raise InvalidInput(
                        f"layout: 'staged' cannot share a parameter between stages, and {other} of stage {owner.index} "
                        f"is {full} of stage {stage.index}; put both into one stage with --cuts, give each module a "
                        "parameter of its own, or choose --layout replicated"
                    )


def keep_stage(
    places: Sequence[Place], stages: Sequence[Stage], own: Stage, autocast: torch.dtype | None = None
) -> SegmentedNetwork:
    """Put placeholders where other ranks hold the modules, and return what is left as segments with ``autocast``.

    The network keeps its names: ``named_parameters`` and ``state_dict`` have this stage's part of it.
    """
    kept = [place.module for place in places[own.start : own.stop]]
    for stage in stages:
        if stage is not own:
            for place in places[stage.start : stage.stop]:
                place.parent.register_module(place.key, Elsewhere(stage, stages))
    return SegmentedNetwork(nn.Sequential(*kept), None, autocast)


def stages_of(places: Sequence[Place]) -> list[Stage] | None:
    """The stages of a network of which `keep_stage` has kept one; None for a whole network."""
    return next((place.module.stages for place in places if isinstance(place.module, Elsewhere)), None)


def multiplications(places: Sequence[Place], inputs: Tree) -> list[float]:
    """Multiplications of each module's forward pass on a few samples, by running copies without memory.

    Raises
    ------
    InvalidInput
        If a module cannot run on torch's meta device.
    """
    segments = segments_of(nn.Sequential(*[place.module for place in places]), None)
    segmented = SegmentedNetwork(nn.Sequential(*map(_WithoutMemory, segments)), None)
    few = map_tensors(lambda tensor: torch.empty_like(tensor[:8], device="meta"), as_samples(inputs, "sample"))
    try:
        with torch.no_grad():
            segmented.measure(few, part=True)
    except Exception as error:
        raise InvalidInput(
            f"balance: 'cost' runs the network without memory, which failed with {type(error).__name__}: {error}; "
            "choose parameters, or name the --cuts"
        ) from error
    return [segmented.share(index, index) for index in range(len(places))]


class _WithoutMemory(nn.Module):
    """A module that runs on torch's meta device, whatever device its tensors are on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, inputs: Bundle, /) -> Any:
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        return functional_call(self.module, empty, (inputs,))
