"""The package is a stack: a file imports only what lies below it, and each outside library has its place."""

import ast
import functools
import re
from pathlib import Path

import pytest

import apts_mpi

ROOT = Path(apts_mpi.__file__).parent

# The packages of the list, in its order: a file imports only from its own and from those before it.
PAGE = ROOT.parent / "docs" / "changing.md"
LIST = PAGE.read_text(encoding="utf-8").partition("| package |")[2].partition("\n\n")[0]
ORDER = re.findall(r"^\| `(\w+)` \|", LIST, flags=re.MULTILINE)

# Modules that one imports after another, at most.
LONGEST_CHAIN = 16

# What the package imports from outside, where few files may.
PLACES = {
    "mpi4py": {"parallel", "apts", "replicated", "staged", "optim", "train", "bench", "doctor"},
    "time": {"tools"},
    "jsonargparse": {"train", "compare"},
    "rich": {"tools", "records", "train", "scaling", "compare", "bench", "checkpoint", "doctor"},
    "h5py": {"checkpoint", "scaling", "data"},
}

FILES = sorted(ROOT.rglob("*.py"))


def package_of(path):
    """Name in `ORDER` of the package that a file is in, or of the file itself beside them."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Full dotted names of what a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; write it out"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def file_of(name):
    """The file of this package that an imported name is, or is in; None for a name of another package."""
    parts = name.split(".")
    if parts[0] != "apts_mpi":
        return None
    while parts:
        place = ROOT.parent.joinpath(*parts)
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            if file.exists():
                return file
        parts.pop()
    raise AssertionError(f"there is no {name}")


@functools.cache
def own_imports(path):
    return sorted({file for file in map(file_of, imports(path)) if file not in (None, path)})


def test_the_packages_are_those_of_the_list():
    assert {package_of(path) for path in FILES} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    own = package_of(path)
    for file in own_imports(path):
        other = package_of(file)
        assert ORDER.index(other) <= ORDER.index(own), f"{path} imports {other}, which is behind it in the list"


@functools.cache
def chain(path):
    """The longest chain of files that starts with this one, each of which imports the next."""
    longest = max((chain(file) for file in own_imports(path)), key=len, default=())
    return (path, *longest)


def test_no_chain_of_imports_is_long():
    """Nor is there a cycle, in which `chain` would not come to an end."""
    longest = max(map(chain, FILES), key=len)
    assert len(longest) <= LONGEST_CHAIN, "\n".join(map(str, longest))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_outside_libraries_have_their_places(path):
    own = package_of(path)
    for library in {name.split(".")[0] for name in imports(path)}:
        assert own in PLACES.get(library, {own}), f"{library} is imported in {path.name}"


def attributes(path):
    """Dotted names of two parts that a file uses, such as ``os.environ``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize(
    ("names", "places"),
    [
        ({"torch.cuda"}, {"parallel/transport", "tools/environment"}),
        ({"os.environ", "os.getenv", "os.putenv"}, {"tools/environment"}),
        ({"torch.get_rng_state", "torch.set_rng_state", "torch.default_generator"}, {"tools/environment"}),
    ],
    ids=["CUDA", "process environment", "random state"],
)
def test_one_place_for_the_state_of_the_machine(names, places):
    users = {str(path.relative_to(ROOT)).removesuffix(".py"): names & set(attributes(path)) for path in FILES}
    assert {file for file, used in users.items() if used} <= places
    assert any(users.values())  # the names are spelled as the package spells them


CORE = {
    "network",
    "objective",
    "curvature",
    "trust_region",
    "local",
    "schwarz",
    "state",
    "replicated",
    "apts",
    "staged",
}


def test_the_core_knows_no_problem():
    """Solver files read no data and print nothing."""
    for path in FILES:
        if package_of(path) in CORE:
            calls = {node.func.id for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
            assert not calls & {"print", "open", "input"}, path.name
