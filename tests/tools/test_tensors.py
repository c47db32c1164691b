"""What tensors hold, found piece by piece."""

import math
import random
import zlib

import numpy as np
import pytest
import torch

from apts_mpi.tools import tensors
from apts_mpi.tools.environment import kept_generators
from apts_mpi.tools.tensors import checksum, first_not_finite


@pytest.mark.parametrize("piece", [1, 5, 1000])
def test_first_not_finite(monkeypatch, piece):
    monkeypatch.setattr(tensors, "PIECE", piece)
    values = torch.randn(9, 2, 3)
    assert first_not_finite(values) is None
    values[7, 1, 2] = math.nan
    assert first_not_finite(values) == (7, 1, 2)
    values[4, 0, 1] = -math.inf
    assert first_not_finite(values) == (4, 0, 1)
    assert first_not_finite(values.transpose(0, 2)) == (1, 0, 4)
    assert first_not_finite(values[:, 0, 1]) == (4,)
    assert first_not_finite(torch.arange(4)) is None


def test_no_copy_of_all_is_made(monkeypatch):
    """Of samples that take no memory there would be half a terabyte."""
    monkeypatch.setattr(tensors, "PIECE", 100)
    seen = []
    original = torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda piece: seen.append(piece.numel()) or original(piece))
    assert first_not_finite(torch.zeros(1, 50).expand(1000, 50)) is None
    assert max(seen) == 100 and sum(seen) == 50_000


@pytest.mark.parametrize("piece", [1, 5, 1000])
def test_checksum(monkeypatch, piece):
    monkeypatch.setattr(tensors, "PIECE", piece)
    values = torch.randn(9, 3)
    assert checksum(values) == checksum(values.clone()) == zlib.crc32(values.numpy().tobytes())
    rows = torch.tensor([4, 4, 0])
    assert checksum(values, rows) == checksum(values[rows]) != checksum(values)
    assert checksum(values.T) == zlib.crc32(values.T.contiguous().numpy().tobytes())
    assert checksum(torch.tensor(1.0)) == zlib.crc32(np.float32(1.0).tobytes())


@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: random.gauss(0, 1), lambda: np.random.uniform(), lambda: np.random.normal()],  # noqa: NPY002
)
def test_generators_are_kept(draw):
    with kept_generators(torch.device("cpu")) as moved:
        assert not moved()
        first = draw()
        assert moved()
    assert draw() == first
    with kept_generators(torch.device("cpu")) as moved:
        torch.rand(1)
        assert not moved()
