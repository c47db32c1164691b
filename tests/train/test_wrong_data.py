"""Problems that are wrong on one rank or do not repeat, as users make them: named before work starts."""

import math
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from mpi4py import MPI
from networks import classifier, cross_entropy, problem
from torch import nn

from apts_mpi.problems import Problem
from apts_mpi.result import StepResult
from apts_mpi.tools.status import USAGE
from apts_mpi.train.rejection import Rejections
from apts_mpi.trust_region.acceptance import Judged

# A run that is refused in its first step leaves the closing of its files to Python.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

HERE = MPI.COMM_WORLD.rank
IS_LAST = MPI.COMM_WORLD.size - 1 == HERE

LAYOUTS = {"apts": "--layout=replicated", "adam": "--optimizer=adam", "staged": "--layout=staged"}
ARGUMENTS = "--device=cpu --epochs=1 --batch-size=30 --max-iterations=2 --run-dir=run --stall-timeout=60".split()


def parts():
    network, loss, ((inputs, targets), test) = problem()
    return network, loss, inputs, targets, test


def missing_input():
    network, loss, inputs, targets, test = parts()
    inputs[17, 2] = math.nan
    return network, loss, ((inputs, targets), test)


def missing_input_on_one_rank():
    return missing_input() if IS_LAST else problem()


def infinite_targets():
    network, _, inputs, _, _ = parts()
    targets = inputs[:, :3].sum(1)
    targets[5] = -math.inf
    return network, lambda outputs, targets: (outputs.sum(1) - targets).square().mean(), (inputs, targets)


def missing_test_input():
    network, loss, inputs, targets, (test_inputs, test_targets) = parts()
    test_inputs[29, 9] = math.inf
    return network, loss, ((inputs, targets), (test_inputs, test_targets))


NOT_FINITE = {
    "missing_input": "sample 17 of the training inputs has nan at [2]; remove or mend it",
    "missing_input_on_one_rank": "sample 17 of the training inputs has nan at [2]; remove or mend it",
    "infinite_targets": "sample 5 of the training targets is -inf; remove or mend it",
    "missing_test_input": "sample 29 of the test inputs has inf at [9]; remove or mend it",
}


def reversed_labels():
    network, loss, inputs, targets, test = parts()
    return network, loss, ((inputs, 2 - targets if IS_LAST else targets), test)


def one_label():
    network, loss, inputs, targets, test = parts()
    targets[41] = (targets[41] + IS_LAST) % 3
    return network, loss, ((inputs, targets), test)


def small_change():
    network, loss, inputs, targets, test = parts()
    inputs[3, 3] += 1e-3 * IS_LAST
    return network, loss, ((inputs, targets), test)


def unseeded():
    network, loss, inputs, targets, test = parts()
    drawn = np.random.default_rng(HERE).normal(size=inputs.shape)
    return network, loss, ((torch.tensor(drawn, dtype=inputs.dtype), targets), test)


def fewer():
    network, loss, inputs, targets, test = parts()
    count = 50 if IS_LAST else 60
    return network, loss, ((inputs[:count], targets[:count]), test)


def other_test_targets():
    network, loss, inputs, targets, (test_inputs, test_targets) = parts()
    return network, loss, ((inputs, targets), (test_inputs, test_targets.roll(int(IS_LAST))))


def no_test():
    network, loss, inputs, targets, test = parts()
    return network, loss, (inputs, targets) if IS_LAST else ((inputs, targets), test)


def other_batches():
    network, loss, inputs, targets, _ = parts()
    return Problem(name="batches", network=network, loss=loss, train=(inputs, targets), epochs=1 + IS_LAST)


def wider():
    network, loss, data = problem()
    return classifier(width=17).to(torch.get_default_dtype()) if IS_LAST else network, loss, data


def other_activation():
    network, loss, data = problem()
    network[1] = nn.ReLU() if IS_LAST else nn.Tanh()
    return network, loss, data


def other_slope():
    network, loss, data = problem()
    network[1] = nn.LeakyReLU(0.02 if IS_LAST else 0.01)
    return network, loss, data


def fixed_layer():
    network, loss, data = problem()
    network[0].requires_grad_(not IS_LAST)
    return network, loss, data


