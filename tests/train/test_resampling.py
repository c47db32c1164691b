"""``--resample``: other points every so many iterations, the same on any ranks, and again when a run goes on."""

import json

import pytest
import torch
from run_files import arrays, history
from torch import nn

from apts_mpi import problems
from apts_mpi.checkpoint import Checkpoint, resolve
from apts_mpi.errors import InvalidInput
from apts_mpi.problems import Problem, Redraw, pinn
from apts_mpi.train.resampling import CANDIDATES, TAKEN, drawn, likely, residuals

COMMON = "--problem=poisson-1d --dtype=float64 --device=cpu --subdomains=2 --resample=3".split()
BOTH = pytest.mark.parametrize("by", ["uniform", "residual"])


def metadata(path):
    with Checkpoint(resolve(path / "checkpoints")) as checkpoint:
        return checkpoint.metadata


@pytest.mark.mpi
@BOTH
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_stopped(world, directory, trained, by):
    line = [*COMMON, f"--resample-by={by}"]
    trained(*line, "--max-iterations=8", "--run-dir=whole")
    for name, stop in (("within", 4), ("before", 3)):
        trained(*line, f"--max-iterations={stop}", f"--run-dir={name}")
        trained("--resume=latest", f"--run-dir={name}", "--max-iterations=8")
        if world.rank == 0:
            assert arrays(directory / name) == arrays(directory / "whole")
            assert history(directory / name)[-1] == history(directory / "whole")[-1]


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
@BOTH
def test_any_number_of_ranks_draws_the_same(world, directory, trained_on, by):
    line = [*COMMON, f"--resample-by={by}", "--max-iterations=7"]
    trained_on(1, *line, "--run-dir=one")
    trained_on(world.size, *line, "--run-dir=all")
    trained_on(1, *line, "--run-dir=begun", "--max-iterations=4")
    trained_on(world.size, "--resume=begun", "--run-dir=gone-on", "--max-iterations=7")
    if world.rank == 0:
        for name in ("all", "gone-on"):
            assert metadata(directory / name)["resampling"] == metadata(directory / "one")["resampling"]
            mine, theirs = arrays(directory / name), arrays(directory / "one")
            assert mine.get(TAKEN) == theirs.get(TAKEN) and (TAKEN in mine) == (by == "residual")
            losses = [record["loss"] for record in history(directory / name) if "loss" in record]
            alone = [record["loss"] for record in history(directory / "one") if "loss" in record]
            assert losses == pytest.approx(alone[-len(losses) :], rel=1e-8)


@pytest.mark.mpi
def test_points_are_others_when_it_is_time_and_the_function_is_a_new_one(world, directory, trained):
    trained(*COMMON, "--max-iterations=3", "--run-dir=run")
    functions = []
    for stop in (3, 4, 6, 7):
        trained("--resume=latest", "--run-dir=run", f"--max-iterations={stop}")
        found = metadata(directory / "run")
        functions.append((found["solver"]["state"]["functions"], found.get("resampling", {}).get("number", 0)))
    assert functions == [(1, 0), (2, 1), (2, 1), (3, 2)]


@pytest.mark.mpi
def test_other_optimizers_and_batches_have_them_too(directory, trained):
    trained(*COMMON, "--optimizer=adam", "--max-iterations=7", "--run-dir=adam", "--resample-by=residual")
    trained(*COMMON, "--batch-size=51", "--max-iterations=7", "--run-dir=batches", "--resample-by=residual")
    assert metadata(directory / "adam")["resampling"] == metadata(directory / "batches")["resampling"] | {"number": 2}


def test_points_of_the_boundary_stay_and_those_within_have_the_same_weights():
    problem = problems.build("poisson-2d", dtype=torch.float64)
    inputs, targets = problem.train
    rows = problem.redraw.rows
    assert torch.equal(rows, (inputs[:, -1] == pinn.INTERIOR).nonzero().squeeze(1))
    new_inputs, new_targets = drawn(problem.redraw, torch.Generator().manual_seed(0), 50, problem)
    assert ((new_inputs[:, :2] > 0) & (new_inputs[:, :2] < 1)).all() and (new_inputs[:, 2] == pinn.INTERIOR).all()
    assert (new_targets[:, 1] == targets[rows[0], 1]).all()
    exact = torch.sin(torch.pi * new_inputs[:, :2]).prod(dim=1)
    torch.testing.assert_close(new_targets[:, 0], 2 * torch.pi**2 * exact)


