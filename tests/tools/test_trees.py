"""Trees of tensors: what is taken for samples, and what is refused by its path."""

import collections
import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._pytree import register_dataclass

from apts_mpi.errors import InvalidInput
from apts_mpi.tools.trees import (
    as_samples,
    count_samples,
    map_tensors,
    named_leaves,
    numbers_of_sample,
    take,
    tensors_of,
)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass(frozen=True)
class Frozen:
    first: Any
    second: Any


@dataclass
class Registered:
    first: Any
    second: Any


register_dataclass(Registered)

NUMBERS, ROWS = torch.arange(12.0).view(4, 3), torch.arange(4)

TREES = {
    "tensor": NUMBERS,
    "tuple": (NUMBERS, ROWS),
    "list": [NUMBERS, [ROWS]],
    "dict": {"b": NUMBERS, "a": {"c": ROWS}},
    "ordered": collections.OrderedDict(b=NUMBERS, a=ROWS),
    "user": collections.UserDict(b=NUMBERS, a=collections.UserDict(c=ROWS)),
    "immutable": types.MappingProxyType({"b": NUMBERS, "a": ROWS}),
    "named tuple": Pair(NUMBERS, (ROWS,)),
    "dataclass": Frozen(NUMBERS, {"a": Frozen(ROWS, ROWS)}),
    "registered dataclass": Registered(NUMBERS, Frozen(ROWS, [ROWS])),
}


@pytest.mark.parametrize("name", TREES)
def test_samples_of_a_tree(name):
    tree = as_samples(TREES[name], "inputs")
    assert count_samples(tree) == 4
    assert tensors_of(tree)[0] is NUMBERS
    for rows in (slice(1, 3), torch.tensor([2, 0])):
        taken = take(tree, rows)
        assert isinstance(taken, type(tree)) or name == "immutable"
        for part, whole in zip(tensors_of(taken), tensors_of(tree), strict=True):
            assert torch.equal(part, whole[rows])
    assert numbers_of_sample(tree) == 3 + len(tensors_of(tree)) - 1
    # What was given is as it was.
    assert tensors_of(TREES[name])[0] is NUMBERS
    assert list(map(len, tensors_of(TREES[name]))) == [4] * len(tensors_of(tree))


def test_leaves_have_the_paths_by_which_one_reaches_them():
    tree = {"a": [NUMBERS, Pair(ROWS, None)], "b": Frozen(ROWS, collections.UserDict(c="text"))}
    named = named_leaves(tree, "inputs")
    assert list(named) == [
        "inputs['a'][0]",
        "inputs['a'][1].first",
        "inputs['a'][1].second",
        "inputs['b'].first",
        "inputs['b'].second['c']",
    ]
    assert named["inputs['b'].second['c']"] == "text"
    assert map_tensors(torch.neg, tree)["b"].second["c"] == "text"


def test_arrays_share_their_memory():
    array = np.arange(12.0, dtype=np.float32).reshape(4, 3)
    tree = as_samples({"a": array, "b": np.arange(4)}, "inputs")
    array[2, 1] = -1.0
    assert tree["a"][2, 1] == -1.0
    assert tree["b"].dtype == torch.int64


def test_mapped_files_stay_on_disk(tmp_path):
    np.save(tmp_path / "array.npy", np.arange(12.0).reshape(4, 3))
    mapped = np.load(tmp_path / "array.npy", mmap_mode="r")
    tensor = as_samples(mapped, "inputs")
    assert tensor.data_ptr() == mapped.ctypes.data
    assert torch.equal(tensor, torch.arange(12.0, dtype=torch.float64).view(4, 3))


@pytest.mark.parametrize(
    "array", [np.arange(4.0)[::-1], np.arange(4.0).astype(">f8"), np.asfortranarray(np.eye(4)), np.ones(4, bool)]
)
def test_arrays_that_torch_has_otherwise(array):
    assert as_samples(array, "inputs").tolist() == array.tolist()


@pytest.mark.parametrize(
    "tree, message",
    [
        ({"a": NUMBERS, "b": ["x"]}, r"inputs\['b'\]\[0\]: str 'x'"),
        ({"a": NUMBERS, "b": None}, r"inputs\['b'\]: NoneType None"),
        ([NUMBERS, 1.5], r"inputs\[1\]: float 1.5"),
        (Pair(NUMBERS, np.float32(1.5)), r"inputs.second: float32"),
        (Frozen(NUMBERS, torch.tensor(1.0)), r"inputs.second: a single number"),
        (torch.tensor(1.0), r"inputs: a single number"),
        (np.array(["a", "b"]), r"inputs: an array of <U1"),
        ({"a": NUMBERS, "b": np.array([object()] * 4)}, r"inputs\['b'\]: an array of object"),
        ({"a": NUMBERS, "b": {"c": ROWS[:3]}}, r"inputs\['b'\]\['c'\]: there are 3 samples, but 4 in inputs\['a'\]"),
        ({}, "inputs: there is no tensor in this dict"),
        (((), []), "inputs: there is no tensor in this tuple"),
        (object(), "inputs: object"),
        ({NUMBERS}, "inputs: set"),
    ],
)
def test_what_is_refused(tree, message):
    with pytest.raises(InvalidInput, match=message):
        as_samples(tree, "inputs")
