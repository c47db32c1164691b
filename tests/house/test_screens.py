"""The screens in the pages are those of the present commands: as wide as they say, with the present names in them."""

import io
import re
import runpy
from dataclasses import fields, is_dataclass

import pytest
from processes import TESTS
from rich.console import Console

from apts_mpi.doctor.diagnosis import Finding
from apts_mpi.doctor.examination import show
from apts_mpi.options import APTSOptions
from apts_mpi.train import columns, log_view

DOCS = TESTS.parent / "docs"
program = runpy.run_path(str(DOCS / "take_screens.py"))
SCREENS = [(name, width) for name in program["SCREENS"] for width in program["WIDTHS"]]

CHECKS = (
    *("launcher", "cores", "GPUs", "allreduce float32", "Iallreduce on GPUs", "overlap", "shared memory"),
    *("run directory", "file locking", "h5py", "versions"),
)


def text_of(name, width):
    return (DOCS / "screens" / f"{name}-{width}.txt").read_text()


@pytest.mark.parametrize(("name", "width"), SCREENS)
def test_it_is_as_wide_as_it_says(name, width):
    lines = text_of(name, width).splitlines()
    assert len(lines) > 5 and max(map(len, lines)) <= width
    assert not [line for line in lines if "\x1b" in line or "\r" in line or "…" in line]


def test_there_are_no_others_and_pages_show_them():
    assert {path.name for path in (DOCS / "screens").iterdir()} == {f"{name}-{width}.txt" for name, width in SCREENS}
    pages = "".join(path.read_text() for path in DOCS.glob("*.md"))
    shown = set(re.findall(r"literalinclude} screens/(\w+)-\d+\.txt", pages))
    assert shown == set(program["SCREENS"])


@pytest.mark.parametrize("width", program["WIDTHS"])
@pytest.mark.parametrize("name", ["epochs", "live"])
def test_lines_of_epochs(name, width):
    """Their heading is what the columns of such a run are now."""
    values = dict.fromkeys((names[0] for _, _, names in columns.COLUMNS if names != ("error",)), 1)
    heading = columns.Columns(width, values).heading()
    assert text_of(name, width).startswith(heading.rstrip() + "\nepoch 1 ")


def test_the_live_line_has_what_it_shows_now():
    last = text_of("live", 80).splitlines()[-1]
    assert re.fullmatch(r"epoch \d+, iteration \d+, loss [\d.e-]+ [╸╺━]+ +\d+% \d:\d\d:\d\d left", last)


@pytest.mark.parametrize("width", program["WIDTHS"])
def test_every_option_of_the_solver(width):
    groups = [APTSOptions(), *(part for part in vars(APTSOptions()).values() if is_dataclass(part))]
    pipeline = {field.name for field in fields(APTSOptions().pipeline)} - {field.name for field in fields(groups[1])}
    names = [f.name for group in groups for f in fields(group) if not is_dataclass(getattr(group, f.name))]
    found = re.findall(r"^    [* ] (\w+) ", text_of("solver", width), re.MULTILINE)
    assert set(found) == set(names) - pipeline
    assert "* damping          0.5 (default: null)" in text_of("solver", width)


@pytest.mark.parametrize("width", program["WIDTHS"])
def test_every_column_of_the_events(width):
    text = text_of("events", width)
    headings = re.findall(r"[\w ]+", "".join(line for line in text.splitlines() if line.startswith("┃")))
    names = [name.strip() for name in headings if name.strip() != "event"]
    assert names == [heading for heading, _, _ in log_view.COLUMNS]
    assert " ".join(text.split()).endswith(log_view.EXPLANATION)


@pytest.mark.parametrize("width", program["WIDTHS"])
def test_every_check_of_the_doctor(width):
    console = Console(file=io.StringIO(), width=width)
    show([Finding("launcher", "ok", "found")], console)
    _, heading, *_ = (re.sub(r"\W+", " ", line).split() for line in console.file.getvalue().splitlines() if "a" in line)
    text = text_of("doctor", width)
    assert any(re.sub(r"\W+", " ", line).split() == heading for line in text.splitlines())
    assert [check for check in CHECKS if re.search(rf"\b{check} ", text) is None] == []