def test_candidates_are_taken_in_proportion_to_their_residuals():
    """Of single draws the frequencies are the probabilities, to four deviations of 20,000 draws."""
    sizes = torch.tensor([0.0, 1.0, 3.0, 4.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    found = torch.cat([likely(sizes, 1, generator) for _ in range(20_000)]).bincount(minlength=4) / 20_000
    torch.testing.assert_close(found, torch.tensor([1.0, 1.5, 2.5, 3.0]) / 8.0, rtol=0, atol=4 * 0.0035)
    assert torch.equal(likely(sizes, 4, generator), torch.arange(4))
    assert torch.equal(likely(torch.zeros(3), 3, generator), torch.arange(3))


def test_residuals_are_roots_of_the_losses_of_single_samples():
    problem = problems.build("burgers", dtype=torch.float64)
    candidates = problem.redraw.draw(torch.Generator().manual_seed(1), 5)
    expected = [
        float(problem.loss(problem.forward(problem.network, inputs[None]), targets[None]).detach()) ** 0.5
        for inputs, targets in zip(*candidates, strict=True)
    ]
    assert residuals(problem, candidates).tolist() == pytest.approx(expected, rel=1e-12)
    assert CANDIDATES == 10


def small(draw, **changes):
    train = torch.zeros(6, 2, dtype=torch.float64), torch.zeros(6, 1, dtype=torch.float64)
    network = nn.Linear(2, 1).double()
    return Problem(
        name="own", network=network, loss=nn.functional.mse_loss, train=train, redraw=Redraw(draw), **changes
    )


ZEROS = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (ZEROS[0], "redraw returned Tensor; return inputs and targets"),
        ((ZEROS[0][:3], ZEROS[1]), r"returned inputs of \(torch.float64, \(3, 2\)\); give \(torch.float64, \(4, 2\)\)"),
        ((ZEROS[0].float(), ZEROS[1]), r"returned inputs of \(torch.float32"),
        ((ZEROS[0], ZEROS[1] + float("nan")), "returned nan in sample 0 of the targets"),
        (({"a": ZEROS[0]}, ZEROS[1]), "returned inputs"),
    ],
)
def test_what_is_no_sample_is_refused(given, message):
    problem = small(lambda generator, count: given)
    with pytest.raises(InvalidInput, match=message):
        drawn(problem.redraw, torch.Generator(), 4, problem)


OWN = """
import torch
from mpi4py import MPI
from apts_mpi.problems import Problem, Redraw

def problem(rows: int = 6, rank: int = -1, shift: float = 0.0, group: int = 1):
    def draw(generator, count):
        points = torch.rand(count, 2, generator=generator) + shift + (MPI.COMM_WORLD.rank == rank)
        return points, points.sum(dim=1, keepdim=True)

    redraw = Redraw(draw, torch.arange(rows))
    train = torch.zeros(12, 2), torch.zeros(12, 1)
    widths = 2, 4, 4, 4, 1
    network = torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in zip(widths, widths[1:])))
    loss = torch.nn.functional.mse_loss
    return Problem(name="own", network=network, loss=loss, train=train, redraw=redraw, group_size=group)
"""


@pytest.fixture
def own(world, directory):
    """A problem of the user's, in the current directory."""
    if world.rank == 0:
        (directory / "own.py").write_text(OWN)
    world.Barrier()
    return "--problem=own.py:problem"


@pytest.mark.mpi
@BOTH
def test_problems_of_the_user_draw_too(own, directory, trained, by):
    trained(own, "--resample=2", f"--resample-by={by}", "--max-iterations=5", "--run-dir=run", "--dtype=float64")
    assert json.loads((directory / "run" / "summary.json").read_text())["iterations"] == 5
    assert metadata(directory / "run")["resampling"]["number"] == 2


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--problem=digits --resample=2", "resample: 2 .* problem digits has no samples that can be drawn anew"),
        ("--problem=poisson-1d --resample=2 --train-samples=5", "resample: 2 .* leave out --train-samples"),
        ("OWN --resample=2 --layout=staged", "resample: 2 .* it needs --layout replicated"),
        ("OWN --resample=2 --problem.args.rows=13", "Redraw.rows that are no different numbers from 0 to 11"),
        ("OWN --resample=2 --problem.args.group=2 --resample-by=residual", "takes samples together; choose uniform"),
    ],
)
def test_runs_that_cannot_draw_are_refused(world, own, command, arguments, message):
    status, _, errors = command(*arguments.replace("OWN", own).split(), "--run-dir=run")
    assert status == 2
    if world.rank == 0:
        import re

        assert errors.count("\n") == 1 and re.search(message, errors), errors


@pytest.mark.mpi(min_size=2)
def test_ranks_that_draw_otherwise_are_told(world, own, command):
    status, _, errors = command(own, "--resample=2", "--problem.args.rank=1", "--max-iterations=5", "--run-dir=run")
    assert status == 2
    assert world.rank > 0 or "problem own: rank 1 has other drawn inputs than rank 0" in errors


@pytest.mark.mpi
def test_a_problem_that_draws_otherwise_is_not_the_one_of_the_run(world, own, command, trained):
    trained(own, "--resample=2", "--max-iterations=3", "--run-dir=run")
    status, _, errors = command(own, "--resume=latest", "--run-dir=run", "--problem.args.shift=1", "--max-iterations=5")
    assert status == 2
    assert world.rank > 0 or "draws other samples than it did; give the problem of the run" in errors
