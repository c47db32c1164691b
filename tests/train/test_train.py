"""The command line on all ranks of this job, within the process; `test_train_processes.py` starts processes."""

import itertools
import json
import math
import re
import struct
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy, problem
from torch import nn

from apts_mpi.problems import Problem, build
from apts_mpi.problems.losses import token_cross_entropy
from apts_mpi.train.__main__ import main
from apts_mpi.train.ending import Ending
from apts_mpi.train.layouts import train_problem
from apts_mpi.train.metrics import dimension_of_classes
from apts_mpi.train.parser import make_parser, parse, spell
from apts_mpi.train.training import RETRIES
from apts_mpi.trust_region.acceptance import Judged

# All that decides what a run does, whatever the defaults are.
PLAIN = (
    "--problem=networks:problem --dtype=float64 --device=cpu --epochs=2 --batch-size=30 --subdomains=3 "
    "--local.solver=adam --local.iterations=2 --schwarz.variant=exact --schwarz.local_data=shard --coarse=none "
    "--trust-region.initial_radius=0.2"
).split()

ITERATION = {
    "iteration", "epoch", "loss", "trial_loss", "predicted_reduction", "actual_reduction", "rho", "accepted", "radius",
    "next_radius", "step_norm", "gradient_norm", "skipped", "gradient_evaluations",
    "seconds", "cpu_seconds",
}  # fmt: skip
EPOCH = {
    "epoch", "iteration", "gradient_evaluations", "seconds", "cpu_seconds", "train_loss", "train_accuracy",
    "test_loss", "test_accuracy",
}  # fmt: skip
SUMMARY = {
    "problem", "optimizer", "reason", "ranks", "subdomains", "batch_size", "targets_per_sample", "parameters", "epochs",
    "iterations", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "accepted_steps", "rejected_steps",
    "skipped_steps", "gradient_evaluations", "seconds", "cpu_seconds", "seconds_in_communication",
    "seconds_in_checkpoints", "events",
}  # fmt: skip


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """An empty current directory of this rank's own; only rank 0 writes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def history(path):
    """The records of iterations, and those of epochs."""
    records = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return [r for r in records if "train_loss" not in r], [r for r in records if "train_loss" in r]


def without_times(records):
    return [{name: value for name, value in record.items() if "seconds" not in name} for record in records]


@pytest.mark.mpi
def test_records(world, directory):
    main([*PLAIN, "--run-dir", "run", "--global-step", "first-order"])
    if world.rank > 0:
        assert list(directory.iterdir()) == []
        return
    path = directory / "run"
    assert {file.name for file in path.iterdir()} == {"checkpoints", "config.yaml", "history.jsonl", "summary.json"}
    iterations, epochs = history(path)
    assert len(iterations) == 4 and len(epochs) == 2
    for number, record in enumerate(iterations, 1):
        assert set(record) == ITERATION | {"global_step"}
        assert set(record["global_step"]) <= ITERATION
        assert record["iteration"] == number and record["epoch"] == (number + 1) // 2
    assert all(set(record) == EPOCH for record in epochs)
    summary = json.loads((path / "summary.json").read_text())
    assert set(summary) == SUMMARY
    assert (summary["ranks"], summary["iterations"], summary["epochs"]) == (world.size, 4, 2)
    assert summary["problem"] == "networks:problem" and summary["optimizer"] == "apts"
    assert summary["accepted_steps"] + summary["rejected_steps"] + summary["skipped_steps"] == 4
    assert summary["train_loss"] == epochs[-1]["train_loss"]
    assert summary["gradient_evaluations"] == iterations[-1]["gradient_evaluations"]


@pytest.mark.mpi
def test_configuration_makes_the_same_run_again(world, directory):
    main([*PLAIN, "--run-dir", "first", "--seed", "7"])
    name = world.bcast(str(directory / "first" / "config.yaml"))
    main(["--config", name, "--run-dir", "second"])
    if world.rank == 0:
        first, second = (history(directory / name) for name in ("first", "second"))
        assert without_times(first[0]) == without_times(second[0])
        assert without_times(first[1]) == without_times(second[1])
        configurations = [(directory / name / "config.yaml").read_text() for name in ("first", "second")]
        assert configurations[0] == configurations[1]


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_options_after_a_configuration_win(world, directory):
    main([*PLAIN, "--run-dir", "first"])
    name = world.bcast(str(directory / "first" / "config.yaml"))
    main(["--config", name, "--run-dir", "second", "--max-iterations", "1"])
    if world.rank == 0:
        assert len(history(directory / "second")[0]) == 1


@pytest.mark.mpi
def test_output(world, directory, capfd):
    """Rank 0 prints: the solver, a line an iteration, a line an epoch, a table."""
    main([*PLAIN, "--view", "--monitor"])
    printed, errors = capfd.readouterr()
    assert errors == ""
    if world.rank > 0:
        assert printed == ""
        return
    lines = printed.splitlines()
    assert lines[0].startswith("method: two-level") and lines[1].startswith("APTS: ")
    assert any(line.startswith("  subdomain 2: ") for line in lines)
    for number in range(1, 5):
        assert sum(line.startswith(f"iteration {number} ") for line in lines) == 1
    assert sum(line.startswith("epoch ") for line in lines) == 2
    # Each number under its heading, within 80 columns.
    (heading,) = [line for line in lines if line.strip().startswith("seconds") and "rejected" in line]
    for line in (line for line in lines if line.startswith("epoch ")):
        assert len(line) == len(heading) <= 80
        assert [end.end() for end in re.finditer(r"\S+(?: loss)?", line[9:])] == [
            end.end() for end in re.finditer(r"\S+(?: loss)?", heading[9:])
        ]
    assert "networks:problem, apts" in printed and "train loss" in printed
    assert re.search(r"records: runs/networks.problem-apts-\d{8}-\d{6}", printed)
    (path,) = (directory / "runs").iterdir()
    assert (path / "summary.json").exists()


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_output_without_monitor(world, capfd):
    main(PLAIN)
    printed = capfd.readouterr().out
    assert "APTS:" not in printed and not re.search(r"^iteration \d", printed, re.MULTILINE)


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize("argument", ["--help", "--print_config"])
def test_what_prints_and_ends_does_so_once(world, directory, capfd, argument):
    with pytest.raises(SystemExit) as caught:
        main([argument])
    assert not caught.value.code
    printed, errors = capfd.readouterr()
    assert errors == "" and list(directory.iterdir()) == []
    if world.rank > 0:
        assert printed == ""
    elif argument == "--help":
        assert "--problem" in printed and "--help-all" in printed
    else:
        (directory / "printed.yaml").write_text(printed)
        assert parse(["--config", "printed.yaml"]) == parse([])


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_overwrite(world, directory):
    main([*PLAIN, "--run-dir", "run", "--epochs=1"])
    main([*PLAIN, "--run-dir", "run", "--overwrite"])
    if world.rank == 0:
        assert len(history(directory / "run")[1]) == 2


def train(comm, *arguments):
    """Train without files; the records without the times."""
    options, _ = parse([*PLAIN, *arguments])
    problem = build(options.problem, seed=options.seed, dtype=getattr(torch, options.dtype))
    records = []
    training = train_problem(problem, options, torch.device("cpu"), comm)
    metrics = training.run(records.append)
    return without_times([*records, metrics]), training


def numbers(records):
    return torch.tensor([float(value) for record in records for value in record.values()], dtype=torch.float64)


@pytest.mark.mpi
@pytest.mark.all_sizes(optimizer="apts")
@pytest.mark.parametrize("optimizer", ["apts", "adam", "sgd", "lbfgs"])
def test_run_does_not_depend_on_the_ranks(world, optimizer):
    """Nor do the metrics, of which each rank computes its share."""
    arguments = [f"--optimizer={optimizer}", "--learning-rate=0.01"]
    found, _ = train(world, *arguments)
    assert world.bcast(found) == found
    if world.rank == 0:
        expected, _ = train(MPI.COMM_SELF, *arguments)
        assert [set(record) for record in found] == [set(record) for record in expected]
        keep = [name for name in ITERATION | EPOCH if name != "gradient_evaluations"]  # the share of the busiest rank
        pairs = [[{name: r[name] for name in keep if name in r} for r in run] for run in (found, expected)]
        torch.testing.assert_close(*map(numbers, pairs), rtol=1e-10, atol=1e-10)


@pytest.mark.mpi
def test_all_optimizers_start_from_the_same_network_on_the_same_batch(world):
    losses = {name: train(world, f"--optimizer={name}")[0][0]["loss"] for name in ("apts", "adam", "sgd", "lbfgs")}
    assert losses["adam"] == losses["sgd"] == losses["lbfgs"]
    # APTS sums over its subdomains' shards.
    assert losses["apts"] == pytest.approx(losses["adam"], rel=1e-14)


@pytest.mark.mpi
def test_seed_decides_the_batches(world):
    first, again, other = (train(world, f"--seed={seed}")[0] for seed in (0, 0, 1))
    assert first == again
    assert first[0]["loss"] != other[0]["loss"]


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_metrics_are_those_of_all_samples(world):
    """In evaluation mode; by hand."""
    records, training = train(world, "--epochs=1")
    network = training.problem.network
    assert not network.training
    for name, (inputs, targets) in (("train", classified(60)), ("test", classified(30, seed=2))):
        outputs = network(inputs).detach()
        assert records[-1][f"{name}_loss"] == pytest.approx(cross_entropy(outputs, targets).item(), rel=1e-12)
        right = (outputs.argmax(dim=1) == targets).double().mean().item()
        assert records[-1][f"{name}_accuracy"] == pytest.approx(right, rel=1e-12)


class Positions(nn.Module):
    """Scores of three classes at each of ``count`` positions, classes before positions or behind them."""

    def __init__(self, count, behind):
        super().__init__()
        self.layer = nn.Linear(10, 3 * count)
        self.behind = behind

    def forward(self, inputs):
        scores = self.layer(inputs).unflatten(1, (3, -1))
        return scores.mT if self.behind else scores


def at_positions(count, behind):
    torch.manual_seed(0)
    data = [(inputs, targets[:, None].repeat(1, count)) for inputs, targets in (classified(60), classified(30, seed=2))]
    network = Positions(count, behind).double()
    return network, token_cross_entropy if behind else cross_entropy, tuple(data)


def classes_second():
    return at_positions(5, behind=False)


def classes_last():
    return at_positions(5, behind=True)


def as_many_classes_as_positions():
    return at_positions(3, behind=False)


def counts():
    torch.manual_seed(0)
    network = nn.Linear(10, 1).double()
    return network, nn.functional.poisson_nll_loss, (classified(60)[0], classified(60)[1][:, None])


ACCURACIES = {
    "classes_second": lambda outputs, targets: (outputs.argmax(1) == targets).double().mean().item(),
    "classes_last": lambda outputs, targets: (outputs.argmax(2) == targets).double().mean().item(),
    "as_many_classes_as_positions": None,
    "counts": None,
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", ACCURACIES)
def test_accuracy_where_it_is_clear_what_the_classes_are(world, name):
    """Of integer targets; by hand."""
    few = ["--subdomains=1", "--local.solver=sgd", "--local.iterations=1"]
    records, training = train(world, f"--problem=test_train:{name}", "--epochs=1", *few)
    data = training.problem.train
    outputs = training.problem.network(data[0]).detach()
    assert records[-1]["train_loss"] == pytest.approx(training.problem.loss(outputs, data[1]).item(), rel=1e-12)
    if ACCURACIES[name] is None:
        assert not any("accuracy" in key for record in records for key in record)
    else:
        assert records[-1]["train_accuracy"] == pytest.approx(ACCURACIES[name](outputs, data[1]), rel=1e-12)
        assert "test_accuracy" in records[-1]


def test_dimension_of_classes():
    """Of outputs of these shapes for targets of those."""
    found = {
        ((9, 3), (9,)): 1, ((9, 3, 4), (9, 4)): 1, ((9, 4, 3), (9, 4)): 2, ((9, 3, 4, 5), (9, 4, 5)): 1,
        ((9, 4, 5, 3), (9, 4, 5)): 3, ((9, 3, 3), (9, 3)): None, ((9, 1), (9,)): None, ((9, 1), (9, 1)): None,
        ((9,), (9,)): None, ((9, 9), (9,)): 1, ((9, 3, 4), (9,)): None,
    }  # fmt: skip
    for (outputs, targets), dimension in found.items():
        assert dimension_of_classes(torch.zeros(outputs), torch.zeros(targets, dtype=torch.int64)) == dimension
    assert dimension_of_classes((torch.zeros(9, 3),), torch.zeros(9)) is None


def without_value():
    network, loss, data = problem()
    return network, lambda outputs, targets: loss(outputs, targets) + (0.0 * outputs.sum()).log(), data


def without_effect():
    network, _, data = problem()
    return network, lambda outputs, targets: cross_entropy(0.0 * outputs, targets), data


def normalised():
    return classifier(batch_norm=True), cross_entropy, problem()[2]


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize(
    ("arguments", "warning"),
    [
        (
            "--problem test_train:without_value",
            "no step was accepted: the loss is not finite; look for nan and inf in",
        ),
        ("--problem test_train:without_effect", "no step was accepted: the gradient is 0; look for what"),
        ("--trust-region.initial_radius 1e4 --max-iterations 2", "no step was accepted: the last one had rho -.* with"),
        (
            "--problem test_train:without_value --optimizer sgd",
            "the loss is not finite; give a smaller --learning-rate",
        ),
        ("--max-iterations 2", ""),
        ("--optimizer sgd", ""),
    ],
    ids=lambda part: part if part.startswith("--") else "",
)
def test_warning_at_the_end_of_a_run_without_success(world, capfd, arguments, warning):
    """In one line of rank 0; the status is 0, as the run did what it was told, and has records."""
    main([*PLAIN, *arguments.split()])
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert bool(lines) == (bool(warning) and world.rank == 0)
    assert not lines or re.match("warning: " + warning, lines.pop())
    assert all(line.startswith("warning: the last 10 steps") for line in lines)  # in the course of it


def sine():
    """A differential equation whose residual is differentiated by `torch.autograd.grad`."""

    def residual(network, x):
        x.requires_grad_()
        (slope,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        return torch.autograd.grad(slope.sum(), x, create_graph=True)[0]

    x = torch.linspace(0.0, 3.0, 40, dtype=torch.float64)[:, None]
    network = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    samples = (x, -x.sin())
    return Problem(
        name="sine", network=network, loss=nn.functional.mse_loss, train=samples, test=samples, forward=residual
    )


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize("optimizer", ["apts", "adam", "lbfgs"])
def test_residuals_by_autograd(world, directory, optimizer):
    common = "--problem=test_train:sine --dtype=float64 --device=cpu --epochs=5 --learning-rate=1e-2 --run-dir=run"
    main([*common.split(), f"--optimizer={optimizer}"])
    if world.rank == 0:
        _, epochs = history(directory / "run")
        assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
        assert epochs[-1]["train_loss"] == pytest.approx(epochs[-1]["test_loss"], rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gradient_norm": math.nan, "skipped": True}, "the gradient is not finite"),
        ({"predicted_reduction": math.nan}, "the predicted reduction is nan"),
        ({"predicted_reduction": 0.0}, "the predicted reduction is 0"),
        ({"trial_loss": math.inf}, "the loss after the step is not finite;"),
        ({"trial_loss": math.inf, "not_finite_on": 2}, "the loss after the step is not finite on rank 2;"),
        ({"loss": math.nan, "not_finite_on": 0}, "the loss is not finite on rank 0;"),
    ],
)
def test_reasons_of_a_rejection(changes, reason):
    judged = Judged(
        loss=1.0,
        trial_loss=2.0,
        predicted_reduction=0.5,
        actual_reduction=-1.0,
        rho=-2.0,
        accepted=False,
        radius=1.0,
        next_radius=0.5,
        step_norm=1.0,
        gradient_norm=1.0,
    )
    assert replace(judged, **changes).reason.startswith(reason)
    assert replace(judged, accepted=True).reason == ""


@pytest.mark.mpi
def test_samples_that_fill_no_batch_wait_for_another_epoch(world):
    records, training = train(world, "--batch-size=25", "--epochs=1")
    assert training.batches == 2 and records[-2]["iteration"] == 2


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_full_batch_is_repeated(world):
    """From the second repetition on a gradient is a backward pass alone."""
    _, training = train(world, "--batch-size=60", "--epochs=4", "--local.solver=sgd", "--local.iterations=1")
    assert training.progress.iteration == training.progress.accepted == 4
    # On an even share: 4/3 for the first and second iteration, 1 for the others.
    busiest = training.progress.gradient_evaluations / (2 * (1.0 + 1.0 / 3.0) + 2.0)
    assert 1.0 - 1e-12 <= busiest < 2.7  # 3 subdomains on 8 ranks leave some with more than their share


@pytest.mark.mpi
def test_rejected_batch_is_tried_again_some_times(world):
    records, training = train(world, "--trust-region.initial_radius=1e4", "--epochs=1")
    iterations = [record for record in records if "rho" in record]
    first = iterations[: RETRIES + 1]
    assert not any(record["accepted"] for record in first)
    assert len({record["loss"] for record in first}) == 1 and iterations[RETRIES + 1]["loss"] != first[0]["loss"]
    assert all(after["radius"] < before["radius"] for before, after in itertools.pairwise(first))
    assert training.progress.rejected >= RETRIES + 1


@pytest.mark.mpi
@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("radius", ["0.1", "1e4"])
def test_limit_of_iterations(world, limit, radius):
    """Also in the middle of an epoch, or of a batch that is tried again; metrics come all the same."""
    records, _ = train(world, f"--max-iterations={limit}", f"--trust-region.initial_radius={radius}")
    assert sum("rho" in record for record in records) == limit
    assert "train_loss" in records[-1]


@pytest.mark.mpi
@pytest.mark.parametrize("optimizer", ["apts", "adam"])
def test_limit_of_seconds(world, optimizer):
    """Each rank has a clock of its own; rank 0's counts, also for a run that goes on after it."""
    records, training = train(world, "--max-seconds=1e-9", f"--optimizer={optimizer}")
    assert training.progress.iteration == 1 and training.done
    assert "train_loss" in records[-1]
    training.run(records.append)
    assert training.progress.iteration == 1
    longer = replace(training.options, max_seconds=1e9, epochs=3)
    training.options, training.epochs = longer, 3
    training._ending = Ending(longer, 3, training.batches, training.stopping, training.comm)
    training.run(records.append)
    assert training.progress.epoch == 4


