"""Methods of full batches, each against something independent; and their runs and comparisons."""

import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from apts_mpi.compare import __main__ as compare
from apts_mpi.compare.full_batch.adam_then_lbfgs import AdamThenLBFGS
from apts_mpi.compare.full_batch.damped import DampedLeastSquares
from apts_mpi.compare.full_batch.levenberg_marquardt import LevenbergMarquardt
from apts_mpi.compare.full_batch.line_search import search_by_halves
from apts_mpi.compare.full_batch.options import GRIDS, TUNED, FullBatchOptions
from apts_mpi.compare.full_batch.registry import MAKERS
from apts_mpi.compare.full_batch.run import run
from apts_mpi.compare.full_batch.self_scaled_broyden import SelfScaledBroyden, scaling
from apts_mpi.compare.full_batch.spring import Spring
from apts_mpi.compare.full_batch.squares import Squares, is_of_squares
from apts_mpi.compare.options import METHODS, OF_OTHERS, OF_SQUARES, ComparisonOptions, Grids
from apts_mpi.compare.runs import Plan
from apts_mpi.errors import InvalidInput
from apts_mpi.problems import Problem, build
from apts_mpi.records.reading import read_run

DTYPE = torch.float64


def weighted(outputs, targets):
    """Two outputs and weights of their own; of the second output some are 0."""
    return (targets[:, 2:] * (outputs - targets[:, :2]).square()).mean()


def make_problem(samples, widths=(3, 4), loss=weighted, **changes):
    """A small network with two outputs, and random samples."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, widths[0], dtype=DTYPE, generator=generator)
    targets = torch.rand(samples, 4, dtype=DTYPE, generator=generator)
    targets[::3, 3] = 0.0
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(*widths), nn.Tanh(), nn.Linear(widths[1], 2)).to(DTYPE)
    return Problem(name="two", network=network, loss=loss, train=(inputs, targets), **changes)


def linear_problem(rows=30, columns=6):
    """Linear least squares, badly scaled, and its residuals' Jacobian and right-hand side for |A x - b|^2 / 2."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(rows, columns, dtype=DTYPE, generator=generator) * torch.logspace(0, 3, columns, dtype=DTYPE)
    targets = torch.randn(rows, 1, dtype=DTYPE, generator=generator)
    network = nn.Linear(columns, 1, bias=False).to(DTYPE)
    problem = Problem(name="line", network=network, loss=nn.functional.mse_loss, train=(inputs, targets))
    scale = math.sqrt(2.0 / rows)
    return problem, scale * inputs, scale * targets[:, 0]


# The loss as squares.


@pytest.mark.parametrize("samples", [5, 40])
def test_squares_are_the_loss(samples):
    problem = make_problem(samples)
    squares, network = Squares(problem), problem.network
    outputs = network(problem.train[0])
    loss = problem.loss(outputs, problem.train[1])
    gradient = torch.autograd.grad(loss, list(network.parameters()))
    gradient = torch.cat([part.flatten() for part in gradient])
    value, found = squares.value_and_gradient(squares.initial)
    residuals, jacobian = squares.rows(squares.initial)
    assert value == pytest.approx(float(loss.detach()), rel=1e-12) == squares.loss(squares.initial)
    torch.testing.assert_close(found, gradient)
    torch.testing.assert_close(jacobian.T @ residuals, gradient)
    assert float(residuals.square().sum()) / 2.0 == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("name", ["poisson-1d", "burgers", "allen-cahn"])
def test_rows_of_problems_are_differences(name):
    """Along a random direction, by central differences; second derivatives within the residuals and all."""
    squares = Squares(build(name, dtype=DTYPE, train_samples=30))
    residuals, jacobian = squares.rows(squares.initial)
    direction = torch.randn(len(squares.initial), dtype=DTYPE, generator=torch.Generator().manual_seed(0))
    step = 1e-6
    ahead, behind = (squares.residuals(squares.initial + sign * step * direction) for sign in (1.0, -1.0))
    torch.testing.assert_close(squares.residuals(squares.initial), residuals)
    torch.testing.assert_close((ahead - behind) / (2.0 * step), jacobian @ direction, rtol=1e-6, atol=1e-6)


def test_frozen_parameters_stay():
    problem = make_problem(10)
    problem.network[0].weight.requires_grad_(False)
    before = problem.network[0].weight.clone()
    squares = Squares(problem)
    assert len(squares.initial) == 4 + 2 * 4 + 2
    squares.put(squares.initial + 1.0)
    assert problem.network[0].weight.equal(before)
    assert squares.initial[4:12].add(1.0).equal(problem.network[2].weight.flatten())


