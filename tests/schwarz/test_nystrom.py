"""Solutions by products alone, against dense ones; and what the approximation of Nyström is worth."""

import pytest
import torch

import apts_mpi.schwarz.nystrom as nystrom
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.nystrom import NystromSolver, approximation
from apts_mpi.tools.events import Events

SIZE = 60


def kernel(decades=15.0):
    """A symmetric matrix whose eigenvalues fall from 1 by so many decades, and these."""
    generator = torch.Generator().manual_seed(1)
    vectors, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator))
    values = torch.logspace(0.0, -decades, SIZE, dtype=torch.float64)
    return (vectors * values) @ vectors.T, values


def test_a_matrix_of_low_rank_is_its_approximation():
    matrix, _ = kernel()
    matrix = matrix[:, :7] @ matrix[:7]
    matrix = matrix @ matrix.T
    test = torch.randn(SIZE, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    vectors, values = approximation(test, matrix @ test)
    torch.testing.assert_close((vectors * values) @ vectors.T, matrix, rtol=0.0, atol=1e-13 * float(matrix.norm()))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(12, dtype=torch.float64), rtol=0.0, atol=1e-12)


def test_eigenvalues_are_below_those_of_the_matrix_and_close_to_the_large_ones():
    matrix, expected = kernel()
    test = torch.randn(SIZE, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    _, values = approximation(test, matrix @ test)
    assert (values <= expected[:30] * (1.0 + 1e-10) + 1e-15).all()
    torch.testing.assert_close(values[:10], expected[:10], rtol=1e-5, atol=0.0)


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("damping", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("first", [4, 200])
def test_solves_in_some_products_whatever_the_damping(world, monkeypatch, damping, first):
    """Each rank has a term of the matrix, of which 8, 20 and 36 of 60 eigenvalues are above ten dampings."""
    comm = Communicator(world, Events())
    monkeypatch.setattr(nystrom, "FIRST", first)
    matrix, _ = kernel()
    products = []

    def product(vectors):
        products.append(vectors.shape[1])
        total = (world.rank + 1.0) / sum(range(1, world.size + 1)) * (matrix @ vectors)
        if world.size > 1:
            total = torch.from_numpy(world.allreduce(total.numpy()))
        return total

    solver = NystromSolver(product, matrix.trace().clone(), SIZE, comm)
    assert solver.trace == pytest.approx(float(matrix.trace()), rel=1e-6)
    assert solver.factorise(damping) == damping
    sketched, products = sum(products), []
    assert sketched == (60 if first == 200 else {1e-3: 8, 1e-6: 32, 1e-10: 60}[damping])
    vector = torch.linspace(1.0, 2.0, SIZE, dtype=torch.float64)
    found = solver.solve(vector)
    assert len(products) <= 25 and set(products) == {1}
    left = vector - matrix @ found - damping * found
    # What conjugate gradients end at, and rounding errors of products with a solution as long as the damping is small.
    assert left.norm() <= 2e-8 * vector.norm() + 1e-15 * found.norm()


@pytest.mark.mpi
def test_ranks_that_round_apart_solve_the_same(world):
    """Sums over ranks may differ between them in the last bits, which is no reason for their ways to part."""
    comm = Communicator(world, Events())
    matrix, _ = kernel()
    generator = torch.Generator().manual_seed(world.rank)

    def product(vectors):
        total = (world.rank + 1.0) / sum(range(1, world.size + 1)) * (matrix @ vectors)
        if world.size > 1:
            total = torch.from_numpy(world.allreduce(total.numpy()))
        return total * (1.0 + 1e-16 * torch.randn(total.shape, dtype=torch.float64, generator=generator))

    solver = NystromSolver(product, matrix.trace().clone(), SIZE, comm)
    solver.factorise(1e-12)
    vector = matrix @ torch.linspace(1.0, 2.0, SIZE, dtype=torch.float64)
    found = solver.solve(vector)
    left = vector - matrix @ found - 1e-12 * found
    assert left.norm() <= 1e-9 * vector.norm()


def test_products_that_are_no_numbers_say_nothing():
    test = torch.ones(5, 2, dtype=torch.float64)
    for number in (float("nan"), float("inf"), 1e300):
        vectors, values = approximation(test, torch.full_like(test, number))
        assert vectors.isfinite().all() and not values.any()


@pytest.mark.mpi
def test_a_damping_below_rounding_is_raised(world):
    solver = NystromSolver(lambda vectors: vectors * 2.0, torch.tensor(4.0).double(), 2, Communicator(world, Events()))
    assert solver.factorise(1e-20) == 4e-13


@pytest.mark.mpi
def test_a_matrix_of_zeros(world):
    solver = NystromSolver(torch.zeros_like, torch.zeros((), dtype=torch.float64), 5, Communicator(world, Events()))
    solver.factorise(0.5)
    torch.testing.assert_close(solver.solve(torch.ones(5, dtype=torch.float64)), torch.full((5,), 2.0).double())
    assert solver.solve(torch.zeros(5, dtype=torch.float64)).abs().max() == 0.0
