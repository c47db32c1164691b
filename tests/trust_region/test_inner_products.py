"""Vectors in parts on ranks: the same as of the whole vectors on one."""

import numpy as np
import pytest
import torch

from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import Events
from apts_mpi.trust_region.inner_products import InnerProducts
from apts_mpi.trust_region.models import LSR1

pytestmark = pytest.mark.all_sizes

COLUMNS = 4


def parts(world):
    """Random columns, of which the first rank has 2 rows, fewer than columns, and every other rank 7."""
    size = 2 + 7 * (world.size - 1) + (7 if world.size == 1 else 0)
    whole = torch.randn(size, COLUMNS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    start = 0 if world.rank == 0 else 2 + 7 * (world.rank - 1)
    stop = size if world.size == 1 else 2 + 7 * world.rank
    return whole, whole[start:stop], slice(start, stop)


@pytest.mark.mpi
@pytest.mark.parametrize("kind", ["2", "inf"])
def test_norms_and_products(world, kind):
    whole, own, _ = parts(world)
    inner = InnerProducts(kind, Communicator(world, Events()), range(world.size))
    left, right = own[:, 0], own[:, 1]
    assert inner.dots((left, right), (left, left)) == pytest.approx(
        [float(whole[:, 0] @ whole[:, 1]), float(whole[:, 0] @ whole[:, 0])], rel=1e-13
    )
    order = 2.0 if kind == "2" else torch.inf
    assert inner.norm(left) == pytest.approx(float(torch.linalg.vector_norm(whole[:, 0], order)), rel=1e-14)
    assert inner.euclidean_norms(left, right) == pytest.approx(whole[:, :2].norm(dim=0).tolist(), rel=1e-14)
    torch.testing.assert_close(inner.of_columns(own, left), whole.T @ whole[:, 0], rtol=1e-13, atol=1e-13)
    assert inner.euclidean_radius(0.5, left) == 0.5 * (1.0 if kind == "2" else len(whole) ** 0.5)
    clipped = left.clone()
    inner.clip(clipped, 0.1)
    assert inner.norm(clipped) == pytest.approx(0.1, rel=1e-14)


@pytest.mark.mpi
def test_a_decomposition_put_together_from_parts(world):
    """As accurate for nearly dependent columns as for others: by no product of the matrix with itself."""
    whole, _, place = parts(world)
    inner = InnerProducts("2", Communicator(world, Events()), range(world.size))
    for matrix in (whole, whole[:, :1] + 1e-9 * whole):
        mine = matrix[place]
        orthonormal, triangle = inner.orthonormalise(mine)
        torch.testing.assert_close(orthonormal @ torch.from_numpy(triangle), mine, rtol=1e-13, atol=1e-14)
        together = torch.cat(world.allgather(orthonormal))
        torch.testing.assert_close(together.T @ together, torch.eye(COLUMNS).double(), rtol=0.0, atol=1e-13)
        assert np.allclose(triangle, np.triu(triangle), atol=1e-14)


@pytest.mark.mpi
def test_lsr1_of_parts_is_that_of_the_whole(world):
    whole, _, place = parts(world)
    matrix = torch.diag(torch.linspace(-1.0, 3.0, len(whole), dtype=torch.float64))
    alone = LSR1(3)
    inner = InnerProducts("2", Communicator(world, Events()), range(world.size))
    together = LSR1(3, inner)
    for step in whole.T:
        alone.update(step, matrix @ step)
        together.update(step[place], (matrix @ step)[place])
    assert len(alone.steps) == len(together.steps) == 3
    restored = LSR1(3, inner)
    restored.restore(together.steps, together.changes, together.gamma)
    gradient = matrix @ whole.sum(dim=1)
    for model in (together, restored):
        for radius in (0.1, 10.0):
            step, expected = model.minimise(gradient[place], radius), alone.minimise(gradient, radius)
            torch.testing.assert_close(step, expected[place], rtol=1e-10, atol=1e-11)
            predicted = model.predict(gradient[place], step)
            assert predicted == pytest.approx(alone.predict(gradient, expected), rel=1e-10)


@pytest.mark.mpi
def test_a_pair_that_is_not_finite_on_one_rank_is_left_out_on_all(world):
    _, own, _ = parts(world)
    model = LSR1(3, InnerProducts("2", Communicator(world, Events()), range(world.size)))
    change = own[:, 1].clone()
    if world.rank == world.size - 1:
        change[0] = torch.inf
    model.update(own[:, 0], change)
    assert model.steps == []
