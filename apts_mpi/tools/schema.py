"""What values that were read from a file have to be: checks of single values, and of lists and records made of them.

A check is a function of a value and its place, such as ``run.h5: progress.epoch``. It returns the value, or raises
`InvalidInput` with the place, the value and what it has to be. So whatever a file holds is known before it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from apts_mpi.errors import InvalidInput, shown

Check = Callable[[Any, str], Any]

# Counts of what a run has done stay far below.
MOST = 2**48

LARGEST = sys.float_info.max


def allow(condition: bool, place: str, value: object, wanted: str) -> None:
    """Raise `InvalidInput` unless ``condition`` holds."""
    if not condition:
        raise InvalidInput(f"{place.removesuffix(':')}: {shown(value)} is not allowed there; it has to be {wanted}")


def anything(value: Any, place: str) -> Any:
    """Any value: of what is checked elsewhere."""
    return value


def flag(value: Any, place: str) -> bool:
    """True or false."""
    allow(isinstance(value, bool), place, value, "true or false")
    return value


def text(value: Any, place: str) -> str:
    """A text."""
    allow(isinstance(value, str), place, value, "a text")
    return value


def line(value: Any, place: str) -> str:
    """A text that can be shown on a line."""
    allow(isinstance(value, str) and value.isprintable(), place, value, "a text of one line")
    return value


def whole(least: int = 0, most: int = MOST) -> Check:
    """A whole number within bounds."""

    def check(value: Any, place: str) -> int:
        within = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        allow(within, place, value, f"a whole number from {least} to {most}")
        return value

    return check


def number(least: float = -LARGEST, most: float = LARGEST) -> Check:
    """A number within bounds, which is finite unless they are not."""

    def check(value: Any, place: str) -> float:
        within = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
        allow(within, place, value, f"a number from {least:g} to {most:g}")
        return value

    return check


def any_number(value: Any, place: str) -> float:
    """A number, be it infinite or none."""
    allow(isinstance(value, int | float) and not isinstance(value, bool), place, value, "a number")
    return value


def nothing_or(check: Check) -> Check:
    """Null, or what passes a check."""
    return lambda value, place: None if value is None else check(value, place)


def sequence(check: Check, most: int | None = None, least: int = 0) -> Check:
    """A list of what passes a check."""

    def check_all(value: Any, place: str) -> list[Any]:
        allow(isinstance(value, list), place, value, "a list")
        allow(most is None or len(value) <= most, place, value, f"a list of at most {most}")
        allow(len(value) >= least, place, value, f"a list of at least {least}")
        return [check(item, f"{place}[{index}]") for index, item in enumerate(value)]

    return check_all


def each(checks: Sequence[Check]) -> Check:
    """A list of as many items as there are checks, each of which passes its own."""

    def check_each(value: Any, place: str) -> list[Any]:
        allow(isinstance(value, list) and len(value) == len(checks), place, value, f"a list of {len(checks)}")
        return [check(item, f"{place}[{index}]") for index, (check, item) in enumerate(zip(checks, value, strict=True))]

    return check_each


def mapping(check: Check | None = None) -> Check:
    """Names, each with what passes a check, or with anything."""

    def check_all(value: Any, place: str) -> dict[str, Any]:
        allow(isinstance(value, dict), place, value, "an object with names")
        return {name: check(item, _inside(place, name)) if check else item for name, item in value.items()}

    return check_all


def record(needed: Mapping[str, Check], possible: Mapping[str, Check] | None = None) -> Check:
    """All names of ``needed`` and perhaps some of ``possible``, no others, each with what passes its check."""
    checks = {**needed, **(possible or {})}

    def check_all(value: Any, place: str) -> dict[str, Any]:
        mapping()(value, place)
        for name in value:
            if name not in checks:
                raise InvalidInput(
                    f"{place.removesuffix(':')}: {shown(name)} is not known there; it has {', '.join(checks)}"
                )
        for name in needed:
            if name not in value:
                raise InvalidInput(f"{place.removesuffix(':')}: {shown(name)} is missing; it has {', '.join(checks)}")
        return {name: checks[name](item, _inside(place, name)) for name, item in value.items()}

    return check_all


def among(needed: Mapping[str, Check]) -> Check:
    """All names of ``needed``, each with what passes its check, among others that are checked elsewhere."""

    def check_all(value: Any, place: str) -> dict[str, Any]:
        found = mapping()(value, place)
        return record(needed)({name: item for name, item in found.items() if name in needed}, place)

    return check_all


def instance(kind: Any, later: tuple[str, ...] = (), **checks: Check) -> Check:
    """The fields of a dataclass; ``checks`` are of those that are no counts. Returns an instance.

    Those of ``later`` may be missing, as earlier versions did not save them, and then have their defaults.
    """
    of_fields = {field.name: checks.get(field.name, whole()) for field in fields(kind)}
    possible = {name: of_fields.pop(name) for name in later}
    check_fields = record(of_fields, possible)
    return lambda value, place: kind(**check_fields(value, place))


def _inside(place: str, name: object) -> str:
    """The place of a name within an object; a name that could spoil the line is written as messages show values."""
    plain = isinstance(name, str) and name.isprintable() and len(name) <= 40
    separator = " " if place.endswith(":") else "."
    return f"{place}{separator}{name if plain else shown(name)}"
