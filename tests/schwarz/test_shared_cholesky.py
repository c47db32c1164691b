"""Cholesky factors that ranks share, against dense equations on one."""

import pytest
import torch

import apts_mpi.schwarz.shared_cholesky as shared_cholesky
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.shared_cholesky import SharedCholesky
from apts_mpi.tools.events import Events


def terms(size, ranks, rank=None):
    """Symmetric terms of the ranks, of which each by itself is singular, or one of them."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(ranks, size // ranks + 3, size, dtype=torch.float64, generator=generator)
    return rows.mT @ rows if rank is None else (rows.mT @ rows)[rank]


@pytest.fixture
def comm(world):
    return Communicator(world, Events())


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("size", [1, 7, 8, 9, 48, 101])
@pytest.mark.parametrize("rows, columns, least", [(8, 24, 1), (8, 8, 1), (5, 200, 1), (64, 128, 1024)])
def test_solves_as_the_dense_equations_do(comm, monkeypatch, size, rows, columns, least):
    monkeypatch.setattr(shared_cholesky, "ROWS", rows)
    monkeypatch.setattr(shared_cholesky, "COLUMNS", columns)
    monkeypatch.setattr(shared_cholesky, "LEAST_SHARED", least)
    whole = terms(size, comm.size).sum(dim=0)
    factors = SharedCholesky(terms(size, comm.size, comm.rank), comm)
    assert factors.trace == pytest.approx(float(whole.trace()), rel=1e-6)
    vector = torch.linspace(1.0, 2.0, size, dtype=torch.float64)
    # The second one from the same sum.
    for damping in (1.0, 1e-3):
        assert factors.factorise(damping if comm.rank == 0 else 0.0) == damping
        found = factors.solve(vector if comm.rank == 0 else torch.zeros_like(vector))
        expected = torch.linalg.solve(whole + damping * torch.eye(size, dtype=torch.float64), vector)
        # Rounding errors over the damping, relative to a matrix of some hundreds.
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("place", [0, 30, 47])
def test_raises_the_damping_until_there_are_factors(comm, monkeypatch, place):
    """An element of -5 on the diagonal in the first, a middle or the last block; seen by whichever ranks."""
    monkeypatch.setattr(shared_cholesky, "ROWS", 8)
    monkeypatch.setattr(shared_cholesky, "COLUMNS", 16)
    monkeypatch.setattr(shared_cholesky, "LEAST_SHARED", 1)
    whole = torch.eye(48, dtype=torch.float64)
    whole[place, place] = -5.0
    factors = SharedCholesky(whole / comm.size, comm)
    assert factors.factorise(0.1) == pytest.approx(10.0)
    found = factors.solve(torch.ones(48, dtype=torch.float64))
    expected = 1.0 / (whole.diagonal() + 10.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_ends_where_no_damping_helps(comm):
    factors = SharedCholesky(torch.full((3, 3), float("nan"), dtype=torch.float64), comm)
    assert factors.factorise(1.0) == float("inf")
