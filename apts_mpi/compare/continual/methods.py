"""The methods: each learns a sequence with one value of what is tuned of it, and says how well."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from apts_mpi.compare.continual.penalties import Diagonal, Kronecker, NoPenalty, Penalty
from apts_mpi.errors import InvalidInput
from apts_mpi.objective.mean_loss import MeanLoss
from apts_mpi.problems import build
from apts_mpi.records.reading import read_summary
from apts_mpi.tools.jobs import failure_in
from apts_mpi.train.batches import order_of
from apts_mpi.train.recovery import accuracy_of, iterations_to_recover
from apts_mpi.train.replay import replayed, stored

# Step size of Adam for all methods but the trust region, which has none.
RATE = 1e-3


@dataclass(frozen=True)
class Sequence:
    """What is learnt.

    Attributes
    ----------
    problem
        Of tasks.
    seed
        Of network, batches and stored samples.
    replay
        Stored samples of each earlier task, for the methods that have some.
    epochs, train_samples
        Of each task; None: the problem's own.
    """

    problem: str
    seed: int
    replay: int
    epochs: int | None = None
    train_samples: int | None = None


@dataclass(frozen=True)
class Score:
    """How well a sequence was learnt.

    Attributes
    ----------
    accuracy, forgetting, recovery
        At its end: held-out accuracy in the mean over all tasks; of the earlier ones what was lost since they were
        learnt, and the iterations to get 95 % of that back, in the mean.
    """

    accuracy: float
    forgetting: float
    recovery: float


def by_adam(sequence: Sequence, penalty: Penalty, replay: int) -> Score:
    """Learn by Adam, with a penalty or without, and with stored samples or without."""
    seed = sequence.seed
    problem = build(sequence.problem, train_samples=sequence.train_samples, seed=seed)
    if not problem.tasks:
        raise InvalidInput(f"problem: {problem.name} has no tasks; choose permuted-digits or split-fashion-mnist")
    network, samples = problem.network, len(problem.train[0])
    size, epochs = min(problem.batch_size or samples, samples), sequence.epochs or problem.epochs
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    loss = MeanLoss(problem.loss)
    learnt = []
    for number, task in enumerate(problem.tasks):
        store = stored(problem.tasks[:number], replay, seed) if number and replay else None
        for epoch in range(number * epochs + 1, (number + 1) * epochs + 1):
            for place, rows in enumerate(order_of(problem).batches(samples, size, seed, epoch)):
                inputs, targets = task.train[0][rows], task.train[1][rows]
                if store is not None:
                    joining = replayed(len(store[0]), size, seed, epoch, place)
                    inputs, targets = torch.cat([inputs, store[0][joining]]), torch.cat([targets, store[1][joining]])
                network.train()
                optimizer.zero_grad()
                (loss(network(inputs), targets) + penalty.value(network)).backward()
                optimizer.step()
        learnt.append(accuracy_of(network, task.test))
        penalty.remember(network, loss, *task.train)
    final = [accuracy_of(network, task.test) for task in problem.tasks]
    earlier = list(zip(problem.tasks, learnt, final, strict=True))[:-1]
    recovery = [iterations_to_recover(network, problem.loss, task, was, size, seed) for task, was, _ in earlier]
    lost = [was - now for _, was, now in earlier]
    return Score(sum(final) / len(final), sum(lost) / len(lost), sum(recovery) / len(recovery))


def by_trust_region(sequence: Sequence, radius: float, path: Path) -> Score:
    """Learn by ``apts_mpi.train`` with the Fisher metric, in a process of its own with its records in ``path``."""
    options = {
        "problem": sequence.problem,
        "seed": sequence.seed,
        "replay": sequence.replay,
        "epochs": sequence.epochs,
        "train-samples": sequence.train_samples,
        "trust-region.metric": "fisher",
        "trust-region.metric-radius": radius,
        "run-dir": path,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    path.parent.mkdir(parents=True, exist_ok=True)
    output = path.parent / f"{path.name}.txt"
    with output.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "apts_mpi.train", *given, "--overwrite", "--checkpoint-every=null"]
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    summary = read_summary(path) if status == 0 else None
    if summary is None:
        raise InvalidInput(f"problem: {sequence.problem} was not learnt: {failure_in(output)}")
    return Score(summary["mean_accuracy"], summary["forgetting"], summary["mean_recovery"])


@dataclass(frozen=True)
class Method:
    """A method of the table.

    Attributes
    ----------
    label
        What it is called there.
    tuned
        What of it is tuned, empty for nothing.
    grid
        The values that are tried, on the first seed.
    learn
        Function of the sequence, a value and a directory.
    """

    label: str
    tuned: str
    grid: tuple[float, ...]
    learn: Callable[[Sequence, float, Path], Score]


METHODS: Mapping[str, Method] = {
    "plain": Method("plain", "", (0.0,), lambda own, _, path: by_adam(own, NoPenalty(), 0)),
    "replay": Method("replay alone", "", (0.0,), lambda own, _, path: by_adam(own, NoPenalty(), own.replay)),
    "ewc": Method(
        "EWC, diagonal", "weight", (1.0, 10.0, 100.0, 1000.0), lambda own, value, path: by_adam(own, Diagonal(value), 0)
    ),
    "ewc-kronecker": Method(
        "EWC, Kronecker",
        "weight",
        (0.1, 1.0, 10.0, 100.0, 1000.0),
        lambda own, value, path: by_adam(own, Kronecker(value), 0),
    ),
    "fisher": Method("trust region, Fisher metric and replay", "radius", (0.02, 0.05, 0.1, 0.2), by_trust_region),
}


def learnt(name: str, sequence: Sequence, value: float, directory: Path) -> Score:
    """What a method comes to; one that is finished is read from ``directory``.

    Raises
    ------
    InvalidInput
        If that was of other options.
    """
    path = directory / f"{name}-{value:g}-seed-{sequence.seed}"
    kept = path.with_name(path.name + ".json")
    if not kept.exists():
        score = METHODS[name].learn(sequence, value, path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"of": vars(sequence), "score": vars(score)}), encoding="utf-8")
    found = json.loads(kept.read_text(encoding="utf-8"))
    if found["of"] != vars(sequence):
        raise InvalidInput(
            f"out: {str(kept)!r} is of other options ({found['of']}, now {vars(sequence)}); give another --out"
        )
    return Score(**found["score"])
