"""The two texts of a checkpoint: what the index says of step, arrays and parts, and the metadata.

Both are validated as a whole before anything of them is used: a file may come from anywhere.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.errors import InvalidInput, shown
from apts_mpi.tools.schema import allow, mapping, record, sequence, text, whole

GROUP = "checkpoint"
INDEX, METADATA = f"{GROUP}/index", f"{GROUP}/metadata"

# Dimensions that an array may have: numpy has as many as HDF5, or more. And its bytes, which are counted in 64 bits.
DIMENSIONS, LARGEST = 32, 2**62

# Of lists and objects in each other in a text; what reads them is recursive.
DEEPEST = 64

# Characters of a name.
LONGEST_NAME = 2048

NUMBERS_OR_TRUTH_VALUES = "biufc"


def describe(arrays: Sequence[Array], step: int, parts: str, checksums: Sequence[int]) -> str:
    """The text of the index. ``checksums`` are those that `seal` returned for the files in directory ``parts``."""
    listed = [{"name": array.name, "shape": array.shape, "dtype": array.dtype.str} for array in arrays]
    return json.dumps({"step": step, "arrays": listed, "parts": parts, "checksums": checksums})


def part_name(rank: int) -> str:
    """Name of a rank's file in the directory of parts."""
    return f"{rank:04d}.h5"


def dataset_in_part(name: str, first_row: int) -> str:
    """Name of a slab of the array ``name`` in the file of its rank."""
    return f"{name}/{first_row}"


def parts_names(step: int) -> re.Pattern[str]:
    """What the directory with the parts of a checkpoint may be called."""
    return re.compile(rf"step-{step:08d}(\.[0-9]{{1,9}})?\.parts")


def check_names(names: Iterable[str]) -> None:
    """Raise `InvalidInput` for names of arrays that cannot be used."""
    counts = Counter(names)
    for name in counts:
        steps = name[:LONGEST_NAME].split("/")[:DEEPEST]
        groups = {"/".join(steps[:depth]) for depth in range(1, len(steps))}
        within = steps[0] == GROUP or not groups.isdisjoint(counts.keys()) or not {"", ".", ".."}.isdisjoint(steps)
        if counts[name] > 1 or within or "/".join(steps) != name or not name.isprintable():
            raise InvalidInput(
                f"checkpoint: array name {shown(name)} cannot be used; names are distinct printable paths such as "
                f"'parameters/0.weight', none inside another and none below '{GROUP}'"
            )


@dataclass(frozen=True)
class Shaped:
    """What an array, or a slab of one, has to be."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Index:
    """What is in a checkpoint.

    Attributes
    ----------
    step : int
        When it was saved.
    arrays : dict of str to Shaped
        By their names, in the order in which they were saved.
    parts : str
        Name of the directory with the slabs of the ranks; empty if the file holds them all.
    checksums : list of int
        Of the parts.
    """

    step: int
    arrays: dict[str, Shaped]
    parts: str
    checksums: list[int]


def read_index(content: str, place: str) -> Index:
    """The index of a text, or `InvalidInput` naming the ``place`` in it where it is none."""
    checked = _CHECK(as_json(content, place), place)
    step, parts, checksums = checked["step"], checked["parts"], checked["checksums"]
    names = [name for name, _ in checked["arrays"]]
    try:
        check_names(names)
    except InvalidInput as error:
        raise InvalidInput(f"{place} {error}") from error
    named = parts_names(step).fullmatch(parts) is not None
    allow(named or parts == "", f"{place} parts", parts, f"'' or like 'step-{step:08d}.parts'")
    allow(named == bool(checksums), f"{place} checksums", checksums, "one number a part")
    return Index(step, dict(checked["arrays"]), parts, checksums)


def read_metadata(content: str, place: str) -> dict[str, Any]:
    """The metadata of a text, or `InvalidInput`."""
    return mapping()(as_json(content, place), place)


def as_json(content: str, place: str) -> Any:
    """What a JSON text holds, or `InvalidInput` if it is none or too deep."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{place} this is no JSON text ({error})") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [part for whole_part in level for part in _parts_of(whole_part)]
        if not level:
            return value
    raise InvalidInput(f"{place} lists and objects are in each other more than {DEEPEST} times")


def _parts_of(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _array(value: Any, place: str) -> tuple[str, Shaped]:
    described = record({"name": text, "shape": sequence(whole(0, LARGEST), DIMENSIONS), "dtype": text})(value, place)
    dtype = _dtype(described["dtype"], f"{place}.dtype")
    shape = tuple(described["shape"])
    bounded = math.prod(max(length, 1) for length in shape) * dtype.itemsize <= LARGEST
    allow(bounded, f"{place}.shape", described["shape"], f"that of at most {LARGEST} bytes")
    return described["name"], Shaped(shape, dtype)


def _dtype(value: str, place: str) -> np.dtype:
    wanted = "a type of numbers or truth values, such as '<f4'"
    allow(re.fullmatch(rf"[<>|=][{NUMBERS_OR_TRUTH_VALUES}][0-9]{{1,2}}", value) is not None, place, value, wanted)
    try:
        return np.dtype(value)
    except TypeError:
        allow(False, place, value, wanted)
        raise


_CHECK = record(
    {"step": whole(), "arrays": sequence(_array), "parts": text, "checksums": sequence(whole(0, 2**32 - 1))}
)