# What is refused.


def refused(world, capfd, directory, *arguments):
    """The message, which rank 0 alone prints, once; all ranks end with status 2 and nothing is written."""
    before = sorted(directory.rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 2
    printed, errors = capfd.readouterr()
    assert printed == "" and sorted(directory.rglob("*")) == before
    assert errors.count("apts_mpi.train: error: ") == (world.rank == 0)
    assert "Traceback" not in errors
    assert world.rank == 0 or errors == ""
    return world.bcast(errors)


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--no-such-option 3", r"unrecognized arguments: --no.such.option 3; --help lists the options"),
        ("more", "unrecognized arguments: more"),
        ("--epochs zero", "error: epochs: 'zero' is not allowed; give a whole number, or null\n$"),
        ("--seed 1.5", "error: seed: '1.5' is not allowed; give a whole number\n$"),
        ("--local.relax maybe", "error: local.relax: 'maybe' is not allowed; give true or false, or null\n$"),
        ("--epoch 3", "unrecognized arguments: --epoch 3; did you mean --epochs[?]; "),
        ("--local.dampin 3", "; did you mean --local.damping[?]; "),
        ("--coarse gauss-newtn", "choose one of auto, none, gauss-newton, residual; did you mean gauss-newton[?]\n$"),
        ("--problem digit", "or MODULE:FUNCTION; did you mean digits[?]\n$"),
        (
            "--local.solver newton",
            "error: local.solver: 'newton' is not allowed; choose one of auto, .*, adam, or MODULE:CLASS .*\n$",
        ),
        ("--coarse foo", "coarse.model: 'foo' is not allowed; choose one of auto, none, gauss-newton, residual\n$"),
        ("--micro-batch-size foo", "micro_batch_size: 'foo' .* give a whole number of 1 or more, or auto\n$"),
        ("--coarse.columns correction", r"error: coarse.columns: 'correction' .* such as \[correction,last_step\]\n$"),
        ("--coarse.columns [correction,foo]", "coarse.columns: 'foo' is not allowed; give a list of correction, last_"),
        ("--coarse.columns [correction,correction]", "coarse.columns: .* is not allowed; give each once"),
        ("--local.solver", "--local.solver: a value is missing"),
        ("--schwarz.damping 2", r"schwarz.damping: 2.0 is not allowed; give a number in \(0, 1\]"),
        ("--trust-region.window -1", "trust_region.window: -1 is not allowed"),
        ("--learning-rate 0", "learning_rate: 0.0 is not allowed; give a number above 0"),
        ("--problem nothing", "--problem: 'nothing' is not known; choose one of .*digits.* or MODULE:FUNCTION"),
        ("--train-samples 99999 --problem digits", "--train-samples: 99999 .* give 1 to 1438"),
        ("--subdomains 100", "subdomains: 100 is too many; .* at most 6; --schwarz.partition index makes more"),
        ("--replicas 5", r"replicas: 5 does not divide the \d ranks; give a divisor"),
        ("--batch-size 2", "batch_size: 2 is too small for . ranks with 3 subdomains; give at least"),
        ("--batch-size 2 --subdomains 3", "batch_size: 2 is too small"),
        ("--batch-size 5 --problem test_train:normalised", "batch_size: 5 is too small for .*; give at least 6"),
        ("--config absent.yaml", "config: 'absent.yaml' cannot be read .No such file or directory.; give a YAML file"),
        ("--data-dir somewhere --problem digits", "--data-dir: 'somewhere' .* digits reads no files"),
        ("--data-dir absent --problem fashion-mnist", "--data-dir absent is not a directory: give one that holds"),
        ("--problem absent:problem", "importing 'absent' failed with ModuleNotFoundError.*give MODULE:FUNCTION"),
        ("--problem networks:absent", "'networks' has no function 'absent'"),
        ("--problem networks:flat", "flat needs tensors; give --problem.args.tensors VALUE"),
    ],
    ids=lambda part: part if part.startswith("--") else "",
)
def test_bad_arguments_are_refused(world, capfd, directory, arguments, message):
    errors = refused(world, capfd, directory, *PLAIN, *arguments.split())
    assert re.search(message, errors, re.DOTALL), errors


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("problem: networks:problem\nno_such_option: 3\n", "'no_such_option' is not accepted"),
        ("schwarz:\n  overlap: many\n", "overlap.*many"),
        ("epochs: [1\n", "config: 'bad.yaml': it is no YAML"),
    ],
)
def test_bad_configuration_file(world, capfd, directory, text, message):
    (directory / "bad.yaml").write_text(text)
    assert re.search(message, refused(world, capfd, directory, "--config", "bad.yaml"), re.DOTALL)


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_device_that_is_not_there(world, capfd, directory, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    errors = refused(world, capfd, directory, *PLAIN, "--device=cuda")
    assert "device: 'cuda' was asked for, but torch finds no GPU here; give --device cpu or auto" in errors


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_directory_that_holds_a_run(world, capfd, directory):
    main([*PLAIN, "--run-dir", "run"])
    before = (directory / "run" / "history.jsonl").read_text() if world.rank == 0 else ""
    errors = refused(world, capfd, directory, *PLAIN, "--run-dir", "run")
    assert "run_dir: 'run' already holds a run" in errors and "--overwrite" in errors
    assert world.rank > 0 or (directory / "run" / "history.jsonl").read_text() == before


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_directory_that_cannot_be_made(world, capfd, directory):
    (directory / "file").write_text("")
    assert "run_dir: 'file/run' cannot be written" in refused(world, capfd, directory, *PLAIN, "--run-dir=file/run")


def write_idx(path, array):
    header = struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "has no t10k-labels-idx1-ubyte"),
        ("truncated", "train-images-idx3-ubyte is truncated: its header announces"),
        ("mislabelled", "should hold labels but holds images"),
        ("uneven", "20 images .* 19 labels"),
    ],
)
def test_broken_data_files(world, capfd, directory, fault, message):
    data = directory / "data"
    data.mkdir()
    generator = np.random.default_rng(0)
    for name, count in (("train", 20), ("t10k", 10)):
        write_idx(data / f"{name}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28)))
        write_idx(data / f"{name}-labels-idx1-ubyte", generator.integers(0, 10, count))
    images, labels = data / "train-images-idx3-ubyte", data / "train-labels-idx1-ubyte"
    if fault == "missing":
        (data / "t10k-labels-idx1-ubyte").unlink()
    elif fault == "truncated":
        images.write_bytes(images.read_bytes()[:-5])
    elif fault == "mislabelled":
        labels.write_bytes(images.read_bytes())
    else:
        write_idx(labels, generator.integers(0, 10, 19))
    errors = refused(world, capfd, directory, "--problem=fashion-mnist", "--data-dir=data")
    assert re.search(message, errors, re.DOTALL), errors


def half():
    network = classifier().half()
    return network, cross_entropy, (classified(8)[0].half(), classified(8)[1])


def uneven():
    return classifier().float(), cross_entropy, (torch.zeros(4, 10), torch.zeros(5, dtype=torch.int64))


def no_tuple():
    return classifier()


def on_one_rank():
    if MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
        raise RuntimeError("no data here")
    return classifier(), cross_entropy, classified(60)


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half", "torch.float16 is not allowed; convert the network to torch.float32 or torch.float64"),
        ("uneven", "'4 inputs and 5 targets' is not allowed; give one target for each input"),
        ("no_tuple", "the function returned Sequential"),
        ("on_one_rank", "the function raised RuntimeError: no data here"),
    ],
)
def test_bad_problems_of_the_users(world, capfd, directory, name, message):
    errors = refused(world, capfd, directory, "--problem", f"test_train:{name}")
    assert message in errors, errors
    assert name != "on_one_rank" or world.size == 1 or f"error: rank {world.size - 1}: --problem" in errors


