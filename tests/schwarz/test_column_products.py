"""Inner products of columns against those of the dense matrix, and the work that they take."""

import pytest
import torch

from apts_mpi.curvature.linearisation import Column
from apts_mpi.schwarz import column_products
from apts_mpi.schwarz.column_products import inner_products

SIZE = 40


def column(start, stop):
    return Column(start, stop, torch.randn(stop - start, dtype=torch.float64))


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 40)],
        [(0, 10), (10, 25), (25, 40), (0, 10), (10, 25), (25, 40)],
        [(0, 20), (15, 30), (3, 3), (18, 40), (0, 40), (39, 40)],
        [(5, 8), (20, 30)],
    ],
    ids=["one", "subdomains", "overlapping", "apart"],
)
@pytest.mark.parametrize("piece", [7, column_products.PIECE])
def test_inner_products_are_those_of_the_dense_matrix(ranges, piece, monkeypatch):
    monkeypatch.setattr(column_products, "PIECE", piece)
    torch.manual_seed(0)
    columns = [column(*places) for places in ranges]
    dense = torch.zeros(SIZE, len(columns), dtype=torch.float64)
    for number, each in enumerate(columns):
        dense[each.start : each.stop, number] = each.values
    found = inner_products(columns)
    torch.testing.assert_close(found, dense.T @ dense, rtol=1e-14, atol=1e-14)
    assert torch.equal(found, found.T)


def test_the_products_are_as_many_as_subdomains(monkeypatch):
    """And not as pairs of them."""
    counted, between = [], column_products._between
    monkeypatch.setattr(column_products, "_between", lambda *given: counted.append(given) or between(*given))
    parts = [(start, start + 2) for start in range(0, 200, 2)]
    inner_products([column(*part) for _ in range(2) for part in parts])
    assert len(counted) == 100 and {len(columns) for _, _, columns in counted} == {2}
