"""``--average``: an exponential average of the iterates, measured, saved, resumed and exported."""

import json

import pytest
import torch
from networks import problem
from torch import nn

from apts_mpi.checkpoint import Checkpoint
from apts_mpi.checkpoint.__main__ import main as checkpoint_command
from apts_mpi.train.average import Average

PROBLEM = "--problem=networks:problem"
COMMON = f"{PROBLEM} --dtype=float64 --device=cpu --batch-size=30 --average=0.8 --subdomains=2".split()
REPLICATED = [*COMMON, *"--local.solver=sgd --schwarz.variant=exact --schwarz.local_data=shard --coarse=none".split()]
STAGED = [*COMMON, *"--layout=staged --micro-batches=2 --local.solver=sgd".split()]
BASELINE = [*COMMON, "--optimizer=adam", "--learning-rate=1e-2"]
ALL = pytest.mark.parametrize("arguments", [REPLICATED, STAGED, BASELINE], ids=["replicated", "staged", "adam"])


def arrays_of(path, prefix="average/"):
    with Checkpoint(path) as checkpoint:
        return {
            name.removeprefix(prefix): torch.from_numpy(checkpoint.read(name))
            for name in checkpoint.names
            if name.startswith(prefix)
        }


def epochs_of(path):
    records = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in record.items() if "seconds" not in name}
        for record in records
        if "train_loss" in record
    ]


