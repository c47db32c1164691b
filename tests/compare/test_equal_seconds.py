"""Comparisons at equal processor seconds."""

import io
import json
import statistics
from xml.etree import ElementTree

import pytest
from hidden import hide
from rich.console import Console

import apts_mpi.train.peers
from apts_mpi.compare import __main__ as compare
from apts_mpi.compare.equal import EqualSeconds, comparison_of
from apts_mpi.compare.options import ComparisonOptions, Grids
from apts_mpi.compare.plots import plot_equal_seconds
from apts_mpi.compare.runs import Plan
from apts_mpi.errors import InvalidInput
from apts_mpi.records.reading import read_records

SMALL = Grids(
    learning_rates={"adamw-cosine": (1e-3, 1e-2), "muon": (5e-2,), "prodigy": (1.0,)}, sweep_rates=(), sweep_factors=()
)


def run(options, grids=SMALL):
    """The comparisons and what was printed."""
    output = io.StringIO()
    return compare.compare(options, Console(file=output, width=160), grids), output.getvalue()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The options of a small comparison, and what it came to."""
    options = ComparisonOptions(
        problems=("digits",),
        methods="apts,adamw-cosine,muon,prodigy",
        equal_seconds="adamw-cosine",
        epochs=12,
        seeds=1,
        jobs=2,
        out=str(tmp_path_factory.mktemp("comparisons")),
    )
    (comparison,), output = run(options)
    return options, comparison, output


@pytest.mark.slow
@pytest.mark.processes
def test_all_take_the_seconds_of_the_reference(digits):
    _, comparison, output = digits
    runs = {run.setting.name: read_records(run.path) for run in comparison.plan.runs}
    assert list(runs) == ["apts", "adamw-cosine-0.001", "adamw-cosine-0.01", "muon-0.05", "prodigy-1"]
    ends = {name: records.column("epochs", "cpu_seconds")[-1] for name, records in runs.items()}
    limit = statistics.median(ends[f"adamw-cosine-{rate}"] for rate in ("0.001", "0.01"))
    for name, records in runs.items():
        before = records.column("iterations", "cpu_seconds")
        if name.startswith("adamw-cosine"):
            assert records.summary["epochs"] == 12
        else:
            # The last iteration is the one that comes to the limit.
            assert ends[name] >= 0.999 * limit > before[-2] * 0.998
            assert records.options["max_cpu_seconds"] == pytest.approx(limit, rel=1e-3)
    assert comparison.failures == {} and "processor seconds of iterations a run, as AdamW with cosine takes" in output


@pytest.mark.slow
@pytest.mark.processes
def test_tables_and_plots(digits):
    _, comparison, output = digits
    path = comparison.plan.path
    text = (path / "table.md").read_text()
    best, grid = text.split("## digits, all step sizes")
    assert best.count("\n| ") == 2 + 4 and grid.count("\n| ") == 2 + 5
    values = [float(line.split("|")[3]) for line in best.splitlines()[6:] if line.startswith("| ")]
    assert values == sorted(values, reverse=True)
    tables = [line for line in output.splitlines() if line.startswith(" ")]
    assert max(map(len, tables)) <= 80 and not any("…" in line for line in tables)
    for name in ("cpu_seconds", "loss"):
        assert (path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert ElementTree.parse(path / f"{name}.svg").getroot().tag.endswith("svg")


@pytest.mark.slow
@pytest.mark.processes
def test_the_same_command_does_nothing_again_also_without_the_package(digits, monkeypatch):
    options, comparison, _ = digits
    before = {file: file.stat().st_mtime_ns for file in comparison.plan.path.glob("*/*")}
    hide(monkeypatch, apts_mpi.train.peers.PACKAGE)
    run(options)
    assert {file: file.stat().st_mtime_ns for file in comparison.plan.path.glob("*/*")} == before


@pytest.mark.parametrize("equal", [None, "adamw-cosine"])
def test_missing_package_is_told_before_any_run(tmp_path, monkeypatch, equal):
    """Also where the runs that need it are not the first."""
    hide(monkeypatch, apts_mpi.train.peers.PACKAGE)
    options = ComparisonOptions(
        problems=("digits",), methods="adamw-cosine,muon", equal_seconds=equal, out=str(tmp_path / "out")
    )
    with pytest.raises(InvalidInput, match=r"optimizer: 'muon' .* pip install apts_mpi\[compare\]"):
        run(options)
    assert not (tmp_path / "out").exists()


# Tables of runs that did not take place.


def write_run(run, epochs):
    """The records of a run, of dictionaries of metrics."""
    run.path.mkdir(parents=True)
    lines = [{"iteration": 1, "epoch": 1, "loss": 3.0}]
    for number, metrics in enumerate(epochs, 1):
        totals = {"gradient_evaluations": number, "seconds": 2.0 * number, "cpu_seconds": 1.5 * number}
        lines.append({"epoch": number, "iteration": number, **totals, **metrics})
    (run.path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.path / "config.yaml").write_text(run.config)
    (run.path / "summary.json").write_text(json.dumps({"ranks": run.ranks}))


def accuracies(*values):
    return [{"train_loss": 1.0 - value, "test_loss": 2.0, "test_accuracy": value} for value in values]


def losses(*values):
    return [{"train_loss": 2.0 * value if value else value, "test_loss": value} for value in values]


@pytest.fixture
def written(tmp_path):
    """A function of {name of setting: epochs of each seed} that gives the comparison; a missing run failed."""

    def write(epochs, equal="9"):
        options = ComparisonOptions(
            problems=("digits",), methods="apts,adam,sgd", equal_seconds=equal, out=str(tmp_path), seeds=3, epochs=4
        )
        grids = Grids(learning_rates={"adam": (0.001, 0.01), "sgd": (0.1,)}, sweep_rates=(), sweep_factors=())
        plan = Plan("digits", options, grids)
        for planned in plan.runs:
            if planned.seed < len(epochs[planned.setting.name]):
                write_run(planned, epochs[planned.setting.name][planned.seed])
        return comparison_of(plan, {run: "it broke" for run in plan.runs if not run.is_finished()})

    return write


CLASSIFIED = {
    "apts": [accuracies(0.5, 0.9, 0.8), accuracies(0.7), accuracies(0.1, 0.2)],
    "adam-0.001": [accuracies(0.6, 0.75), accuracies(0.9), accuracies(0.3)],
    "adam-0.01": [accuracies(0.6, 0.5)] * 3,
    "sgd-0.1": [accuracies(0.99)] * 2,
}


def test_medians_and_the_best_by_test_accuracy(written, tmp_path):
    comparison = written(CLASSIFIED)
    assert comparison.header() == [
        "method", "step size", "test accuracy", "its best", "train loss", "CPU seconds", "epochs",
    ]  # fmt: skip
    best, grid = comparison.tables().values()
    assert best == [
        ["Adam", "0.001", "0.75", "0.75", "0.25", "1.5", "1"],
        ["APTS", "automatic", "0.7", "0.7", "0.3", "3", "2"],
    ]
    assert [line[1] for line in grid] == ["automatic", "0.001 (best)", "0.01", "0.1"]
    assert grid[2][2:4] == ["0.5", "0.6"]
    assert grid[3][2] == "0.99, 1 failed"
    assert comparison.verdict() == "APTS has place 2 of 2 by test accuracy: 0.7; Adam at 0.001: 0.75."
    plot_equal_seconds(comparison, tmp_path)
    assert (tmp_path / "cpu_seconds.png").exists()


def test_by_test_loss_where_there_is_no_accuracy(written):
    epochs = {
        "apts": [losses(3.0, 0.5)] * 3,
        "adam-0.001": [losses(0.3, 0.6)] * 3,
        "adam-0.01": [losses(0.1), losses(0.1), losses(0.2, None)],
        "sgd-0.1": [[]] * 0,
    }
    comparison = written(epochs)
    best, grid = comparison.tables().values()
    assert [line[0] for line in best] == ["APTS", "Adam"]
    assert best[1][2:5] == ["0.6", "0.3", "1.2"]
    assert grid[2][2] == "0.1, 1 diverged" and grid[3][2:] == ["3 failed", "", "", "", ""]
    assert all(len(line) == len(comparison.header()) for line in grid)
    assert "place 1 of 2 by test loss: 0.5; Adam at 0.001: 0.6" in comparison.verdict()


def test_nothing_to_compare(written, tmp_path):
    comparison = written({name: [] for name in CLASSIFIED})
    assert isinstance(comparison, EqualSeconds)
    assert "nothing to set beside" in comparison.markdown()
    plot_equal_seconds(comparison, tmp_path)
    assert (tmp_path / "cpu_seconds.svg").exists()


def test_reference_without_a_finished_run(tmp_path):
    options = ComparisonOptions(problems=("digits",), methods="apts,adam", equal_seconds="adam", out=str(tmp_path))
    plan = Plan("digits", options)
    assert {run.setting.method for run in plan.runs} == {"adam"}
    with pytest.raises(InvalidInput, match="equal_seconds: no run of 'adam' came to its end"):
        plan.add_others()


def test_limits_of_the_runs(tmp_path, written):
    options = ComparisonOptions(problems=("digits",), methods="apts,adam", equal_seconds="2.5", out=str(tmp_path))
    runs = Plan("digits", options).runs
    assert all("--max_cpu_seconds=2.5" in run.arguments and "--epochs=1000000" in run.arguments for run in runs)
    ended = [accuracies(0.5, 0.6), accuracies(0.5), accuracies(0.5)]
    plan = written({"adam-0.001": ended, "adam-0.01": ended}, equal="adam").plan
    assert all("--epochs=4" in run.arguments for run in plan.runs)
    added = plan.add_others()
    assert {run.setting.name for run in added} == {"apts", "sgd-0.1"}
    # Twice 3 s and four times 1.5 s.
    assert all("--max_cpu_seconds=1.5" in run.arguments for run in added)
    assert [run.setting.method for run in plan.runs] == ["apts"] * 3 + ["adam"] * 6 + ["sgd"] * 3
