"""What keeps a file readable in one sitting, and the picture of the packages true."""

import ast
import runpy
from pathlib import Path

import pytest

import apts_mpi

ROOT = Path(apts_mpi.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
IMAGES = ROOT.parent / "docs" / "images"

LINES, ARGUMENTS = 350, 8


def functions(path):
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_signatures_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES
    for function in functions(path):
        arguments = function.args
        own = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        assert len(own) <= ARGUMENTS, f"{function.name} takes {len(own)} arguments"


def test_the_loop_is_short():
    path = ROOT / "apts.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 280
    (step,) = (function for function in functions(path) if function.name == "step")
    assert step.end_lineno - step.lineno < 25


def test_every_package_says_what_lives_there():
    for path in FILES:
        if path.name == "__init__.py":
            words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert path.parent == ROOT or ("may import" in words and "first" in words), path


def test_the_picture_shows_the_imports():
    program = runpy.run_path(str(IMAGES / "draw_packages.py"))
    drawn = program["draw"](program["read_imports"]())
    assert drawn == (IMAGES / "packages.svg").read_text(encoding="utf-8"), "draw it again"
