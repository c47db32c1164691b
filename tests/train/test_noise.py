"""What ``noise auto`` and the pull stand for in a training run."""

import math

import networks
import pytest
import torch

from apts_mpi.options import CoarseOptions, LocalOptions, SchwarzOptions, TrustRegionOptions
from apts_mpi.problems import Problem
from apts_mpi.train.noise import LARGEST_PULL, MANY_STEPS, with_noise
from apts_mpi.train.options import TrainingOptions


def problem(**changes):
    data = torch.zeros(1000, 10, dtype=torch.float64), torch.zeros(1000, dtype=torch.int64)
    known = {"name": "zeros", "batch_size": 10, "epochs": 2, **changes}
    return Problem(network=networks.classifier(), loss=networks.cross_entropy, train=data, test=None, **known)


@pytest.mark.parametrize(
    ("options", "noise"),
    [
        ({}, "batches"),  # 200 steps
        ({"epochs": MANY_STEPS // 50, "batch_size": 20}, "batches"),
        ({"epochs": MANY_STEPS // 50 - 1, "batch_size": 20}, "none"),
        ({"epochs": 1000, "batch_size": 50}, "batches"),
        ({"epochs": 1000, "batch_size": 51}, "none"),  # 19 batches, which are no small parts
        ({"epochs": 1000, "batch_size": 83, "max_cpu_seconds": 9.0}, "batches"),
        ({"epochs": 1000, "batch_size": 84, "max_seconds": 9.0}, "none"),
        ({"epochs": 1000, "batch_size": 1000}, "none"),  # all samples in each batch
        ({"epochs": 1000, "batch_size": 5000}, "none"),
        ({"epochs": 1000, "noise": "none"}, "none"),
        ({"noise": "batches"}, "batches"),
        ({"epochs": 1000, "local": LocalOptions(solver="kfac")}, "batches"),
        ({"epochs": 1000, "local": LocalOptions(solver="adam")}, "none"),
        ({"epochs": 1000, "local": LocalOptions(iterations=2)}, "none"),
        ({"epochs": 1000, "coarse": CoarseOptions(model="gauss-newton")}, "none"),
        ({"epochs": 1000, "schwarz": SchwarzOptions(partition="index")}, "none"),
        ({"epochs": 1000, "schwarz": SchwarzOptions(decomposition="data")}, "none"),
    ],
)
def test_noise(options, noise):
    assert with_noise(TrainingOptions(**options), problem()).noise == noise


def test_problem_that_calls_its_network_itself_has_none():
    called = problem(forward=lambda network, inputs: network(inputs))
    assert with_noise(TrainingOptions(epochs=1000), called).noise == "none"


@pytest.mark.parametrize(
    ("options", "pull"),
    [
        ({"epochs": 4}, 0.2),
        ({"epochs": 2}, 0.1 * math.sqrt(2.0)),
        ({}, 0.1 * math.sqrt(2.0)),
        ({"epochs": 100}, LARGEST_PULL),
        ({"epochs": 4, "max_iterations": 7}, 0.2),
        ({"epochs": 4, "max_seconds": 7.0}, None),
        ({"epochs": 4, "max_cpu_seconds": 7.0}, None),
        ({"epochs": 4, "trust_region": TrustRegionOptions(pull=0.05)}, 0.05),
    ],
)
def test_pull(options, pull):
    found = with_noise(TrainingOptions(noise="batches", **options), problem()).trust_region.pull
    assert found is None if pull is None else found == pytest.approx(pull)


def test_runs_without_noise_have_no_pull():
    assert with_noise(TrainingOptions(noise="none", epochs=4), problem()).trust_region.pull is None
