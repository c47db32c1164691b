"""The page of what is promised names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", PAGE)))


@pytest.mark.parametrize(("file", "test"), NAMED, ids=lambda value: value or "all")
def test_promise_has_its_test(file, test):
    (path,) = (ROOT / "tests").rglob(file)
    assert not test or re.search(rf"^def {test}\(", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_there_are_promises():
    assert len(NAMED) > 40
