"""The table of networks that were tried, a few of its rows."""

import sys

import pytest
from processes import TESTS

EXAMPLES = TESTS.parent / "docs" / "examples"


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import networks_tried

    yield networks_tried
    for name in ("networks_tried", "tried_known", "tried_unusual"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "name, found",
    [
        ("mixture of experts, auxiliary loss", "works"),
        ("EmbeddingBag", "falls back: coarse.model auto: EmbeddingBag has no second derivatives"),
        ("a Function that is once_differentiable", "falls back: coarse.model auto: Opaque has no second derivatives"),
    ],
)
def test_a_network_leads_below_adam(tried, name, found):
    first, said, loss, adam = (cell.strip() for cell in tried.row(name).strip("|").split("|"))
    assert first == name and said.startswith(found)
    assert float(loss) < 0.5 * float(adam)


def test_a_loss_that_is_no_mean_is_refused(tried):
    assert "| refused: loss: it is not the mean over the samples" in tried.row("a loss that is a sum")


def test_the_page_has_a_row_for_each(tried):
    page = (EXAMPLES.parent / "from-pytorch.md").read_text(encoding="utf-8")
    assert [name for name in tried.TRIALS if f"| {name} |" not in page] == []
