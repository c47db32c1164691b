"""Optimizers of other packages: as their authors have them, evaluated where they say, and resumed bit by bit."""

import json
import math
from pathlib import Path

import pytest
import pytorch_optimizer as peers
import torch
from hidden import hide
from mpi4py import MPI
from networks import classified, classifier, cross_entropy, flat
from processes import PROBLEM, SMALL
from run_files import arrays, history
from torch import nn

import apts_mpi.train.peers
from apts_mpi import InvalidInput
from apts_mpi.checkpoint import Checkpoint, resolve
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.train.baselines import DataParallel
from apts_mpi.train.optimizers import OPTIMIZERS, hidden_matrices
from apts_mpi.train.options import PEERS, BaselineOptions, Optimizer, TrainingOptions
from apts_mpi.train.progress import Progress, share_of_steps, share_of_time
from apts_mpi.train.schedules import constant, cosine, warm_up, warm_up_and_cosine

RATE = 0.02

# At 0, within the warm-up of a twentieth, and later.
SHARES = (0.0, 0.025, 0.05, 0.3, 0.525, 1.0)

# The same, worked out by hand.
RISE = (0.01, 0.505, 1.0, 1.0, 1.0, 1.0)
FALL = tuple(0.5 * (1.0 + math.cos(math.pi * share)) for share in SHARES)
RISE_AND_FALL = (0.01, 0.505, 1.0, *(0.5 * (1.0 + math.cos(math.pi * place)) for place in (0.25 / 0.95, 0.5, 1.0)))


def groups_of_muon(network):
    hidden = [layer.weight for layer in network if isinstance(layer, nn.Linear)][:-1]
    others = [own for own in network.parameters() if all(own is not weight for weight in hidden)]
    return [
        {"params": hidden, "lr": RATE, "use_muon": True},
        {"params": others, "lr": RATE * 3e-4 / 2e-2, "use_muon": False},
    ]


BY_HAND = {
    "adamw-cosine": (lambda network: torch.optim.AdamW(network.parameters(), lr=RATE), RISE_AND_FALL),
    "schedule-free": (lambda network: peers.ScheduleFreeAdamW(network.parameters(), lr=RATE), RISE),
    "muon": (lambda network: peers.Muon(groups_of_muon(network)), RISE_AND_FALL),
    "soap": (lambda network: peers.SOAP(network.parameters(), lr=RATE), RISE_AND_FALL),
    "prodigy": (lambda network: peers.Prodigy(network.parameters(), lr=RATE), FALL),
}


def by_hand(network, optimizer, factors, data, steps):
    """A plain loop with a schedule; the losses before each step."""
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for factor, rows in zip(factors, steps, strict=True):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.zero_grad()
        loss = cross_entropy(network(data[0][rows]), data[1][rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def make(comm, name, network=None, rate=RATE):
    options = BaselineOptions(optimizer=name, learning_rate=rate)
    return DataParallel(network or classifier(), cross_entropy, comm=comm, options=options)


@pytest.mark.mpi
@pytest.mark.parametrize("name", BY_HAND)
def test_optimizer_is_that_of_a_plain_loop_with_its_schedule(world, name):
    data, steps = classified(), [torch.arange(start, 121, 2 + start) for start in range(len(SHARES))]
    network, other = classifier(), classifier()
    solver = make(world, name, network)
    found = [solver.step(data, rows, share).loss for rows, share in zip(steps, SHARES, strict=True)]
    assert world.bcast(found) == found
    optimizer, factors = BY_HAND[name]
    optimizer = optimizer(other)
    expected = by_hand(other, optimizer, factors, data, steps)
    # On one rank the gradients have the same bits. Sums over ranks round otherwise, which Muon's updates in bfloat16
    # magnify, and SOAP's eigenvectors of matrices of low rank still more: there the losses alone can be compared.
    tolerance = {"muon": 5e-3, "soap": 1e-2}.get(name, 1e-11) if world.size > 1 else 1e-11
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance)
    if name != "soap" or world.size == 1:
        own = (flat(each.parameters()) for each in (network, other))
        torch.testing.assert_close(*own, rtol=tolerance, atol=tolerance)
    if name == "schedule-free":
        training = flat(network.parameters())
        optimizer.eval()
        solver.to_evaluated_point()
        assert not torch.equal(flat(network.parameters()), training)
        torch.testing.assert_close(flat(network.parameters()), flat(other.parameters()), rtol=1e-12, atol=1e-12)


def test_going_to_the_average_and_back_changes_no_bit(comm_self):
    data = classified()
    solvers = [make(comm_self, "schedule-free") for _ in range(2)]
    for _ in range(4):
        results = [solver.step(data, None, 0.5).loss for solver in solvers]
        assert results[0] == results[1]
        solvers[0].to_evaluated_point()
        solvers[0].to_evaluated_point()
    solvers[1].to_evaluated_point()
    assert torch.equal(*(solver.vector.values for solver in solvers))


@pytest.fixture
def comm_self():
    return MPI.COMM_SELF


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [(constant, (1.0,) * 6), (warm_up, RISE), (cosine, FALL), (warm_up_and_cosine, RISE_AND_FALL)],
    ids=["constant", "warm-up", "cosine", "both"],
)
def test_schedules(schedule, factors):
    assert [schedule(share) for share in SHARES] == pytest.approx(factors)
    # A run may be a little longer than its limit.
    assert schedule(1.1) == pytest.approx(factors[-1])


def test_share_of_a_run():
    half = Progress(epoch=2, batch=5, iteration=15, seconds=3.0, cpu_seconds=2.0)
    assert share_of_steps(half, 3, 10) == 0.5
    assert share_of_time(TrainingOptions(), half) == 0.0
    assert share_of_time(TrainingOptions(max_seconds=30.0, max_cpu_seconds=8.0), half) == 0.25