class Masked(nn.Module):
    """A parameter, running statistics, a count, and a mask."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.tied = self.weight
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))


def test_it_is_the_weighted_mean_of_the_iterates():
    network = Masked()
    average = Average(network, 0.7, lambda tensors: [])
    points = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for number, point in enumerate(points, 1):
        network.weight.data.copy_(point)
        network.mean.copy_(2.0 * point)
        network.count += 1
        average.follow()
        weights = 0.7 ** torch.arange(number - 1, -1, -1, dtype=torch.float64) * 0.3 / (1.0 - 0.7**number)
        expected = weights @ points[:number]
        torch.testing.assert_close(average.tensors["parameters/weight"], expected, rtol=1e-14, atol=1e-15)
        torch.testing.assert_close(average.tensors["buffers/mean"], 2.0 * expected, rtol=1e-14, atol=1e-15)
        assert average.tensors["buffers/count"] == number
    assert torch.equal(average.tensors["buffers/mask"], network.mask)
    version = network.weight._version
    with average.in_network():
        torch.testing.assert_close(network.weight.detach(), expected, rtol=1e-14, atol=1e-15)
        assert network.count == 5
    assert torch.equal(network.weight.detach(), points[-1]) and network.weight._version == version
    torch.testing.assert_close(average.tensors["parameters/tied"], expected, rtol=1e-14, atol=1e-15)


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@ALL
def test_it_is_that_of_the_accepted_iterates_and_changes_no_run(world, directory, trained, monkeypatch, arguments):
    """By the checkpoints of all iterations; the run itself has the bits that it has without."""
    every = "--epochs=2 --checkpoint-every=1 --checkpoint-keep-last=99".split()
    trained(*arguments, *every, "--run-dir=run")
    trained(*(option for option in arguments if "average" not in option), "--epochs=2", "--run-dir=without")
    if world.rank > 0:
        return
    checkpoints = sorted((directory / "run" / "checkpoints").glob("step-*.h5"))
    records = [json.loads(line) for line in (directory / "run" / "history.jsonl").read_text().splitlines()]
    accepted = [record["accepted"] for record in records if "accepted" in record]
    assert len(checkpoints) == len(accepted) >= 4 and sum(accepted) >= 2
    points = [arrays_of(path, "parameters/") for path, taken in zip(checkpoints, accepted, strict=True) if taken]
    count = len(points)
    found = arrays_of(checkpoints[-1], "average/parameters/")
    assert set(found) == set(points[-1])
    for name, average in found.items():
        expected = sum(0.8 ** (count - 1 - place) * point[name] for place, point in enumerate(points))
        torch.testing.assert_close(average, 0.2 / (1.0 - 0.8**count) * expected, rtol=1e-12, atol=1e-14)
    last = arrays_of(directory / "without" / "checkpoints" / "latest", "parameters/")
    assert all(torch.equal(last[name], value) for name, value in points[-1].items() if accepted[-1])
    plain, averaged = epochs_of(directory / "without"), epochs_of(directory / "run")
    assert [{**record, **own} for record, own in zip(averaged, plain, strict=True)] == averaged
    # What is exported is what was measured.
    with pytest.raises(SystemExit) as ended:
        checkpoint_command(["to-torch", "--average", str(directory / "run" / "checkpoints"), str(directory / "a.pt")])
    assert ended.value.code == 0
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.float64)
    network, loss, (_, (inputs, targets)) = problem()
    network.load_state_dict(torch.load(directory / "a.pt", weights_only=True))
    with torch.no_grad():
        value = float(loss(network.eval()(inputs), targets))
    assert averaged[-1]["average_test_loss"] == pytest.approx(value, rel=1e-12)


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
@ALL
def test_resumed_average_has_the_same_bits(world, directory, trained, arguments):
    trained(*arguments, "--epochs=3", "--run-dir=whole")
    trained(*arguments, "--epochs=3", "--run-dir=parts", "--max-iterations=3")
    trained(PROBLEM, "--resume", "--run-dir=parts", "--max-iterations=100")
    if world.rank == 0:
        whole, parts = (arrays_of(directory / run / "checkpoints" / "latest") for run in ("whole", "parts"))
        assert set(whole) == set(parts) and len(whole) > 2
        assert all(torch.equal(whole[name], parts[name]) for name in whole)
        assert epochs_of(directory / "whole") == epochs_of(directory / "parts")


@pytest.mark.mpi(min_size=2)
@pytest.mark.usefixtures("few_ranks")
def test_other_ranks_and_the_other_layout_take_it_over(world, directory, trained, trained_on):
    full = "--schwarz.variant=inexact --schwarz.local_data=full --local.solver=sgd --coarse=none".split()
    trained_on(1, *COMMON, *full, "--epochs=1", "--run-dir=first")
    for run, options in (("two", []), ("staged", ["--layout=staged", "--micro-batches=2"])):
        trained(PROBLEM, "--resume=first", f"--run-dir={run}", "--epochs=2", *options)
    trained_on(1, PROBLEM, "--resume=first", "--run-dir=one", "--epochs=2")
    if world.rank == 0:
        one, *others = (arrays_of(directory / run / "checkpoints" / "latest") for run in ("one", "two", "staged"))
        for other in others:
            assert set(other) == set(one)
            for name, value in one.items():
                torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-12)


def test_begun_and_ended_later(directory, trained):
    plain = [option for option in REPLICATED if "average" not in option]
    trained(*plain, "--epochs=1", "--run-dir=first")
    output = trained(PROBLEM, "--resume=first", "--run-dir=second", "--epochs=2", "--average=0.5")
    assert "note: average: the checkpoint has none, so it begins with the steps that follow" in output
    with Checkpoint(directory / "second" / "checkpoints" / "latest") as checkpoint:
        assert 0 < checkpoint.metadata["average"]["steps"] <= checkpoint.step - 2
    output = trained(PROBLEM, "--resume=second", "--run-dir=third", "--epochs=3", "--average=null")
    assert "note: average: the one of the checkpoint ends here" in output
    assert not arrays_of(directory / "third" / "checkpoints" / "latest")


def test_what_is_no_average_is_refused(directory, trained, capfd):
    trained(*(option for option in REPLICATED if "average" not in option), "--epochs=1", "--run-dir=run")
    with pytest.raises(SystemExit) as ended:
        checkpoint_command(["to-torch", "--average", "run/checkpoints", "a.pt"])
    assert ended.value.code == 2 and "has no average" in capfd.readouterr().err
