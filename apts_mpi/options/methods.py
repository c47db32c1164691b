"""The methods of the papers by name: each as the options that make it. Data, and what reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from apts_mpi.errors import InvalidInput, require_choice
from apts_mpi.options.solver import APTSOptions
from apts_mpi.options.tree import fold

MethodName = Literal["two-level", "apts", "iapts", "apts-data", "napts"]


@dataclass(frozen=True)
class Method:
    """A method as options.

    Attributes
    ----------
    source : str
        Where it is described.
    fixed : dict
        Options that make it this method, with dots for groups: another value contradicts it.
    usual : dict
        Options that it has unless they are given.
    """

    source: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    usual: Mapping[str, Any] = field(default_factory=dict)


# When a step is accepted and how the radius follows: by small factors, and whatever the length of the step, as the
# authors' program has it (github.com/cruzas/ML_APTS).
_RADIUS = {
    "trust_region.eta1": 0.25,
    "trust_region.shrink_below": 0.25,
    "trust_region.eta2": 0.75,
    "trust_region.decrease_factor": 0.9,
    "trust_region.increase_factor": 1.2,
    "trust_region.grow_from": 0.0,
}

# Trust-region iterations in each subdomain, and after them over all parameters.
_STEPS = {
    "local.solver": "tr",
    "local.iterations": 3,
    "global_step.model": "first-order",
    "global_step.iterations": 3,
}

_WEIGHTS = {"schwarz.decomposition": "parameters"}
_MONOTONE = {"coarse.model": "none", "trust_region.window": 0}

METHODS: dict[str, Method] = {
    "two-level": Method("docs/method.md"),
    "apts": Method(
        "arXiv 2312.13677, 2512.14286",
        fixed=_WEIGHTS | _MONOTONE | {"schwarz.variant": "exact"},
        usual=_STEPS | _RADIUS | {"schwarz.partition": "layer", "schwarz.local_data": "full"},
    ),
    "iapts": Method(
        "arXiv 2512.14286",
        fixed=_WEIGHTS | _MONOTONE | {"schwarz.variant": "inexact", "schwarz.partition": "layer"},
        usual=_STEPS | _RADIUS | {"schwarz.local_data": "full"},
    ),
    "apts-data": Method(
        "arXiv 2502.05133",
        fixed=_MONOTONE
        | {
            "schwarz.decomposition": "data",
            "schwarz.variant": "exact",
            "schwarz.assembly": "sum",
            "schwarz.prediction": "local",
        },
        usual=_STEPS | _RADIUS,
    ),
    "napts": Method(
        "arXiv 2605.14860",
        fixed=_WEIGHTS | {"schwarz.variant": "exact", "coarse.model": "gauss-newton"},
        usual=_STEPS
        | _RADIUS
        | {
            "schwarz.partition": "layer",
            "schwarz.local_data": "full",
            "coarse.columns": ("correction", "gradient"),
            "trust_region.window": 5,
        },
    ),
}


def options_of(name: str) -> dict[str, Any]:
    """Every option that a method decides on, of this one or another, with the value that it has in this one."""
    touched = {option for method in METHODS.values() for option in (*method.fixed, *method.usual)}
    defaults = {option: default_of(option) for option in sorted(touched)}
    return {**defaults, **METHODS[name].usual, **METHODS[name].fixed}


def default_of(option: str) -> Any:
    """The default of an option of `apts_mpi.APTSOptions`, with dots for groups."""
    return value_of(APTSOptions(), option)


def value_of(options: Any, option: str) -> Any:
    """The value of an option, with dots for groups."""
    for part in option.split("."):
        options = getattr(options, part)
    return options


def of_method(name: MethodName, changes: Mapping[str, Any] | None = None) -> APTSOptions:
    """The options of a method of the papers.

    Parameters
    ----------
    name
        ``two-level``, ``apts``, ``iapts``, ``apts-data`` or ``napts``.
    changes
        Options that differ from its own, with dots for groups: ``{"subdomains": 6, "local.iterations": 5}``.

    Raises
    ------
    InvalidInput
        For a name or an option that is not known, and for one that contradicts the method.
    """
    require_choice("method", name, tuple(METHODS))
    groups: dict[str, dict[str, Any]] = {}
    values: dict[str, Any] = {}
    for option, value in {**options_of(name), **(changes or {})}.items():
        group, dot, part = option.partition(".")
        if dot:
            groups.setdefault(group, {})[part] = value
        else:
            values[group] = value
    kinds = get_type_hints(APTSOptions)
    try:
        made = {group: kinds[group](**parts) for group, parts in groups.items()}
        options = APTSOptions(**values, **made)
    except (KeyError, TypeError) as error:
        raise InvalidInput(f"changes: {error} names no option; see apts_mpi.APTSOptions") from error
    check_method(name, options)
    return options


def check_method(name: str, options: Any) -> None:
    """Raise `InvalidInput` for options that contradict a method, naming both."""
    for option, fixed in METHODS[name].fixed.items():
        # Cuts between layers may move.
        value = options.schwarz.unit if option == "schwarz.partition" else value_of(options, option)
        if value != fixed:
            raise InvalidInput(
                f"{option}: {value!r} contradicts --method {name}, which has {fixed!r}; leave out one of the two"
            )
    if name == "napts" and options.trust_region.window == 0:
        raise InvalidInput("trust_region.window: 0 contradicts --method napts; give 1 or more, or --method apts")
    if name != "two-level" and options.noise == "batches":
        raise InvalidInput(f"noise: 'batches' contradicts --method {name}, which minimises each batch; choose none")


def describe_method(name: str, options: Any) -> str:
    """The method, and what is changed of it, for ``--view``."""
    own = options_of(name)
    changed = {option: value_of(options, option) for option in own if value_of(options, option) != own[option]}
    words = ", ".join(f"{option} {value} for {own[option]}" for option, value in changed.items())
    return fold(f"method: {name} ({METHODS[name].source})" + (f", changed: {words}" if words else ""))
