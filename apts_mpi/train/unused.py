"""Options that a run would not look at are refused or told where they are given, so that nobody trusts in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from apts_mpi.errors import require
from apts_mpi.options.methods import value_of
from apts_mpi.train.options import TrainingOptions

LEAVE_OUT = "or leave it out"


@dataclass(frozen=True)
class Use:
    """What some options are for.

    Attributes
    ----------
    names : tuple of str
        The options, with dots for groups, or groups as a whole.
    asked : callable
        Whether a run with these options looks at them.
    remedy : str
        What they are for.
    told : bool
        Whether that is said and no more: the same command line with another optimizer makes what it is compared with.
    """

    names: tuple[str, ...]
    asked: Callable[[TrainingOptions], bool]
    remedy: str
    told: bool = False


def _of(group: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{group}.{name}" for name in names)


def _solved_by(*names: str) -> Callable[[TrainingOptions], bool]:
    """Whether the local solver may be one of these, or is one of the user's."""
    return lambda run: run.local.solver in ("auto", *names) or ":" in run.local.solver


KRYLOV = ("product", "krylov_tolerance", "krylov_products")

USES = (
    Use(("pipeline",), lambda run: run.layout == "staged", f"it is for layout staged; choose that, {LEAVE_OUT}"),
    Use(
        ("schwarz", "local", "coarse", "trust_region", "global_step"),
        lambda run: run.optimizer == "apts",
        "it is for optimizer apts, and does nothing here",
        told=True,
    ),
    Use(
        ("learning_rate",),
        lambda run: run.optimizer != "apts",
        "optimizer apts has no learning rate, and it does nothing here",
        told=True,
    ),
    Use(("patience",), lambda run: run.stop_on is not None, f"it is for --stop-on; give that, too, {LEAVE_OUT}"),
    Use(
        _of("global_step", *KRYLOV),
        lambda run: run.global_step.model in ("auto", "steihaug"),
        f"it is for --global-step steihaug; choose that, {LEAVE_OUT}",
    ),
    Use(
        ("global_step.iterations",),
        lambda run: run.global_step.model != "none",
        f"there is no global step with --global-step none; choose another one, {LEAVE_OUT}",
    ),
    Use(
        _of("local", "decay", "refresh", "relax"),
        _solved_by("kfac"),
        f"it is for --local.solver kfac; choose that, {LEAVE_OUT}",
    ),
    Use(
        _of("local", "damping"),
        _solved_by("kfac", "gauss-newton"),
        f"it is for --local.solver kfac and gauss-newton; choose one of them, {LEAVE_OUT}",
    ),
    Use(
        _of("local", "momentum"),
        _solved_by("kfac", "muon"),
        f"it is for --local.solver kfac and muon; choose one of them, {LEAVE_OUT}",
    ),
    Use(
        _of("local", *KRYLOV),
        lambda run: run.local.solver == "steihaug" or ":" in run.local.solver,
        f"it is for --local.solver steihaug; choose that, {LEAVE_OUT}",
    ),
    Use(
        _of("coarse", "space", "columns", "largest", "samples", "damping", "norm", "acceleration", "momentum"),
        lambda run: run.coarse.model != "none",
        f"there is no coarse level with --coarse none; choose another one, {LEAVE_OUT}",
    ),
    Use(
        _of("coarse", "space", "columns", "largest"),
        lambda run: run.coarse.model != "residual",
        f"--coarse residual has no columns; choose gauss-newton, {LEAVE_OUT}",
    ),
    Use(
        _of("coarse", "acceleration", "momentum"),
        lambda run: run.coarse.model in ("auto", "residual"),
        f"it is for --coarse residual; choose that, {LEAVE_OUT}",
    ),
    Use(
        ("schwarz.repartition_every",),
        lambda run: run.schwarz.partition.startswith("adaptive"),
        f"it is for --schwarz.partition adaptive; choose that, {LEAVE_OUT}",
    ),
    Use(
        ("trust_region.metric_radius",),
        lambda run: run.trust_region.metric == "fisher",
        f"it is for --trust-region.metric fisher; choose that, {LEAVE_OUT}",
    ),
)


def check_unused(given: TrainingOptions, options: TrainingOptions) -> list[str]:
    """What to say of options of the command line that do nothing, one sentence each.

    Parameters
    ----------
    given
        Of the command line alone: what a resumed run has from its checkpoint is no concern of the user's here.
    options
        Of the run.

    Raises
    ------
    InvalidInput
        For one that is no part of what was asked for.
    """
    usual, notes = TrainingOptions(), []
    for use in USES:
        for name in () if use.asked(options) else use.names:
            for option, value in _leaves(name, value_of(given, name)):
                unused = value != value_of(usual, option)
                if unused and use.told:
                    notes.append(f"{option}: {use.remedy}")
                require(use.told or not unused, option, value, use.remedy)
    return notes


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """An option and its value, or those of all options of a group."""
    if not is_dataclass(value):
        yield name, value
        return
    for field in fields(value):
        yield f"{name}.{field.name}", getattr(value, field.name)
