"""Comparisons: runs and their resume, tables, plots and errors."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from hidden import hide_matplotlib
from rich.console import Console

from apts_mpi.compare import __main__ as compare
from apts_mpi.compare.options import GRIDS, METHODS, ComparisonOptions, Grids
from apts_mpi.compare.plots import plot_losses, plot_robustness
from apts_mpi.compare.runs import Plan
from apts_mpi.compare.table import Comparison, number
from apts_mpi.errors import InvalidInput

SMALL = Grids(learning_rates={"adam": (1e-2,)}, sweep_rates=(1e-2,), sweep_factors=(0.1, 1.0))


def run(options, grids):
    """The comparisons and what was printed."""
    output = io.StringIO()
    comparisons = compare.compare(options, Console(file=output, width=160), grids)
    return comparisons, output.getvalue()


def records(path):
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def times(path):
    """When each run under a directory wrote each of its files."""
    return {file: file.stat().st_mtime_ns for file in path.glob("*/*")}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small comparison: its options, directory and output."""
    out = tmp_path_factory.mktemp("comparisons")
    options = ComparisonOptions(
        problems=("digits",), out=str(out), seeds=2, epochs=2, train_samples=600, jobs=2, robustness=True
    )
    _, output = run(options, SMALL)
    return options, out / "digits", output


@pytest.mark.processes
@pytest.mark.slow
def test_runs(digits):
    _, path, output = digits
    names = [f"{name}-seed{seed}" for name in ("apts", "adam-0.01") for seed in (0, 1)]
    assert sorted(file.parent.name for file in path.glob("*/summary.json")) == sorted([*names, "apts-radius-0.1-seed0"])
    assert all(str(path / name) in output for name in names)
    first, tenth = (records(path / name)[0] for name in ("apts-seed0", "apts-radius-0.1-seed0"))
    assert tenth["radius"] == pytest.approx(0.1 * first["radius"], rel=1e-3)
    # Same network and first batch, whatever the method.
    assert records(path / "adam-0.01-seed1")[0]["loss"] == pytest.approx(
        records(path / "apts-seed1")[0]["loss"], rel=1e-5
    )


def table_of(path):
    """Cells of the Markdown table: {(method, step size): {heading: cell}}."""
    lines = [line for line in (path / "table.md").read_text().splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {(row[0], row[1]): dict(zip(header, row, strict=True)) for row in rows}


@pytest.mark.processes
def test_table_agrees_with_the_histories(digits):
    _, path, output = digits
    table = table_of(path)
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "gradient_evaluations", "seconds")
    assert list(table) == [("APTS", "automatic"), ("Adam", "0.01 (best)")]
    for directory, cells in zip(("apts", "adam-0.01"), table.values(), strict=True):
        last = [records(path / f"{directory}-seed{seed}")[-1] for seed in (0, 1)]
        for name in names:
            values = np.array([record[name] for record in last])
            mean, deviation = cells[name.replace("_", " ")].split(" ± ")
            assert float(mean) == pytest.approx(values.mean(), rel=5e-3)
            assert float(deviation) == pytest.approx(values.std(ddof=1), rel=5e-2, abs=1e-12)
            assert f"{mean} ± {deviation}" in output