OTHERS = {
    "reversed_labels": "has other train targets than rank 0, first in sample ",
    "one_label": "has other train targets than rank 0, first in sample 41; ",
    "small_change": "has other train inputs than rank 0, first in sample 3; ",
    "unseeded": "has other train inputs than rank 0, first in sample 0; all ranks need the same: seed what is random",
    "fewer": "has another shape of the train inputs than rank 0, (50, 10) and (60, 10); ",
    "other_test_targets": "has other test targets than rank 0, ",
    "no_test": "has another set of parts than rank 0, nothing and test; ",
    "other_batches": "has another epochs than rank 0, 2 and 1; ",
    "wider": "has another network than rank 0, 0: Linear(in_features=10, out_features=17, bias=True) and 0: ",
    "other_activation": "has another network than rank 0, 1: ReLU() and 1: Tanh(); make the same on all ranks",
    "other_slope": "has another network than rank 0, 1: LeakyReLU(negative_slope=0.02) and 1: ",
    "fixed_layer": "has another network than rank 0, 0.weight: (16, 10) torch.float32 and 0.weight: (16, 10) ",
}


def with_loss(change):
    network, loss, data = problem()
    return network, lambda outputs, targets: change(loss(outputs, targets)), data


def doubled():
    return with_loss(lambda loss: 2 * loss if IS_LAST else loss)


def nearly_the_same():
    return with_loss(lambda loss: 1.0001 * loss if IS_LAST else loss)


def shifted_to_nan():
    return with_loss(lambda loss: loss + math.nan if IS_LAST else loss)


class Scaled(nn.Module):
    def forward(self, inputs):
        return 1.01 * inputs if IS_LAST else inputs


def scaled_in_the_network():
    network, loss, data = problem()
    network.insert(3, Scaled())
    return network, loss, data


OF_ONE_RANK = ["doubled", "nearly_the_same", "shifted_to_nan", "scaled_in_the_network"]


def python_random():
    return with_loss(lambda loss: loss + 1e-3 * random.random())


def numpy_random():
    return with_loss(lambda loss: loss * np.random.uniform(0.9, 1.1))  # noqa: NPY002 - as users do


def own_generator():
    generator = torch.Generator()
    return with_loss(lambda loss: loss * (1 + 0.1 * float(torch.rand((), generator=generator))))


def counts_its_calls():
    calls = []

    def counted(loss):
        calls.append(1)
        return loss * len(calls)

    return with_loss(counted)


class RarelyDropped(nn.Module):
    def forward(self, inputs):
        return inputs * (random.random() < 0.8)


def dropped_in_the_network():
    network, loss, data = problem()
    network.insert(3, RarelyDropped())
    return network, loss, data


NOT_REPEATED = ["python_random", "numpy_random", "own_generator", "counts_its_calls", "dropped_in_the_network"]


def dropout_and_batch_norm():
    return classifier(batch_norm=True, dropout=0.3).to(torch.get_default_dtype()), cross_entropy, problem()[2]


def random_loss_of_torch():
    network, _, data = problem()
    return network, lambda outputs, targets: cross_entropy(nn.functional.dropout(outputs, 0.3), targets), data


class Watched(nn.Module):
    """Draws numbers that change nothing."""

    def forward(self, inputs):
        random.random()
        return inputs


def watched():
    network, loss, data = problem()
    network.append(Watched())
    return network, loss, data


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 8, batch_first=True, num_layers=2, dropout=0.2)

    def forward(self, inputs):
        return self.lstm(inputs.unflatten(1, (5, 2)))[0][:, -1]


def recurrent():
    _, loss, data = problem()
    return nn.Sequential(Recurrent(), nn.Tanh(), *[nn.Linear(8, 8) for _ in range(3)], nn.Linear(8, 3)), loss, data


def spectral():
    network, loss, data = problem()
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.utils.parametrizations.spectral_norm(layer)
    return network, loss, data


def rounded_otherwise():
    """As processors of two kinds may compute them."""
    network, loss, inputs, targets, test = parts()
    return network, loss, ((inputs * (1 + 2e-7 * IS_LAST), targets), test)


RIGHT = {
    "dropout_and_batch_norm": "",
    "random_loss_of_torch": "",
    "watched": "",
    "recurrent": "--coarse=none",
    "spectral": "--coarse=none",
    "rounded_otherwise": "",
}


def never_finite():
    network, _, data = problem()
    return network, lambda outputs, targets: cross_entropy(outputs, targets) + (0.0 * outputs.sum()).log(), data