def test_hidden_matrices():
    """Neither biases nor embeddings nor the last layer; what has more dimensions is one."""
    network = nn.ModuleList([nn.Embedding(5, 4), nn.Conv1d(2, 3, 3), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 2)])
    vector = FlatParameters(network)
    named = zip(vector.entries, hidden_matrices(vector), strict=True)
    assert [entry.name for entry, is_hidden in named if is_hidden] == ["1.weight", "3.weight"]


@pytest.mark.parametrize("name", BY_HAND)
def test_description_has_the_settings(comm_self, name):
    assert "lr: 0.125" in make(comm_self, name, rate=0.125).describe()


@pytest.mark.mpi
def test_muon_without_a_hidden_matrix_is_refused(world):
    with pytest.raises(InvalidInput, match="optimizer: 'muon' needs a hidden matrix"):
        make(world, "muon", nn.Linear(10, 3).double())


def test_the_table_has_all_names():
    assert set(OPTIMIZERS) | {"apts"} == set(Optimizer.__args__)
    assert set(PEERS) < set(OPTIMIZERS)


# Runs.


@pytest.mark.parametrize("name", BY_HAND)
def test_resumed_in_the_middle_of_an_epoch(directory, trained, name):
    """With metrics and checkpoints between, which look at the network elsewhere than where it is trained."""
    baseline = [*SMALL, "--epochs=4", f"--optimizer={name}", "--checkpoint-every=1", "--checkpoint-keep-last=9"]
    trained(*baseline, "--run-dir=whole")
    whole = directory / "whole"
    for step in (1, 5):
        path = whole / "checkpoints" / f"step-{step:08d}.h5"
        run = directory / f"from{step}"
        trained(PROBLEM, f"--resume={path}", f"--run-dir={run}")
        assert history(run) == history(whole)
        assert arrays(run) == arrays(whole)


@pytest.mark.mpi
@pytest.mark.parametrize("name", BY_HAND)
def test_run_on_any_ranks_and_on_others(world, directory, trained, trained_on, name):
    """Records of one rank and of all agree, and a run goes on on other ranks."""
    baseline = [*SMALL, "--epochs=2", f"--optimizer={name}"]
    trained_on(1, *baseline, "--run-dir=one")
    trained(*baseline, "--run-dir=all")
    trained(*baseline, "--run-dir=one", "--resume", "--epochs=3")
    if world.rank == 0:
        losses = [
            [record["train_loss"] for record in history(Path(run)) if "train_loss" in record] for run in ("one", "all")
        ]
        # See above; after more steps.
        assert losses[0][:2] == pytest.approx(losses[1], rel={"muon": 2e-2, "soap": 1e-3}.get(name, 1e-8))
        assert len(losses[0]) == 3


def test_records_and_checkpoints_are_of_the_average(directory, trained, comm_self):
    """The losses of the epochs are those of the saved network, which is the average of where it was trained."""
    trained(*SMALL, "--epochs=2", "--optimizer=schedule-free", "--run-dir=run", "--learning-rate=0.05")
    with Checkpoint(resolve(directory / "run" / "checkpoints")) as checkpoint:
        network = classifier()
        for name, own in network.named_parameters():
            own.data.copy_(torch.from_numpy(checkpoint.read(f"parameters/{name}")))
        left = torch.from_numpy(checkpoint.read("optimizer/left"))
        z = torch.from_numpy(checkpoint.read("optimizer/parameters/0/z"))
    inputs, targets = classified(60)
    last = history(directory / "run")[-1]
    assert last["train_loss"] == pytest.approx(cross_entropy(network(inputs), targets).item(), rel=1e-6)
    # y = 0.1 z + 0.9 x
    torch.testing.assert_close(left, 0.1 * z + 0.9 * flat(network.parameters()).to(left), rtol=1e-5, atol=1e-6)


def normed():
    """A problem with batch normalisation."""
    data = [(inputs.float(), targets) for inputs, targets in (classified(60), classified(30, seed=2))]
    return classifier(batch_norm=True).float(), cross_entropy, tuple(data)


def test_running_statistics_beside_an_average_are_told(trained):
    run = ["--problem=test_peers:normed", "--max-iterations=2", "--device=cpu", "--run-dir=run"]
    words = "note: optimizer: the running statistics of the network are those of the points where it is trained"
    assert words in trained(*run, "--optimizer=schedule-free")
    assert words in trained(*run, "--resume", "--max-iterations=3")
    assert words not in trained(*run, "--optimizer=soap", "--overwrite")


@pytest.mark.mpi
@pytest.mark.parametrize("name", PEERS)
def test_missing_package_is_told_before_work_starts(world, directory, command, monkeypatch, name):
    hide(monkeypatch, apts_mpi.train.peers.PACKAGE)
    status, _, errors = command(PROBLEM, f"--optimizer={name}", "--run-dir=run")
    assert status == 2 and not (directory / "run").exists()
    if world.rank == 0:
        assert errors.count("\n") == 1
        assert f"optimizer: '{name}' is not allowed" in errors and "pip install apts_mpi[compare]" in errors
    else:
        assert errors == ""


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["apts", "adamw-cosine"])
def test_limit_of_processor_seconds(world, trained, directory, name):
    run = [*SMALL, f"--optimizer={name}", "--epochs=1000000", "--run-dir=run"]
    trained(*run, "--max-cpu-seconds=0.3")
    trained(*run, "--max-cpu-seconds=0.4", "--resume")
    if world.rank == 0:
        ends = [record["cpu_seconds"] for record in history_with_times(directory / "run")]
        assert ends == sorted(ends) and 0.4 <= ends[-1] < 2.0


def history_with_times(path):
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
