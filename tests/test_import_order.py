"""The package is a stack: a file imports only what lies below it, and each outside library has its place."""

import ast
import itertools
from pathlib import Path

import pytest

import apts_mpi

ROOT = Path(apts_mpi.__file__).parent

# From the bottom up; a file imports only files before its own, in its row or in the rows above.
LEVELS = (
    ("environment", "errors", "signals", "options", "events", "training_options", "schedules"),
    ("transport", "patience", "pending", "comm", "checkpoint"),
    ("partition", "vector", "buffers", "bundle", "quadratic", "pipeline", "network_state", "drift"),
    ("segments", "reduction", "recorder", "objective", "dense", "transposes", "linearisation"),
    ("factors", "signed_factors", "curvature", "trust_region"),
    ("inner_products", "initial_radius", "models", "local_objective", "local_state", "kfac"),
    ("local_second_order", "local"),
    ("batch", "micro_batches", "construction", "stages", "staged_objective", "loss_check", "iteration", "composition"),
    ("staged_rows", "schwarz", "coarse", "staged_coarse", "global_step", "staged_global_step"),
    ("schwarz_state", "solver_state", "staged_state"),
    ("apts", "staged", "__init__"),
    ("problems", "baselines"),
    ("watch", "direct", "records", "log_view", "trace", "tensorboard", "training", "staged_training", "survival"),
    ("resume", "train", "timing"),
    ("bench_checkpoint", "bench_events", "bench_pipeline", "bench"),
    ("comparison", "comparison_table", "comparison_plots", "compare"),
    ("diagnosis", "probes", "device_probe", "doctor", "run_records", "run_plots", "plot"),
    ("cost_model", "cost_fit", "scaling_records", "scaling_runs", "scaling_report"),
    ("scaling_predict", "scaling_plots", "scaling"),
)
ORDER = tuple(itertools.chain.from_iterable(LEVELS))

# What the package imports from outside, where few files may.
PLACES = {
    "mpi4py": {
        *("patience", "pending", "comm", "apts", "staged", "baselines", "training", "staged_training", "train"),
        *("watch", "timing", "bench_checkpoint", "bench_events", "bench_pipeline", "bench", "device_probe", "doctor"),
    },
    "time": {"environment"},
    "jsonargparse": {"train", "compare"},
    "rich": {
        *("records", "train", "scaling", "scaling_report", "scaling_predict", "compare"),
        *("bench", "bench_checkpoint", "bench_events", "bench_pipeline", "checkpoint", "doctor", "log_view"),
    },
    "h5py": {"checkpoint", "scaling_records"},
}

FILES = sorted(ROOT.rglob("*.py"))


def file_of(path):
    """Name of a file in `ORDER`; the files of a folder share the folder's."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path):
    """Full dotted names of what a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; write it out"
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own_imports(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "apts_mpi":
            yield parts[1] if parts[1] in ORDER else "__init__"


def test_the_files_are_those_of_the_list():
    assert {file_of(path) for path in FILES} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path):
    own = file_of(path)
    for name in own_imports(path):
        inside = name == own and path.parent != ROOT
        assert inside or ORDER.index(name) < ORDER.index(own), f"{own} imports {name}, which is above it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_outside_libraries_have_their_places(path):
    for library in {name.split(".")[0] for name in imports(path)}:
        assert file_of(path) in PLACES.get(library, {file_of(path)}), f"{library} is imported in {path.name}"


def attributes(path):
    """Dotted names of two parts that a file uses, such as ``os.environ``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize(
    ("names", "places"),
    [
        ({"torch.cuda"}, {"transport", "environment"}),
        ({"os.environ", "os.getenv", "os.putenv"}, {"environment"}),
        ({"torch.get_rng_state", "torch.set_rng_state", "torch.default_generator"}, {"environment"}),
    ],
    ids=["CUDA", "process environment", "random state"],
)
def test_one_place_for_the_state_of_the_machine(names, places):
    users = {file_of(path): names & set(attributes(path)) for path in FILES}
    assert {file for file, used in users.items() if used} <= places
    assert any(users.values())  # the names are spelled as the package spells them


def test_the_core_knows_no_problem():
    """Solver files read no data and print nothing."""
    for path in FILES:
        if file_of(path) in ORDER[: ORDER.index("__init__")]:
            calls = {node.func.id for node in ast.walk(ast.parse(path.read_text()))
                     if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}  # fmt: skip
            assert not calls & {"print", "open", "input"}, path.name
