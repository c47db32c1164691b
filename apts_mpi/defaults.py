"""What ``auto`` stands for, and which parts do not go together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from apts_mpi.curvature.dense import LARGEST_DENSE
from apts_mpi.curvature.kinds import any_seldom_seen
from apts_mpi.curvature.quadratic_loss import is_quadratic
from apts_mpi.errors import InvalidInput
from apts_mpi.local.adaptive import check_adaptive
from apts_mpi.local.coarse_choice import coarse_model, compose_coarse
from apts_mpi.local.registry import solver_class
from apts_mpi.local.solver import LocalSolver, Split
from apts_mpi.network.partition import (
    Layer,
    Subdomain,
    make_subdomains,
    most_subdomains,
    subdomains_at,
    whole_subdomains,
)
from apts_mpi.network.teams import Teams
from apts_mpi.objective.mean_loss import MeanLoss
from apts_mpi.objective.passes import Loss
from apts_mpi.options import (
    APTSOptions,
    GlobalStepOptions,
    LocalData,
    LocalOptions,
    SchwarzOptions,
    TrustRegionOptions,
)
from apts_mpi.options.tree import branch, fold

# Unless the user says otherwise dense blocks are at most so large: a matrix costs samples times the square of its size,
# and poisson-3d converges as fast with 12 blocks of 600 parameters as with 4 of 2,000.
USUAL_DENSE_BLOCK = 640

# What kfac and the trust region have on noisy batches, and the interval of kfac's updates elsewhere: see
# docs/results.md.
NOISY_DAMPING, NOISY_REFRESH, NOISY_MOMENTUM, NOISY_PULL = 1.0, 20, 0.9, 0.2
USUAL_REFRESH = 5

# Networks beyond this many parameters are not cut into usual dense blocks: the rows of 2,000 samples take 256 MB.
LARGEST_DENSE_NETWORK = 32768


# Networks beyond this many parameters have no global step unless it is asked for: its products keep the graph of all
# samples, about three times what a gradient needs.
LARGEST_AUTOMATIC = 131072


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
    split = _split(network, called, layers, subdomains)
    name = options.local.solver
    if name == "auto" and options.coarse.model == "residual":
        name = "gauss-newton"
    noisy = options.noise == "batches"
    if name == "auto":
        dense = called and not split.normalised and not split.random and split.largest <= LARGEST_DENSE
        dense = dense and options.group == 1
        whole = "muon" if noisy and any_seldom_seen(network, layers) else "kfac"
        name = "gauss-newton" if dense else whole if split.whole else "adam"
    solver = solver_class(name)
    quadratic = is_quadratic(MeanLoss(loss))
    model = coarse_model(options, solver, may_be_squares=quadratic is not False)
    options = replace(options, coarse=replace(options.coarse, model=model))
    schwarz = _compose_schwarz(options, name, solver, split)
    local = _compose_local(options.local, name, solver, quadratic is True, noisy)
    options = replace(options, schwarz=schwarz, local=local)
    _check_whole_layers(name, solver, split)
    _check_noise(options)
    solver.check(options, split)
    check_adaptive(options, name, solver)
    coarse = compose_coarse(options, solver)
    trust_region = _compose_trust_region(options.trust_region, noisy)
    if trust_region.pull and coarse.model != "none":
        raise InvalidInput(
            f"trust_region.pull: {trust_region.pull} is for the plain sum of the corrections; choose --coarse none, or "
            "--weight-decay instead"
        )
    if schwarz.prediction == "local" and (coarse.model != "none" or trust_region.pull or noisy):
        raise InvalidInput(
            "schwarz.prediction: 'local' is for the plain sum of the corrections; choose --coarse none, no "
            "trust_region.pull and noise none, or first-order"
        )
    global_step = _compose_global_step(options, solver, layers[-1].stop)
    return replace(options, trust_region=trust_region, coarse=coarse, global_step=global_step)


def _split(network: torch.nn.Module, called: bool, layers: Sequence[Layer], subdomains: Sequence[Subdomain]) -> Split:
    edges = {layer.start for layer in layers} | {layers[-1].stop}
    return Split(
        called=called,
        normalised=_is_normalised(network),
        random=_is_random(network),
        whole=all(part.start in edges and part.stop in edges for part in subdomains),
        largest=max(part.stop - part.start for part in subdomains),
    )


def _compose_schwarz(options: APTSOptions, name: str, solver: type[LocalSolver], split: Split) -> SchwarzOptions:
    schwarz = options.schwarz
    variant, local_data, partition = schwarz.variant, schwarz.local_data, schwarz.partition
    data = schwarz.decomposition == "data"
    if options.coupled:
        local_data = _check_coupled(options)
    if variant == "auto":
        variant = "exact" if split.called or data or solver.needs_exact(options.local) else "inexact"
    if data:
        _check_data(schwarz, variant)
    if split.called and variant == "inexact":
        raise InvalidInput(
            "schwarz.variant: 'inexact' needs layers whose outputs alone lead to the loss, but this network is called "
            "by a function of its own; choose exact"
        )
    evaluates = solver.evaluates or options.local.iterations > 1
    if local_data == "auto" and options.coarse.model == "residual":
        local_data = "shared"
    if local_data == "auto":
        local_data = "shard" if data or (evaluates and solver.local_data == "shared") else solver.local_data
    if local_data == "shared" and evaluates:
        raise InvalidInput(
            f"schwarz.local_data: 'shared' is for solvers that do not evaluate the local objective, and {name!r} with "
            f"local.iterations {options.local.iterations} does; choose shard or full"
        )
    if partition == "auto":
        partition = "layer" if split.whole else "index"
    return replace(schwarz, variant=variant, local_data=local_data, partition=partition)


def _check_coupled(options: APTSOptions) -> LocalData:
    """What local objectives see where a loss takes all samples together; refuse what divides them."""
    schwarz = options.schwarz
    if schwarz.decomposition == "data":
        raise InvalidInput(
            "schwarz.decomposition: 'data' divides the samples, which coupled says belong together; choose parameters"
        )
    if schwarz.local_data not in ("auto", "full"):
        raise InvalidInput(
            f"schwarz.local_data: {schwarz.local_data!r} divides the samples, which coupled says belong together; "
            "choose full"
        )
    return "full"


def _check_data(schwarz: SchwarzOptions, variant: str) -> None:
    """Refuse what subdomains of data cannot have."""
    if variant == "inexact":
        raise InvalidInput(
            "schwarz.variant: 'inexact' leaves out the layers behind a subdomain, and with schwarz.decomposition data "
            "there are none; choose exact"
        )
    if schwarz.local_data in ("full", "shared"):
        raise InvalidInput(
            f"schwarz.local_data: {schwarz.local_data!r} would make all subdomains of schwarz.decomposition data the "
            "same; choose shard"
        )
    if schwarz.overlap:
        raise InvalidInput(
            f"schwarz.overlap: {schwarz.overlap} is for subdomains of parameters; with schwarz.decomposition data give "
            "0"
        )
    if schwarz.cuts is not None:
        raise InvalidInput(
            f"schwarz.cuts: {schwarz.cuts} are for subdomains of parameters; with schwarz.decomposition data give null"
        )


def _compose_local(
    local: LocalOptions, name: str, solver: type[LocalSolver], is_quadratic: bool, noisy: bool
) -> LocalOptions:
    damping = local.damping
    if damping is None and noisy:
        damping = NOISY_DAMPING
    quadratic = not noisy and solver.quadratic_damping is not None and is_quadratic
    if damping is None:
        damping = solver.quadratic_damping if quadratic else solver.damping
    refresh = local.refresh or (NOISY_REFRESH if noisy else USUAL_REFRESH)
    momentum = (NOISY_MOMENTUM if noisy else 0.0) if local.momentum is None else local.momentum
    relax = quadratic if local.relax is None else local.relax
    return replace(local, solver=name, damping=damping, relax=relax, refresh=refresh, momentum=momentum)


def _check_noise(options: APTSOptions) -> None:
    """Refuse what the next batch cannot judge: its slope belongs to one step, the sum of averaged corrections."""
    if options.noise == "none":
        return
    name, data = options.local.solver, options.schwarz.decomposition == "data"
    if not solver_class(name).averages or options.local.iterations > 1 or data:
        raise InvalidInput(
            f"noise: 'batches' needs local.solver kfac or muon with one local iteration on subdomains of parameters, "
            f"not {name!r} with {options.local.iterations} on {options.schwarz.decomposition}; choose none"
        )
    models = {"coarse.model": options.coarse.model, "global_step.model": options.global_step.model}
    for option, model in models.items():
        if model not in ("auto", "none"):
            raise InvalidInput(f"noise: 'batches' does not go with {option} {model!r}; choose none for one of the two")


def _compose_trust_region(trust_region: TrustRegionOptions, noisy: bool) -> TrustRegionOptions:
    pull = (NOISY_PULL if noisy else 0.0) if trust_region.pull is None else trust_region.pull
    return replace(trust_region, pull=pull)


def _compose_global_step(options: APTSOptions, solver: type[LocalSolver], size: int) -> GlobalStepOptions:
    """What is left auto waits for a function that stays the same, see `apts_mpi.options.GlobalStepOptions`."""
    preconditioned = solver.preconditions and options.schwarz.decomposition == "parameters"
    plain = options.layout == "replicated" and options.autocast == "none" and options.noise == "none"
    if options.global_step.model != "auto" or (preconditioned and plain and size <= LARGEST_AUTOMATIC):
        return options.global_step
    return replace(options.global_step, model="none")


def _check_whole_layers(name: str, solver: type[LocalSolver], split: Split) -> None:
    if solver.whole_layers and not split.whole:
        raise InvalidInput(
            f"local.solver: {name!r} needs whole layers, but subdomains cut them; choose --schwarz.partition layer, or "
            "another local solver"
        )


def may_be_dense(options: APTSOptions, network: torch.nn.Module, called: bool) -> bool:
    """Whether dense Gauss-Newton is, or with small blocks would be, the local solver for subdomains of parameters."""
    if options.schwarz.decomposition == "data":
        return False
    if options.local.solver == "auto":
        return called and options.group == 1 and not (_is_normalised(network) or _is_random(network))
    return solver_class(options.local.solver).dense


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
        If the partition cannot make as many as the options ask for, or has none of the cuts.
    """
    schwarz = options.schwarz
    step = max(ranks // options.replicas, 1)
    count = options.subdomains or step
    if schwarz.decomposition == "data":
        return whole_subdomains(layers, count)
    if schwarz.cuts is not None:
        return subdomains_at(layers, schwarz.cuts, schwarz.unit, schwarz.overlap)
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


def describe(
    options: APTSOptions, asked: APTSOptions, teams: Teams, subdomains: Sequence[Subdomain], network: str, loss: str
) -> str:
    """The composed solver, in words, beside what was asked for; ``network`` and ``loss`` say what it works on."""
    lines = [
        f"APTS: {network}",
        fold(f"  loss: {loss}"),
        f"  ranks: {teams.ranks} in {teams.count} teams, replicas {teams.replicas}",
        *branch("options (* is not the default)", options, asked),
    ]
    for name in ("schwarz", "local", "coarse", "trust_region", "global_step"):
        lines += branch(name, getattr(options, name), getattr(asked, name))
    for part in subdomains:
        owned = (part.owned_start, part.owned_stop)
        of_its_own = "" if owned == (part.start, part.stop) else f" (owned {owned[0]} to {owned[1]})"
        lines.append(
            f"  subdomain {part.index}: parameters {part.start} to {part.stop}{of_its_own}, "
            f"segments {part.first_segment} to {part.last_segment}"
        )
    return "\n".join(lines)