@pytest.mark.processes
@pytest.mark.parametrize("name", ["loss", "robustness"])
def test_plots(digits, name):
    _, path, _ = digits
    png = (path / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and len(png) > 10_000
    assert ElementTree.parse(path / f"{name}.svg").getroot().tag.endswith("svg")


@pytest.mark.processes
def test_nothing_is_done_twice_and_interrupted_runs_are_redone(digits):
    options, path, _ = digits
    before, table = times(path), (path / "table.md").read_text()
    run(options, SMALL)
    assert times(path) == before
    assert (path / "table.md").read_text() == table

    cut = path / "adam-0.01-seed1"
    summary = json.loads((cut / "summary.json").read_text())
    (cut / "summary.json").write_text('{"problem": ')
    (cut / "history.jsonl").write_text("")
    run(options, SMALL)
    changed = {file.parent for file, at in times(path).items() if at != before[file]}
    assert changed == {cut}
    redone = json.loads((cut / "summary.json").read_text())
    assert redone["train_loss"] == pytest.approx(summary["train_loss"], rel=1e-4)


@pytest.mark.processes
@pytest.mark.parametrize("changes", [{"epochs": 3}, {"dtype": "float64"}, {"ranks": 2}])
def test_finished_runs_with_other_options_are_not_replaced(digits, changes):
    options, path, _ = digits
    before = times(path)
    with pytest.raises(InvalidInput, match=rf"apts-seed0.*\+ {'|'.join(changes)}: .*another --out"):
        run(ComparisonOptions(**vars(options) | changes), SMALL)
    assert times(path) == before


FRAGILE = """
    import torch

    def loss(outputs, targets):
        if not torch.isfinite(outputs).all():
            raise RuntimeError("the outputs are not finite")
        return torch.nn.functional.mse_loss(outputs, targets)

    def build():
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(16, 3, generator=generator)
        network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
        return network, loss, (inputs, inputs.sum(dim=1, keepdim=True))
"""


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_a_failing_run_is_reported_and_stops_no_other(tmp_path, monkeypatch):
    (tmp_path / "fragile.py").write_text(textwrap.dedent(FRAGILE))
    monkeypatch.chdir(tmp_path)
    grids = Grids(learning_rates={"sgd": (1e30, 1e-2)}, sweep_rates=(), sweep_factors=())
    options = ComparisonOptions(problems=("fragile:build",), out="out", seeds=1, epochs=2, ranks=2, jobs=2)
    (comparison,), output = run(options, grids)
    path = tmp_path / "out" / "fragile.build"
    (failed,) = comparison.failures
    assert failed.path == path.relative_to(tmp_path) / "sgd-1e+30-seed0"
    assert json.loads((path / "sgd-0.01-seed0" / "summary.json").read_text())["ranks"] == 2
    table = table_of(path)
    assert table["SGD with momentum", "1e+30"]["train loss"] == "1 failed"
    assert float(table["SGD with momentum", "0.01 (best)"]["train loss"]) < 10.0
    for text in (output, (path / "table.md").read_text()):
        assert "sgd-1e+30-seed0 failed: " in text and "the outputs are not finite" in text
    assert (path / "loss.png").stat().st_size > 0


@pytest.mark.processes
def test_interruption_ends_the_processes(tmp_path):
    command = [sys.executable, "-m", "apts_mpi.compare", "digits", "--epochs", "100000", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    path = tmp_path / "digits" / "apts-seed0"
    history = path / "history.jsonl"
    deadline = time.monotonic() + 100.0
    while not (history.exists() and history.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "goes on from here" in errors
    size = history.stat().st_size
    time.sleep(1.0)
    assert history.stat().st_size == size and not (path / "summary.json").exists()


def write_run(run, losses, evaluations):
    """The records of a run that did not take place; an epoch lasts half a second an evaluation."""
    run.path.mkdir(parents=True)
    lines = [{"iteration": 1, "epoch": 1, "loss": 3.0, "radius": 0.5}]
    for epoch, loss in enumerate(losses, start=1):
        used = evaluations * epoch
        totals = {"gradient_evaluations": used, "seconds": 0.5 * used}
        lines.append({"epoch": epoch, "iteration": epoch, **totals, "train_loss": loss})
    (run.path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.path / "config.yaml").write_text(run.config)
    (run.path / "summary.json").write_text(json.dumps({"ranks": run.ranks}))


@pytest.fixture
def written(tmp_path):
    """A function of {name of setting: losses of each seed} that gives the comparison; a missing run failed."""

    def write(losses):
        options = ComparisonOptions(problems=("digits",), out=str(tmp_path), seeds=2, epochs=4)
        grids = Grids(learning_rates={"adam": (0.001, 0.01), "sgd": (0.1, 1.0)}, sweep_rates=(), sweep_factors=())
        plan = Plan("digits", options, grids)
        for run in plan.runs:
            if run.seed < len(losses[run.setting.name]):
                write_run(run, losses[run.setting.name][run.seed], 30 if run.setting.method == "apts" else 10)
        return Comparison(plan, {run: "it broke" for run in plan.runs if not run.is_finished()})

    return write


LOSSES = {
    "apts": [[2.0, 1.0, 0.4, 0.1], [2.0, 1.0, 0.8, 0.3]],
    "adam-0.001": [[2.0, 1.9, 1.8, 0.4], [2.0, 1.9, 1.8, 1.4]],
    "adam-0.01": [[2.0, 1.5, 1.2, 0.9], [2.0, 1.5, 1.0, 0.5]],
    "sgd-0.1": [[2.0, 1.0, 0.5, 0.1]],
    "sgd-1": [[2.0, 9.0, None, None], [2.0, 1.0, 0.5, 0.1]],
}


def test_verdict(written):
    """The mean of APTS is 0.6 after three epochs; Adam ends at 0.7, and what failed or diverged is no rival."""
    comparison = written(LOSSES)
    verdict = comparison.verdict()
    assert "best baseline (Adam at 0.01: 0.7 after 40 evaluations and 20 s)" in verdict
    assert "epoch 3 of 4, after 90 gradient evaluations and 45 s" in verdict
    assert list(comparison.best()) == ["apts", "adam"]


def test_runs_that_ended_in_different_epochs(written, tmp_path):
    """As those with a limit of seconds do: lines are as long as the shortest, the table has the ends."""
    comparison = written(LOSSES | {"apts": [[2.0, 1.0, 0.4, 0.1, 0.05], [2.0, 1.0, 0.8, 0.15]]})
    assert "epoch 3 of 4, after 90 gradient evaluations" in comparison.verdict()
    assert comparison.table()[0][2] == "0.1 ± 0.071"
    plot_losses(comparison, tmp_path)
    assert (tmp_path / "loss.png").exists()


def test_limit_of_seconds(tmp_path):
    options = ComparisonOptions(problems=("digits",), out=str(tmp_path), epochs=1000, max_seconds=1.5)
    assert all("--max_seconds=1.5" in run.arguments for run in Plan("digits", options).runs)
    with pytest.raises(InvalidInput, match="max_seconds: 0.0"):
        ComparisonOptions(problems=("digits",), max_seconds=0.0)


def test_verdict_if_apts_does_not_pass(written):
    comparison = written(LOSSES | {"apts": [[2.0, 1.0, 1.0, 0.8], [2.0, 1.0, 1.0, 1.0]]})
    assert "does not pass" in comparison.verdict() and "its own is 0.9" in comparison.verdict()


def test_failed_and_diverged_runs_are_counted(written):
    comparison = written(LOSSES)
    cells = {(line[0], line[1]): line[2] for line in comparison.table()}
    assert cells["SGD with momentum", "0.1"] == "0.1, 1 failed"
    assert cells["SGD with momentum", "1"] == "1 diverged"
    assert cells["Adam", "0.001"] == "0.9 ± 0.71" and cells["Adam", "0.01 (best)"] == "0.7 ± 0.28"
    assert "sgd-0.1-seed1 failed: it broke" in comparison.markdown()


def test_no_run_finished(written, tmp_path):
    comparison = written({name: [] for name in LOSSES})
    assert "cannot be compared" in comparison.markdown() and comparison.best() == {}
    for plot in (plot_losses, plot_robustness):
        plot(comparison, tmp_path)
    assert (tmp_path / "loss.png").exists() and (tmp_path / "robustness.svg").exists()


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(0.012345, 3, "0.0123"), (1234.5, 3, "1234"), (18.4, 1, "18"), (3.21e-7, 3, "3.21e-07"), (2e30, 3, "2e+30")],
)
def test_number(value, digits, text):
    assert number(value, digits) == text


def test_default_grids():
    assert {"apts", *GRIDS.learning_rates} == set(METHODS)
    # Prodigy finds its step size by itself, up to a factor near 1.
    of_first_order = set(GRIDS.learning_rates) - {"prodigy", "spring", "levenberg-marquardt", "broyden", "adam-lbfgs"}
    assert {len(GRIDS.learning_rates[method]) for method in of_first_order} == {5}
    assert 1.0 in GRIDS.learning_rates["prodigy"]
    for sweep in (GRIDS.sweep_rates, GRIDS.sweep_factors):
        assert max(sweep) / min(sweep) == pytest.approx(1e6)
        assert all(after / before == pytest.approx(10.0) for before, after in itertools.pairwise(sweep))


def test_options_and_their_spelling():
    options = compare.parse(
        ["digits", "poisson-1d", "--batch-size", "64", "--baseline_epochs_factor=20", "--robustness", "--jobs", "2"]
    )
    assert options == ComparisonOptions(
        problems=("digits", "poisson-1d"), batch_size=64, baseline_epochs_factor=20, robustness=True, jobs=2
    )


@pytest.mark.parametrize(("problem", "methods"), [("digits", "apts,adam"), ("poisson-1d", "apts,spring")])
def test_arguments_of_problems_come_to_all_runs(tmp_path, problem, methods):
    given = ["--problem.args.width", "7", "--problem.args.depth=2"]
    options = compare.parse([problem, "--methods", methods, "--seeds=1", "--out", str(tmp_path), *given])
    for run in Plan(problem, options, SMALL).runs:
        assert '--problem_args=["width=7", "depth=2"]' in run.arguments
        assert "width=7" in run.config


def test_baselines_get_their_epochs(tmp_path):
    """Twenty times the problem's own number; subdomains are of APTS alone."""
    options = ComparisonOptions(
        problems=("poisson-1d",), out=str(tmp_path), seeds=1, baseline_epochs_factor=20, subdomains=3
    )
    plan = Plan("poisson-1d", options, SMALL)
    apts, adam = plan.runs[:2]
    assert f"--epochs={plan.epochs}" in apts.arguments and "--subdomains=3" in apts.arguments
    assert f"--epochs={20 * plan.epochs}" in adam.arguments and "--subdomains=3" not in adam.arguments


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["problems"]),
        (["nonsense"], ["nonsense", "digits"]),
        (["digits", "--sedes", "3"], ["sedes", "--help"]),
        (["digits", "--seeds", "0"], ["seeds", "0", "1 or more"]),
        (["digits", "--jobs", "x"], ["jobs", "x"]),
        (["digits", "--epochs", "-1"], ["epochs", "-1", "1 or more"]),
        (["digits", "--batch-size", "0"], ["batch_size", "0", "1 or more"]),
        (["digits", "--train-samples", "5000000"], ["train-samples", "5000000"]),
        (["digits", "--data-dir", "somewhere"], ["data-dir", "somewhere"]),
        (["digits", "--methods", "apts,lion"], ["methods", "lion", "choose one of apts, adamw-cosine"]),
        (["digits", "--methods", ""], ["methods", "not empty"]),
        (["digits", "--methods", "apts,adam", "--equal-seconds", "sgd"], ["equal_seconds", "sgd", "one of apts, adam"]),
        (["digits", "--equal-seconds", "0"], ["equal_seconds", "0", "above 0"]),
        (["digits", "--equal-seconds", "nan"], ["equal_seconds", "nan", "above 0"]),
        (["digits", "--equal-seconds", "inf"], ["equal_seconds", "inf", "above 0"]),
        (["digits", "--equal-seconds", "9", "--max-seconds", "9"], ["max_seconds", "equal_seconds"]),
        (["digits", "--equal-seconds", "9", "--robustness"], ["robustness", "equal_seconds"]),
        (["digits", "--problem.args.nope", "3"], ["--problem.args.nope", "digits has no such argument"]),
        (
            ["digits", "--problem.args.nope=3", "--epochs=2", "--methods=apts"],
            ["--problem.args.nope", "digits has no such argument"],
        ),
        (["digits", "--problem_args=[width]"], ["problem_args", "NAME=VALUE"]),
    ],
)
def test_errors(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        compare.main(arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("apts_mpi.compare: error: ") and all(word in message for word in words)
    assert os.listdir(tmp_path) == []


def test_ranks_need_mpirun(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InvalidInput, match=r"ranks: 2 .*mpirun"):
        run(ComparisonOptions(problems=("digits",), out=str(tmp_path), ranks=2), SMALL)


def test_not_under_mpirun(tmp_path, monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "0")
    with pytest.raises(InvalidInput, match="one process"):
        run(ComparisonOptions(problems=("digits",), out=str(tmp_path)), SMALL)


def test_matplotlib_is_missed_before_work(tmp_path, monkeypatch):
    hide_matplotlib(monkeypatch)
    with pytest.raises(InvalidInput, match=r"pip install apts_mpi\[plot\]"):
        run(ComparisonOptions(problems=("digits",), out=str(tmp_path / "out")), SMALL)
    assert not (tmp_path / "out").exists()
