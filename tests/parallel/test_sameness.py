"""What ranks were given alike is told from what they were not."""

import math

import pytest
import torch

from apts_mpi.errors import SharedInvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.sameness import check_same, check_same_tensors, fields_in_words, first_other
from apts_mpi.tools import tensors
from apts_mpi.tools.events import Events
from apts_mpi.train.options import TrainingOptions


@pytest.fixture
def comm(world):
    return Communicator(world, Events())


@pytest.mark.parametrize(
    ("values", "found"),
    [([3, 3, 3], None), ([3, 4], (1, 0)), ([4, 3, 3], (0, 1)), ([1, 1, 2, 3], (2, 0)), ([5], None)],
)
def test_first_other(values, found):
    assert first_other(values) == found


def test_fields_in_words():
    words = fields_in_words(TrainingOptions(seed=3))
    assert words["seed"] == ["3"] and words["local.iterations"] == ["1"] and "local" not in words


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_words(world, comm):
    check_same({"list": ["a", "b"], "own": ["c"]} if world.rank == 0 else {"list": ["a", "b"]}, comm, "here", "mend it")
    words = ["a", "b", "c"] if world.rank == world.size - 1 else ["a", "b"]
    if world.size == 1:
        check_same({"list": words}, comm, "here", "mend it")
        return
    message = f"^here: rank {world.size - 1} has another list than rank 0, c and nothing; mend it$"
    with pytest.raises(SharedInvalidInput, match=message):
        check_same({"list": words}, comm, "here", "mend it")


TENSORS = {
    "float32": torch.arange(60.0).view(20, 3),
    "float64 with nan": torch.tensor([[1.0, math.nan], [math.inf, 2.0]], dtype=torch.float64),
    "bfloat16": torch.arange(6.0).bfloat16(),
    "bool": torch.tensor([True, False, True]),
    "int64": torch.arange(7),
    "transposed": torch.arange(12.0).view(3, 4).T,
    "expanded": torch.zeros(1, 2).expand(5, 2),
    "no numbers": torch.zeros(4, 0),
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", TENSORS)
def test_tensors(world, comm, monkeypatch, name):
    monkeypatch.setattr(tensors, "PIECE", 4)
    tensor = TENSORS[name]
    check_same_tensors({name: (tensor, None)}, comm, "here", "mend it")
    check_same_tensors({name: (tensor, torch.tensor([2, 0]) % len(tensor))}, comm, "here", "mend it")
    if world.size == 1 or tensor.numel() == 0:
        return
    other = tensor.clone()
    if world.rank == world.size - 1:
        other[-1] = other[-1].logical_not() if tensor.dtype == torch.bool else other[-1] + 3
    message = f"^here: rank {world.size - 1} has other {name} than rank 0, first in sample {len(tensor) - 1}; mend it$"
    with pytest.raises(SharedInvalidInput, match=message):
        check_same_tensors({name: (other, None)}, comm, "here", "mend it")
    # What does not count may be anything.
    check_same_tensors({name: (other, torch.zeros(3, dtype=torch.int64))}, comm, "here", "mend it")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_difference(world, comm, dtype):
    tensor = torch.linspace(1, 2, 50, dtype=dtype)
    other = tensor.clone()
    other[7] *= 1 + 3 * torch.finfo(dtype).eps * world.rank
    check_same_tensors({"data": (other, None)}, comm, "here", "mend it")
    other[7] *= 1 + 1e-4 * (world.rank > 0)
    with pytest.raises(SharedInvalidInput, match="first in sample 7;"):
        check_same_tensors({"data": (other, None)}, comm, "here", "mend it")


@pytest.mark.mpi(min_size=2)
def test_ranks_that_have_a_tensor_are_compared(world, comm):
    if world.rank == 0:
        given = {"inputs": (torch.zeros(3), None)}
    else:
        given = {"targets": (torch.full((3,), float(world.rank == 2)), None)}
    if world.size == 2:
        check_same_tensors(given, comm, "here", "mend it")
        return
    with pytest.raises(SharedInvalidInput, match="here: rank 2 has other targets than rank 1, first in sample 0"):
        check_same_tensors(given, comm, "here", "mend it")
