"""What ``auto`` stands for, and which parts do not go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from apts_mpi.curvature.dense import LARGEST_DENSE
from apts_mpi.curvature.quadratic_loss import is_quadratic
from apts_mpi.errors import InvalidInput
from apts_mpi.network.partition import Layer, Layout, Subdomain, make_subdomains, most_subdomains, whole_subdomains
from apts_mpi.objective.objective import Loss
from apts_mpi.options import APTSOptions

# Unless the user says otherwise dense blocks are at most so large: a matrix costs samples times the square of its size,
# and poisson-3d converges as fast with 12 blocks of 600 parameters as with 4 of 2,000.
USUAL_DENSE_BLOCK = 640

# Networks beyond this many parameters are not cut into usual dense blocks: the rows of 2,000 samples take 256 MB.
LARGEST_DENSE_NETWORK = 32768

DAMPING = {"kfac": 0.3, "gauss-newton": 1e-7}

# K-FAC's for a loss whose curvature does not change along a step: on three problems, noisy data among them, squared
# errors fell lower with it than with 0.3, and with a tenth of it those of other data rose.
QUADRATIC_DAMPING = 0.003


def compose(
    options: APTSOptions,
    *,
    network: torch.nn.Module,
    loss: Loss,
    called: bool,
    layers: Sequence[Layer],
    subdomains: Sequence[Subdomain],
) -> APTSOptions:
    """The options with every ``auto`` replaced by what it stands for.

    Parameters
    ----------
    options
        As the user gave them.
    network, loss
        The network and its loss.
    called
        Whether a function calls the network, for more than its outputs.
    layers, subdomains
        How it is split.

    Raises
    ------
    InvalidInput
        If the parts cannot work together, naming the option and another choice.
    """
    largest = max(part.stop - part.start for part in subdomains)
    edges = {layer.start for layer in layers} | {layers[-1].stop}
    whole = all(part.start in edges and part.stop in edges for part in subdomains)
    normalised, random = _is_normalised(network), _is_random(network)
    solver, variant = options.local.solver, options.schwarz.variant
    if solver == "auto":
        dense = called and not normalised and not random and largest <= LARGEST_DENSE
        solver = "gauss-newton" if dense else "kfac" if whole and not called else "adam"
    data = options.schwarz.decomposition == "data"
    curved_outputs = solver == "steihaug" and options.local.product == "gauss-newton"
    if variant == "auto":
        variant = "exact" if called or data or curved_outputs else "inexact"
    if curved_outputs and variant == "inexact":
        raise InvalidInput(
            "local.product: 'gauss-newton' is zero with schwarz.variant inexact, whose local objectives are linear in "
            "their outputs; choose --schwarz.variant exact, or --local.product hessian"
        )
    if data and variant == "inexact":
        raise InvalidInput(
            "schwarz.variant: 'inexact' leaves out the layers behind a subdomain, and with schwarz.decomposition data "
            "there are none; choose exact"
        )
    if data and options.schwarz.local_data == "full":
        raise InvalidInput(
            "schwarz.local_data: 'full' would make all subdomains of schwarz.decomposition data the same; choose shard"
        )
    if data and options.schwarz.overlap:
        raise InvalidInput(
            f"schwarz.overlap: {options.schwarz.overlap} is for subdomains of parameters; with schwarz.decomposition "
            "data give 0"
        )
    if called and variant == "inexact":
        raise InvalidInput(
            "schwarz.variant: 'inexact' needs layers whose outputs alone lead to the loss, but this network is called "
            "by a function of its own; choose exact"
        )
    if called and solver == "kfac":
        raise InvalidInput(
            "local.solver: 'kfac' needs layers that are called once with the samples, but this network is called by a "
            "function of its own; choose gauss-newton, tr, lsr1, steihaug, sgd or adam"
        )
    if not whole and solver == "kfac":
        raise InvalidInput(
            "local.solver: 'kfac' needs whole layers, but subdomains cut them; choose --schwarz.partition layer, or "
            "another local solver"
        )
    reason = _why_not_dense(options, normalised, random, largest) if solver == "gauss-newton" else ""
    if reason:
        raise InvalidInput(f"local.solver: 'gauss-newton' cannot be used: {reason}; choose kfac or another one")
    local_data = options.schwarz.local_data
    if local_data == "auto":
        local_data = "full" if solver == "gauss-newton" and not data else "shard"
    partition = options.schwarz.partition
    if partition == "auto":
        partition = "layer" if whole else "index"
    damping = options.local.damping
    if damping is None:
        damping = QUADRATIC_DAMPING if solver == "kfac" and is_quadratic(loss) else DAMPING.get(solver)
    coarse = options.coarse
    if coarse.norm == "auto":
        coarse = replace(coarse, norm="scaled" if solver == "gauss-newton" else "2")
    if coarse.samples is None and solver == "gauss-newton":
        coarse = replace(coarse, samples=1.0)
    return replace(
        options,
        coarse=coarse,
        local=replace(options.local, solver=solver, damping=damping),
        schwarz=replace(
            options.schwarz,
            variant=variant,
            local_data=local_data,
            partition=partition,
        ),
    )


def _why_not_dense(options: APTSOptions, normalised: bool, random: bool, largest: int) -> str:
    """What keeps dense Gauss-Newton from being used; empty: nothing."""
    if normalised:
        return "batch normalisation ties samples together"
    # In one stage the rows are not known before they are computed, neither their number nor their masks.
    if options.layout == "staged" and random:
        return "with layout staged dropout would draw other masks for the rows than for the loss"
    if options.layout == "staged" and largest > LARGEST_DENSE:
        return f"with layout staged a subdomain of {largest} parameters exceeds {LARGEST_DENSE}"
    return ""


def may_be_dense(options: APTSOptions, network: torch.nn.Module, called: bool) -> bool:
    """Whether dense Gauss-Newton is, or with small blocks would be, the local solver for subdomains of parameters."""
    solver = options.local.solver
    automatic = solver == "auto" and called and not (_is_normalised(network) or _is_random(network))
    return options.schwarz.decomposition == "parameters" and (automatic or solver == "gauss-newton")


def split_parameters(options: APTSOptions, layers: Sequence[Layer], ranks: int, dense: bool) -> tuple[Subdomain, ...]:
    """The subdomains.

    Without a number of them, one for each rank of a replica if the partition can make as many; or for dense blocks a
    multiple of that, so that they are of the usual size.

    Parameters
    ----------
    options, layers
        As in `compose`.
    ranks
        Number of ranks.
    dense
        What `may_be_dense` says.

    Raises
    ------
    InvalidInput
        If the partition cannot make as many as the options ask for.
    """
    schwarz = options.schwarz
    step = max(ranks // options.replicas, 1)
    count = options.subdomains or step
    if schwarz.decomposition == "data":
        return whole_subdomains(layers, count)
    partition: Literal["layer", "index"] = "index" if schwarz.partition == "index" else "layer"
    if options.subdomains is None:
        count = min(count, most_subdomains(layers, partition))
    if dense and schwarz.partition == "auto":
        partition, count = _dense_partition(layers, step, options.subdomains) or (partition, count)
    return make_subdomains(layers, count, partition, schwarz.overlap)


def _dense_partition(
    layers: Sequence[Layer], step: int, count: int | None
) -> tuple[Literal["layer", "index"], int] | None:
    """Kind and number of dense blocks: layers where they make blocks of usual size, else equal ranges.

    ``count`` if given, else the least multiple of ``step``. None where the network is too large for such blocks.
    """
    size = layers[-1].stop
    for number in [count] if count else range(step, len(layers) + 1, step):
        if number <= len(layers):
            parts = make_subdomains(layers, number, "layer", 0)
            if max(part.stop - part.start for part in parts) <= USUAL_DENSE_BLOCK:
                return "layer", number
    if size > min(LARGEST_DENSE_NETWORK, (count or size) * LARGEST_DENSE):
        return None
    return "index", min(count or step * math.ceil(size / (step * USUAL_DENSE_BLOCK)), size)


def _is_random(network: torch.nn.Module) -> bool:
    return any(
        isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.training and module.p > 0.0
        for module in network.modules()
    )


def _is_normalised(network: torch.nn.Module) -> bool:
    return any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in network.modules())


def describe(options: APTSOptions, layout: Layout, subdomains: Sequence[Subdomain], network: str) -> str:
    """The composed solver, in words; ``network`` says what it works on."""
    lines = [
        f"APTS: {network}",
        f"  ranks: {layout.ranks} in {layout.teams} teams, replicas {layout.replicas}",
        f"  schwarz: {options.schwarz}",
        f"  local: {options.local}",
        f"  trust region: {options.trust_region}",
        f"  coarse: {options.coarse}",
        f"  global step: {options.global_step}",
    ]
    for subdomain in subdomains:
        lines.append(
            f"  subdomain {subdomain.index}: parameters {subdomain.start} to {subdomain.stop} "
            f"(owned {subdomain.owned_start} to {subdomain.owned_stop}), "
            f"segments {subdomain.first_segment} to {subdomain.last_segment}"
        )
    return "\n".join(lines)
