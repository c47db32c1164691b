"""The look at the pages in a browser finds what it is for; `.ci/run` looks at the real ones, which it has built."""

import runpy

import pytest
from processes import TESTS

program = runpy.run_path(str(TESTS.parent / "docs" / "look_at_pages.py"))
browser = program["find_browser"]()

PAGE = '<!doctype html><html><head><meta name="viewport" content="width=device-width"></head><body>{}</body></html>'

PAGES = {
    "good": "<p>Words, and an image.</p><img src='data:,' alt=''>",
    "wide": "<div class='rule' style='width: 900px'>too wide</div>",
    "formula": "<span class='math'>\\(x^2\\)</span>",
    "elsewhere": "<script src='https://elsewhere.invalid/fast.js'></script>",
}


@pytest.mark.processes
@pytest.mark.skipif(browser is None, reason="needs Chromium")
def test_what_is_wrong_with_a_page_is_found(tmp_path):
    for name, body in PAGES.items():
        (tmp_path / f"{name}.html").write_text(PAGE.format(body))
    found = program["look"](tmp_path, browser)
    assert [line.split(" at ")[0] for line in found] == [
        "elsewhere.html", "elsewhere.html", "formula.html", "formula.html", "wide.html"
    ]  # fmt: skip
    assert "asks for https://elsewhere.invalid/fast.js" in found[0] and "1 of 1 formulas are raw TeX" in found[2]
    assert found[4].startswith("wide.html at 500 pixels is 9") and "div.rule: too wide" in found[4]
