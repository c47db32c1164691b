"""The training command on problems whose samples are trees of tensors."""

import json

import numpy as np
import pytest
import torch
from run_files import arrays, history
from torch import nn
from tree_networks import convex, make_two_inputs, problem, two_inputs

from apts_mpi.checkpoint import Checkpoint, resolve
from apts_mpi.errors import InvalidInput
from apts_mpi.problems import Problem, build
from apts_mpi.problems.finite import check_finite

SHARED = "--dtype=float64 --device=cpu --batch-size=20 --epochs=3".split()


@pytest.mark.mpi
@pytest.mark.all_sizes(arguments=["--problem=tree_networks:problem"])
@pytest.mark.parametrize(
    "arguments",
    [
        ["--problem=tree_networks:problem"],
        ["--problem=tree_networks:problem", "--optimizer=adam"],
        ["--problem=tree_networks:problem", "--train-samples=41"],
        ["--problem=tree_networks:sequence", "--layout=staged", "--micro-batches=2"],
        ["--problem=tree_networks:sequence", "--layout=staged", "--micro-batches=2", "--balance=cost"],
    ],
)
def test_a_run_and_its_metrics(world, trained, directory, arguments):
    trained(*arguments, *SHARED, "--run-dir=run")
    summary = json.loads((directory / "run" / "summary.json").read_text())
    losses = [line["train_loss"] for line in history(directory / "run") if "train_loss" in line]
    assert summary["targets_per_sample"] == 2
    assert losses[-1] == summary["train_loss"] < losses[0]
    assert summary["test_loss"] > 0.0 and "train_accuracy" not in summary


@pytest.mark.mpi
def test_metrics_are_those_of_the_whole_data(world, trained, directory):
    trained("--problem=tree_networks:problem", *SHARED, "--run-dir=run")
    torch.set_default_dtype(torch.float64)
    try:
        made = problem()
    finally:
        torch.set_default_dtype(torch.float32)
    state = {}
    if world.rank == 0:
        with Checkpoint(resolve(directory / "run" / "checkpoints")) as checkpoint:
            names = dict(made.network.named_parameters())
            state = {name: torch.from_numpy(np.array(checkpoint.read(f"parameters/{name}"))) for name in names}
        made.network.load_state_dict(state)
        with torch.no_grad():
            inputs, targets = made.test
            expected = float(made.loss(made.network(**inputs), targets))
        summary = json.loads((directory / "run" / "summary.json").read_text())
        assert summary["test_loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.mpi
def test_a_stopped_run_goes_on_to_the_same_end(world, trained, directory):
    trained("--problem=tree_networks:problem", *SHARED, "--run-dir=whole", "--max-iterations=8")
    trained("--problem=tree_networks:problem", *SHARED, "--run-dir=cut", "--max-iterations=4")
    trained("--problem=tree_networks:problem", "--resume", "--run-dir=cut", "--max-iterations=8")
    if world.rank == 0:
        assert arrays(directory / "cut") == arrays(directory / "whole")


def made(**changes):
    inputs, targets = two_inputs()
    return Problem(**{"name": "p", "network": make_two_inputs(), "loss": convex, "train": (inputs, targets)} | changes)


def test_a_problem_takes_arrays():
    (inputs, targets) = two_inputs()
    arrays = {name: value.numpy() for name, value in inputs.items()}
    found = made(train=(arrays, targets), test=(arrays, targets))
    assert isinstance(found.train[0]["image"], torch.Tensor) and isinstance(found.test[0]["image"], torch.Tensor)
    assert found.train[0]["image"].data_ptr() == arrays["image"].ctypes.data


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x, y: {"train": (x | {"image": x["image"].float()}, y)}, r"dtype of train inputs\['image'\]"),
        (lambda x, y: {"train": (x | {"features": None}, y)}, r"train inputs\['features'\]: NoneType"),
        (lambda x, y: {"test": (x, y | {"value": y["value"][1:]})}, r"test targets\['value'\]: there are 23 samples"),
        (lambda x, y: {"test": (x, {"value": y["value"][1:]})}, "test: '24 inputs and 23 targets'"),
        (lambda x, y: {"train": ({}, y)}, "train inputs: there is no tensor"),
        (lambda x, y: {"train": (x, y), "accuracy": True}, "accuracy needs one tensor of class indices"),
    ],
)
def test_a_problem_names_what_it_refuses_by_its_path(change, message):
    with pytest.raises(InvalidInput, match=message):
        made(**change(*two_inputs()))


def test_numbers_that_are_not_finite_are_named_by_their_path():
    inputs, targets = two_inputs()
    targets["value"][3] = float("nan")
    with pytest.raises(InvalidInput, match=r"sample 3 of the training targets\['value'\] is nan"):
        check_finite(made(train=(inputs, targets)), build.__kwdefaults__["wanted"])


def with_classes():
    torch.manual_seed(0)
    return (
        nn.Linear(3, 2),
        lambda outputs, targets: outputs.square().mean(),
        ({"input": torch.ones(4, 3)}, [torch.ones(4)]),
    )


def test_a_function_that_returns_trees_in_a_tuple(monkeypatch):
    found = build(f"{__name__}:with_classes")
    assert not found.accuracy and list(found.train[0]) == ["input"]