def a_pair(outputs, targets):
    return (targets[:, 2:] * (outputs - targets[:, :2]).square()).sum(), torch.tensor(float(outputs.numel()))


def test_a_loss_as_a_pair():
    pair, one = (Squares(make_problem(10, loss=loss)) for loss in (a_pair, weighted))
    torch.testing.assert_close(pair.residuals(pair.initial), one.residuals(one.initial))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": lambda outputs, targets: (outputs - targets[:, :2]).abs().mean()}, "no mean of squared errors"),
        ({"loss": lambda outputs, targets: (outputs - targets[:, :2]).pow(4).mean()}, "no mean of squared errors"),
        ({"loss": lambda outputs, targets: (outputs[:, 0] * outputs[:, 1]).square().mean()}, "no mean of squared"),
        ({"loss": lambda outputs, targets: weighted(outputs, targets) + 0.1}, "no mean of squared errors"),
        ({"batch_size": 5}, "batches are not full"),
        ({"coupled": True}, "takes samples together"),
    ],
)
def test_what_is_no_problem_of_squares(changes, words):
    problem = make_problem(10, **changes)
    assert not is_of_squares(problem)
    with pytest.raises(InvalidInput, match=f"problem: 'two'.*{words}.*choose other methods"):
        Squares(problem)


# The methods.


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_damped_least_squares_are_those_of_the_stacked_matrix(shape):
    generator = torch.Generator().manual_seed(3)
    jacobian = torch.randn(*shape, dtype=DTYPE, generator=generator)
    right = torch.randn(shape[0], dtype=DTYPE, generator=generator)
    stacked = torch.cat([jacobian, 0.3 * torch.eye(shape[1], dtype=DTYPE)])
    expected = torch.linalg.lstsq(stacked, torch.cat([right, torch.zeros(shape[1], dtype=DTYPE)])[:, None]).solution
    found = DampedLeastSquares(jacobian).solve(right, 0.09)
    torch.testing.assert_close(found, expected[:, 0])
    assert DampedLeastSquares(torch.zeros(*shape, dtype=DTYPE)).solve(right, 0.0) is None


@pytest.mark.parametrize("samples", [5, 40])
def test_steps_of_spring_are_those_of_its_definition(samples):
    """``argmin |J d + r|^2 + damping |d - momentum last|^2`` from a dense factorisation of the stacked matrix."""
    squares = Squares(make_problem(samples))
    method, damping = Spring(squares, 1e-2), 1e-2
    last = torch.zeros_like(squares.initial)
    for _ in range(3):
        before, loss = method.point, method.loss
        residuals, jacobian = squares.rows(before)
        identity = math.sqrt(damping) * torch.eye(len(before), dtype=DTYPE)
        right = torch.cat([-residuals, identity @ (0.9 * last)])
        direction = torch.linalg.lstsq(torch.cat([jacobian, identity]), right[:, None]).solution[:, 0]
        method.step(0.0)
        last = method.point - before
        length = float(last @ direction / direction.square().sum())
        torch.testing.assert_close(last, length * direction, rtol=1e-7, atol=1e-10)
        assert math.log2(length) == pytest.approx(round(math.log2(length)), abs=1e-7)
        assert squares.loss(method.point) == method.loss < loss


