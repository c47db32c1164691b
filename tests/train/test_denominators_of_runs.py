"""Runs with losses that have a denominator of their own, or take samples together: metrics, resumption, optimizers."""

import json

import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier
from torch import nn

import apts_mpi.train.metrics
from apts_mpi import losses
from apts_mpi.problems import Problem, build
from apts_mpi.train.layouts import build_staged_problem, train_problem
from apts_mpi.train.parser import parse

F = nn.functional
CHOSEN = "--dtype=float64 --device=cpu --epochs=2 --batch-size=30 --noise=none".split()


def sets():
    """Samples with targets that do not count, unevenly: all in the second half of the training samples but the last."""
    found = []
    for samples, seed in ((90, 1), (41, 2)):
        inputs, targets = classified(samples, seed)
        targets[samples // 2 : -1] = -100
        found.append((inputs, targets))
    return tuple(found)


def padded():
    return classifier(), F.cross_entropy, sets()


def weighted():
    weights = torch.tensor([1.0, 5.0, 20.0], dtype=torch.float64)
    return classifier(), nn.CrossEntropyLoss(weight=weights, ignore_index=-100), sets()


def own(outputs, targets):
    each = F.cross_entropy(outputs, targets, reduction="none", ignore_index=-100)
    return each.sum(), (targets != -100).sum()


def own_pairs():
    return classifier(), own, sets()


def pairs_told_apart(outputs, targets):
    """Mean over pairs of neighbours of a loss of both."""
    first, second = outputs[::2], outputs[1::2]
    return ((first * second).sum(dim=1) - 0.3).square().mean()


def in_pairs():
    train, test = ((inputs[:count], targets[:count]) for (inputs, targets), count in zip(sets(), (90, 40), strict=True))
    return Problem(name="pairs", network=classifier(), loss=pairs_told_apart, train=train, test=test, group_size=2)


def root(outputs, targets):
    return F.cross_entropy(outputs, targets.clamp_min(0)).sqrt()


def together():
    train, test = sets()
    return Problem(name="root", network=classifier(), loss=root, train=train, test=test, coupled=True)


# What torch makes of all samples.
RIGHT = {
    "padded": F.cross_entropy,
    "weighted": lambda outputs, targets: weighted()[1](outputs, targets),
    "own_pairs": lambda outputs, targets: own(outputs, targets)[0] / own(outputs, targets)[1],
    "in_pairs": pairs_told_apart,
    "together": root,
}


@pytest.mark.mpi
@pytest.mark.all_sizes(optimizer="apts")
@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("optimizer", ["apts", "adam"])
def test_metrics_are_those_of_all_samples(world, name, optimizer, monkeypatch):
    """In pieces of which some have nothing that counts."""
    monkeypatch.setattr(apts_mpi.train.metrics, "PIECE", 6)
    options, _ = parse([f"--problem=test_denominators_of_runs:{name}", *CHOSEN, f"--optimizer={optimizer}"])
    problem = build(options.problem, seed=0, dtype=torch.float64)
    training = train_problem(problem, options, torch.device("cpu"), world)
    metrics = training.run(lambda record: None)
    network = problem.network
    for part, (inputs, targets) in (("train", problem.train), ("test", problem.test)):
        outputs = network(inputs).detach()
        assert metrics[f"{part}_loss"] == pytest.approx(float(RIGHT[name](outputs, targets)), rel=1e-12)
        if problem.accuracy:
            hits = (outputs.argmax(1) == targets)[targets != -100].double().mean()
            assert metrics[f"{part}_accuracy"] == pytest.approx(float(hits), rel=1e-12)


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("name", RIGHT)
def test_metrics_of_stages(world, name, monkeypatch):
    monkeypatch.setattr(apts_mpi.train.metrics, "PIECE", 6)
    micro_batches = 1 if name == "together" else 2
    chosen = ["--layout=staged", f"--pipeline.micro_batches={micro_batches}", "--stall-timeout=60"]
    if world.size == 8:
        pytest.skip("six layers are not eight stages")
    chosen += ["--replicas=2"] if world.size == 4 else []
    options, _ = parse([f"--problem=test_denominators_of_runs:{name}", *CHOSEN, *chosen])

    def make(**wanted):
        return build(options.problem, seed=0, dtype=torch.float64, **wanted)

    problem = build_staged_problem(make, options, world)
    network = build(options.problem, seed=0, dtype=torch.float64)
    training = train_problem(problem, options, torch.device("cpu"), world)
    before = training.metrics()
    for part, (inputs, targets) in (("train", network.train), ("test", network.test)):
        right = float(RIGHT[name](network.network(inputs).detach(), targets))
        assert before[f"{part}_loss"] == pytest.approx(right, rel=1e-12)
    assert training.run(lambda record: None)["train_loss"] < before["train_loss"]


def classes_in_pairs():
    """Classes, whose pairs leave one of the test samples over."""
    train, test = (classified(samples, seed) for samples, seed in ((90, 1), (41, 2)))
    return Problem(
        name="pairs", network=classifier(), loss=pairs_told_apart, train=train, test=test, group_size=2, accuracy=True
    )


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_the_accuracy_of_whole_groups_can_stop_a_run(world, directory, trained):
    named = "--problem=test_denominators_of_runs:classes_in_pairs"
    trained(named, *CHOSEN, "--stop-on=test_accuracy", "--run-dir=run")
    if world.rank == 0:
        lines = (directory / "run" / "history.jsonl").read_text().splitlines()
        (*_, last) = map(json.loads, lines)
        assert 0.0 <= last["test_accuracy"] <= 1.0 and round(40 * last["test_accuracy"], 9) % 1 == 0


def history(directory, run):
    lines = (directory / run / "history.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize("name", RIGHT)
def test_an_interrupted_run_goes_on_to_the_bit(world, directory, trained, name):
    """Also on a batch that was rejected, whose denominator is found anew."""
    chosen = [f"--problem=test_denominators_of_runs:{name}", *CHOSEN, "--trust-region.initial_radius=50"]
    trained(*chosen, "--max-iterations=5", "--run-dir=whole")
    for last in (1, 3):
        trained(*chosen, f"--max-iterations={last}", f"--run-dir=parts{last}")
        trained(chosen[0], "--resume", f"--run-dir=parts{last}", "--max-iterations=5")
    if world.rank == 0:
        whole = history(directory, "whole")
        assert history(directory, "parts1") == history(directory, "parts3") == whole


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_the_view_tells_of_it(world, trained):
    told = trained("--problem=test_denominators_of_runs:padded", *CHOSEN, "--view", "--max-iterations=1")
    if world.rank == 0:
        assert "loss: cross_entropy, as a sum and its count: CrossEntropy(weight=None" in told


@pytest.mark.mpi
def test_batches_are_whole_groups(world, command):
    status, _, told = command("--problem=test_denominators_of_runs:in_pairs", *CHOSEN, "--batch-size=31")
    assert status != 0
    assert world.rank > 0 or "batch_size: 31 of 90 samples are no whole numbers of groups of 2" in told


def test_groups_are_shuffled_together():
    options, _ = parse(["--problem=test_denominators_of_runs:in_pairs", *CHOSEN])
    training = train_problem(in_pairs(), options, torch.device("cpu"), MPI.COMM_SELF)
    _, rows = training._data.batch(1, 0)
    assert len(rows) == 30 and torch.equal(rows[1::2], rows[::2] + 1) and bool((rows[::2] % 2 == 0).all())
    assert rows.tolist() != sorted(rows.tolist())


def test_a_ready_made_loss_of_a_problem():
    problem = Problem(name="p", network=classifier(), loss=losses.cross_entropy(), train=sets()[0])
    options, _ = parse([*CHOSEN])
    metrics = train_problem(problem, options, torch.device("cpu"), MPI.COMM_SELF).metrics()
    expected = float(F.cross_entropy(problem.network(problem.train[0]).detach(), problem.train[1]))
    assert metrics["train_loss"] == pytest.approx(expected, rel=1e-12)
