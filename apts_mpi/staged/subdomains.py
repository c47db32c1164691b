"""Subdomains of a network in stages: a property of the run, whatever the number of stages.

A stage is made of whole subdomains where it can be. Where it begins within one, that becomes two.
"""

from __future__ import annotations

from collections.abc import Sequence

from apts_mpi.errors import InvalidInput
from apts_mpi.network.partition import Layer, Subdomain, make_subdomains, subdomains_at
from apts_mpi.options import APTSOptions
from apts_mpi.staged.stages import Stage


def subdomains_asked_for(options: APTSOptions, layers: Sequence[Layer], stages: int) -> tuple[Subdomain, ...] | None:
    """The subdomains of the whole network that the options ask for; None: one a stage.

    Parameters
    ----------
    options
        Of the solver.
    layers
        Those of the whole network.
    stages
        Their number.

    Raises
    ------
    InvalidInput
        If there cannot be as many, or they are fewer than the stages.
    """
    number, cuts = options.subdomains, options.schwarz.cuts
    if cuts is not None:
        return subdomains_at(layers, cuts, options.schwarz.unit, 0)
    if number is None:
        return None
    if number < stages:
        raise InvalidInput(
            f"subdomains: {number} is too few for {stages} stages, which have one each at least; give more, or start "
            "fewer ranks"
        )
    if number > len(layers):
        raise InvalidInput(
            f"subdomains: {number} on {stages} stages are too many for {len(layers)} layers with parameters; give fewer"
        )
    return make_subdomains(layers, number, "layer", 0)


def modules_begun(layers: Sequence[Layer], subdomains: Sequence[Subdomain]) -> set[int]:
    """The modules of the sequence with which a subdomain begins: one that begins within a module is none of them."""
    starts = {part.owned_start for part in subdomains}
    first: dict[int, int] = {}
    for layer in layers:
        first.setdefault(layer.first_segment, layer.start)
    return {segment for segment, start in first.items() if start in starts}


def layers_of_stages(
    stages: Sequence[Stage], held: Sequence[tuple[Sequence[Layer], int]]
) -> tuple[list[int], list[Layer]]:
    """Where in the flat vector of all parameters each stage begins, and the layers of the whole network there.

    Parameters
    ----------
    stages, held
        The stages, and for each its layers and the number of its parameters.
    """
    starts, found = [0], []
    for stage, (layers, size) in zip(stages, held, strict=True):
        for layer in layers:
            start, stop = layer.start + starts[-1], layer.stop + starts[-1]
            first, last = layer.first_segment + stage.start, layer.last_segment + stage.start
            found.append(Layer(start, stop, first, last, layer.name))
        starts.append(starts[-1] + size)
    return starts[:-1], found


def cuts_of_stages(
    subdomains: Sequence[Subdomain] | None, stages: Sequence[Stage], starts: Sequence[int]
) -> tuple[list[int], list[str]]:
    """Where in the flat vector the subdomains begin, and what is other than asked for, one sentence each.

    Parameters
    ----------
    subdomains
        Those asked for; None: one a stage.
    stages, starts
        The stages, and where in the flat vector they begin.
    """
    if subdomains is None:
        return list(starts), []
    cuts = sorted({part.owned_start for part in subdomains} | set(starts))
    divided = [
        f"{stage} begins within subdomain {part.index}"
        for stage, start in zip(stages, starts, strict=True)
        for part in subdomains
        if part.owned_start < start < part.owned_stop
    ]
    if not divided:
        return cuts, []
    number = len(cuts)
    return cuts, [
        f"subdomains: {len(subdomains)} become {number}, as {', '.join(divided)}; iterates are those of {number}"
    ]