def test_levenberg_marquardt_solves_linear_least_squares():
    problem, matrix, right = linear_problem()
    squares = Squares(problem)
    method = LevenbergMarquardt(squares, 1e-6)
    for _ in range(12):
        method.step(0.0)
    expected = torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0]
    torch.testing.assert_close(method.point, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("samples", [6, 40])
def test_levenberg_marquardt_ends_where_a_network_that_was_hidden_is(samples):
    """Of a loss whose minimum is 0, to rounding, as Gauss-Newton steps converge quadratically there."""
    problem = make_problem(samples)
    squares = Squares(problem)
    noise = torch.randn(len(squares.initial), dtype=DTYPE, generator=torch.Generator().manual_seed(5))
    squares.put(squares.initial + 0.3 * noise)
    problem.train[1][:, :2] = problem.network(problem.train[0]).detach()
    squares.put(squares.initial)
    method = LevenbergMarquardt(Squares(problem), 1e-3)
    losses = []
    for _ in range(80):
        method.step(0.0)
        losses.append(method.loss)
    assert losses[0] > 1e-6 and losses[-1] < 1e-26 and losses == sorted(losses, reverse=True)


def test_broyden_minimises_a_quadratic():
    problem, matrix, right = linear_problem(columns=4)
    squares = Squares(problem)
    method = SelfScaledBroyden(squares)
    for _ in range(60):
        method.step(0.0)
    expected = torch.linalg.lstsq(matrix, right[:, None]).solution[:, 0]
    torch.testing.assert_close(method.point, expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("is_new", [True, False])
def test_an_update_of_broyden_is_that_of_the_inverse_matrix(is_new):
    """The method keeps the inverse of B, of which theta is published: H y = s, and

    B <- (B - B s s' B / s'Bs + theta w w') tau + y y' / y's,  w = sqrt(s'Bs) (y / y's - B s / s'Bs)
    """
    squares = Squares(make_problem(20))
    method, size = SelfScaledBroyden(squares), len(squares.initial)
    generator = torch.Generator().manual_seed(4)
    root = torch.randn(size, size, dtype=DTYPE, generator=generator) / size**0.5
    inverse = torch.eye(size, dtype=DTYPE) if is_new else root @ root.T + torch.eye(size, dtype=DTYPE)
    step = torch.randn(size, dtype=DTYPE, generator=generator)
    change = torch.linalg.solve(inverse, step) + 0.3 * step
    method._inverse, method._is_new = inverse.clone(), is_new
    matrix = torch.linalg.inv(inverse)
    curved = float(step @ matrix @ step)
    method._update(step, change, curved)
    torch.testing.assert_close(method._inverse @ change, step)

    along = float(step @ change)
    h, b = float(change @ inverse @ change) / along, curved / along
    phi, tau = scaling(h, b, size, is_new)
    theta = (1.0 - phi) / (1.0 + phi * (h * b - 1.0))
    w = curved**0.5 * (change / along - matrix @ step / curved)
    product = matrix @ step
    updated = matrix - torch.outer(product, product) / curved + theta * torch.outer(w, w)
    updated = tau * updated + torch.outer(change, change) / along
    torch.testing.assert_close(torch.linalg.inv(method._inverse), updated, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", MAKERS)
def test_methods_go_down_on_poisson(name):
    """In 40 iterations by a factor of a thousand, and they leave the samples and the first point alone."""
    problem = build("poisson-1d", dtype=DTYPE)
    squares = Squares(problem)
    first = squares.initial.clone()
    method = MAKERS[name](squares, 1e-2 if name == "adam-lbfgs" else 1e-6)
    for index in range(40):
        method.step(index / 40)
    assert squares.loss(method.point) < 1e-3 * squares.loss(first)
    assert squares.initial.equal(first)


def test_adam_and_then_lbfgs_are_torchs():
    problem = make_problem(20)
    squares = Squares(problem)
    method = AdamThenLBFGS(squares, 1e-2)
    method.step(0.1)
    # The first step of Adam is the rate in each parameter.
    moved = (method.point - squares.initial).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=1e-4, atol=0.0)
    before = squares.loss(method.point)
    method.step(0.2)
    assert squares.loss(method.point) < before


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda t: (t - 1.0) ** 2, 1.0),
        (lambda t: (t - 0.2) ** 2, 0.25),
        (lambda t: math.nan if t > 0.1 else (t - 0.06) ** 2, 0.0625),
        (lambda t: 1.0 + t, 0.0),
        (lambda t: math.nan if t > 0.0 else 1.0, 0.0),
    ],
)
def test_search_by_halves(loss, expected):
    length, value = search_by_halves(loss, loss(0.0))
    assert length == expected and value == loss(expected)


# Runs and comparisons.


def options(**changes):
    values = {"problem": "poisson-1d", "optimizer": "spring", "setting": 1e-6, "seed": 3, "epochs": 4} | changes
    return FullBatchOptions(**values)


def test_a_run_leaves_the_records_of_any_other(tmp_path):
    summary = run(options(), tmp_path)
    records = read_run(tmp_path)
    assert len(records.epochs) == len(records.iterations) == summary["iterations"] == 4
    assert records.options["setting"] == 1e-6 and records.ranks == 1
    problem = build("poisson-1d", dtype=DTYPE, seed=3)
    method = Spring(Squares(problem), 1e-6)
    for epoch in records.epochs:
        method.step(0.0)
        assert epoch["train_loss"] == pytest.approx(method.loss, rel=1e-10)
        assert epoch["cpu_seconds"] > 0.0 and epoch["gradient_evaluations"] >= epoch["iteration"] * (1.0 + 2.0 / 3.0)
    Squares(problem).put(method.point)
    error = problem.metrics["relative_l2_error"](problem.network)
    assert records.epochs[-1]["relative_l2_error"] == pytest.approx(error, rel=1e-8)


def test_a_run_ends_by_its_seconds(tmp_path):
    summary = run(options(epochs=10**6, max_cpu_seconds=0.3), tmp_path)
    before = read_run(tmp_path).column("epochs", "cpu_seconds")
    assert before[-1] == summary["cpu_seconds"] >= 0.3 > before[-2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "adam"}, "optimizer: 'adam'"),
        ({"epochs": 0}, "epochs: 0"),
        ({"max_cpu_seconds": 0.0}, "max_cpu_seconds: 0.0"),
    ],
)
def test_options_that_cannot_be(changes, words):
    with pytest.raises(InvalidInput, match=words):
        options(**changes)