@pytest.fixture
def refused(command):
    """A function of a problem and arguments: gives the one line with which the command refuses it on all ranks."""

    def call(name, *arguments):
        status, _, errors = command(f"--problem=test_wrong_data:{name}", *ARGUMENTS, *arguments)
        assert status == USAGE
        lines = [line for line in errors.splitlines() if "error" in line]
        assert len(lines) == (HERE == 0), errors
        return MPI.COMM_WORLD.bcast("".join(lines))

    return call


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_is_not_finite_is_named(world, refused, name, layout):
    line = refused(name, LAYOUTS[layout])
    assert f"problem test_wrong_data:{name}: {NOT_FINITE[name]}" in line
    assert (f"rank {world.size - 1}: " in line) == (name == "missing_input_on_one_rank" and world.size > 1)


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_samples_that_are_left_out_may_be_anything(trained):
    trained("--problem=test_wrong_data:missing_input", *ARGUMENTS, "--batch-size=15", "--train-samples=16")


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes(name="one_label", layout="apts")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OTHERS)
def test_what_one_rank_has_otherwise_is_named(world, refused, name, layout):
    line, rank = refused(name, LAYOUTS[layout]), world.size - 1
    # Of two ranks rank 0 is taken for the usual one, of more the most.
    assert f": rank {rank} {OTHERS[name]}" in line or (name == "unseeded" and "has other train inputs than" in line)


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes(name="doubled", layout="apts")
@pytest.mark.parametrize("layout", ["apts", "adam"])
@pytest.mark.parametrize("name", OF_ONE_RANK)
def test_loss_of_one_rank_is_named(world, refused, name, layout):
    assert f"loss: on rank {world.size - 1} it is " in refused(name, LAYOUTS[layout])


@pytest.mark.mpi(min_size=4)
@pytest.mark.parametrize("name", OF_ONE_RANK[:3])
def test_loss_of_one_replica_is_named(refused, name):
    """The last rank has the last stage of the second replica."""
    assert re.search(r"loss: on rank \d+ it is ", refused(name, "--layout=staged", "--replicas=2"))


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NOT_REPEATED)
def test_loss_that_does_not_repeat_is_named(refused, name, layout):
    assert "draws random numbers by other means (Python's random, numpy" in refused(name, LAYOUTS[layout])


@pytest.mark.mpi
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes(trained, name, layout):
    extra = [RIGHT[name]] if RIGHT[name] and layout != "adam" else []
    trained(f"--problem=test_wrong_data:{name}", *ARGUMENTS, LAYOUTS[layout], *extra)


@pytest.mark.mpi
def test_autocast_passes(trained):
    for name in ("dropout_and_batch_norm", "recurrent"):
        trained(f"--problem=test_wrong_data:{name}", *ARGUMENTS, "--autocast=bfloat16", "--coarse=none", "--overwrite")


@pytest.mark.mpi
def test_steps_that_keep_failing_are_told_once(world, trained):
    arguments = [argument for argument in ARGUMENTS if "max-iterations" not in argument]
    printed = trained("--problem=test_wrong_data:never_finite", *arguments, "--epochs=12", "--coarse=none")
    told = [line for line in printed.splitlines() if line.startswith("warning: the last 10 steps")]
    assert len(told) == (world.rank == 0), printed
    assert all("up to iteration 10, were not accepted: the loss is not finite; look for" in line for line in told)


def test_the_streak_is_told_again_after_a_step():
    rejected = Judged(1.0, 2.0, 0.5, -1.0, -2.0, False, 0.3, 0.1, 0.3, 1.0)
    accepted = replace(rejected, rho=1.0, accepted=True)
    rejections = Rejections()

    def told(judged, times):
        results = [StepResult(0, judged, None, 1.0, 0.1)] * times
        return [number for number, result in enumerate(results, 1) if rejections.note(result, number)]

    assert told(rejected, 9) == []
    assert told(accepted, 1) == []
    assert told(rejected, 25) == [10]
    assert told(accepted, 2) == []
    assert told(rejected, 10) == [10]
    assert "rho -2 with radius 0.3; give more --epochs" in rejected.reason and accepted.reason == ""


@pytest.mark.mpi(min_size=2)
def test_options_of_one_rank_are_named(command):
    status, _, errors = command("--problem=networks:problem", *ARGUMENTS, f"--seed={int(IS_LAST)}")
    assert status == USAGE
    if HERE == 0:
        assert f"options: rank {MPI.COMM_WORLD.size - 1} has another seed than rank 0, 1 and 0; give all" in errors