# The parser, on its own.


@pytest.mark.parametrize(
    ("arguments", "spelled"),
    [
        ("--batch-size 3", "--batch_size 3"),
        ("--batch-size=3-4", "--batch_size=3-4"),
        ("--trust-region.initial-radius 1e-3", "--trust_region.initial_radius 1e-3"),
        ("--global-step first-order", "--global_step.model first-order"),
        ("--global_step.model first-order", "--global_step.model first-order"),
        ("--coarse=none", "--coarse.model=none"),
        ("--monitor --view", "--monitor=true --view=true"),
        ("--overwrite false", "--overwrite false"),
        ("--learning-rate -1", "--learning_rate -1"),
        ("-h", "-h"),
    ],
)
def test_spelling_of_options(arguments, spelled):
    assert spell(arguments.split()) == spelled.split()


def test_options_of_all_kinds():
    options, _ = parse(
        "--epochs null --overwrite --trust-region.initial_radius null --learning-rate 1e-2 --schwarz.overlap 2 "
        "--global-step first-order --coarse none --coarse.columns [correction] --max-iterations 7".split()
    )
    assert options.epochs is None and options.overwrite and options.max_iterations == 7
    assert options.trust_region.initial_radius is None and options.learning_rate == 0.01
    assert options.schwarz.overlap == 2 and options.global_step.model == "first-order"
    assert options.coarse.model == "none" and tuple(options.coarse.columns) == ("correction",)


def test_every_option_has_a_help_text():
    for action in make_parser()._actions:
        assert action.help, action.dest


def test_configuration_names_neither_directory_nor_overwriting():
    """Else the same run again would replace the first."""
    options, text = parse(["--run-dir", "here", "--overwrite", "--trust-region.max-radius", "1e3"])
    assert (options.run_dir, options.overwrite) == ("here", True)
    assert "here" not in text and "overwrite: false" in text and "max_radius: 1000.0" in text