def test_lists_of_methods_agree():
    assert set(MAKERS) == set(GRIDS) == set(TUNED) <= set(METHODS)
    assert set(OF_SQUARES) | set(OF_OTHERS) <= set(METHODS)


def test_defaults_of_a_problem(tmp_path):
    """Methods and precision are those for its kind; other runs of the same options stay as they were."""
    pinn, digits = (
        Plan(name, ComparisonOptions(problems=(name,), out=str(tmp_path))) for name in ("poisson-1d", "digits")
    )
    assert pinn.methods == OF_SQUARES and digits.methods == OF_OTHERS
    assert all("float64" in run.config for run in pinn.runs) and all("float32" in run.config for run in digits.runs)
    names = {run.setting.name for run in pinn.runs}
    assert {"spring-1e-06", "levenberg-marquardt-0.001", "broyden", "adam-lbfgs-0.003", "apts"} <= names
    two_ranks = Plan("poisson-1d", ComparisonOptions(problems=("poisson-1d",), out=str(tmp_path / "2"), ranks=2))
    assert two_ranks.methods == OF_OTHERS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"problems": ("digits",), "methods": "spring"}, "problem: 'digits'"),
        ({"methods": "spring", "batch_size": 10}, "batch_size: spring takes full batches"),
        ({"methods": "broyden", "ranks": 2}, "ranks: broyden has one rank"),
        ({"methods": "spring", "equal_seconds": "apts"}, "equal_seconds: 'apts'"),
        ({"equal_seconds": "muon"}, "equal_seconds: 'muon'"),
    ],
)
def test_comparisons_that_cannot_be(tmp_path, changes, words):
    with pytest.raises(InvalidInput, match=words):
        values = {"problems": ("poisson-1d",), "out": str(tmp_path / "out")} | changes
        compare.compare(ComparisonOptions(**values), Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", [["--equal-seconds"], ["--equal-seconds", "--seeds", "1"]])
def test_equal_seconds_without_a_value_are_those_of_apts(arguments):
    assert compare.parse(["poisson-1d", *arguments]).equal_seconds == "apts"
    assert compare.parse(["poisson-1d", "--equal-seconds", "3"]).equal_seconds == "3"


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A short comparison with all methods of its kind, and what was written."""
    settings = ComparisonOptions(
        problems=("poisson-1d",), equal_seconds="0.4", seeds=2, out=str(tmp_path_factory.mktemp("comparisons"))
    )
    rates = {"adam": (1e-2,), "lbfgs": (0.3,), "spring": (1e-6,), "levenberg-marquardt": (1e-3,), "adam-lbfgs": (1e-2,)}
    grids = Grids(learning_rates=rates, sweep_rates=(), sweep_factors=())
    (comparison,) = compare.compare(settings, Console(quiet=True), grids)
    return comparison


@pytest.mark.slow
@pytest.mark.processes
def test_a_table_of_errors(compared):
    """Median and worst of the seeds, the least error first; all as the histories have it."""
    assert compared.failures == {}
    assert compared.header() == ["method", "tuned", "error", "worst", "loss", "iterations", "CPU seconds"]
    best = compared.tables()["poisson-1d"]
    assert {line[0] for line in best} == {METHODS[name] for name in OF_SQUARES}
    errors = [float(line[2]) for line in best]
    assert errors == sorted(errors)
    for line in best:
        method = next(name for name, words in METHODS.items() if words == line[0])
        runs = [run.path for run in compared.plan.runs if run.setting.method == method]
        ends = [json.loads((path / "history.jsonl").read_text().splitlines()[-1]) for path in runs]
        assert float(line[2]) == pytest.approx(np.median([end["relative_l2_error"] for end in ends]), rel=1e-2)
        assert float(line[3]) == pytest.approx(max(end["relative_l2_error"] for end in ends), rel=1e-2)
        assert float(line[6]) > 0.0
    text = (compared.plan.path / "table.md").read_text()
    assert "APTS has place" in text and "damping 1e-06" in text and "worst is that of all seeds" in text
    assert all(max(map(len, table)) < 30 for table in best)


@pytest.mark.slow
@pytest.mark.processes
def test_a_plot_of_errors(compared):
    words = (compared.plan.path / "cpu_seconds.svg").read_text()
    for text in ("relative l2 error", "SPRING, damping 1e-06", "self-scaled Broyden", "median and range of 2 seeds"):
        assert f"<!-- {text}" in words or text in words
