"""torch's optimizers, data-parallel: the same as in one process."""

import math

import pytest
import torch
from networks import classified, classifier, cross_entropy, flat

from apts_mpi import InvalidInput
from apts_mpi.train.baselines import DataParallel
from apts_mpi.train.options import BaselineOptions


def by_hand(network, optimizer, batches):
    """A plain training loop; loss and norm of the gradient before each step."""
    found = []
    for inputs, targets in batches:

        def closure():
            optimizer.zero_grad()
            loss = cross_entropy(network(inputs), targets)  # noqa: B023 - called in this turn of the loop only
            loss.backward()
            return loss

        value = closure().item()
        found.append((value, flat(parameter.grad for parameter in network.parameters()).norm().item()))
        optimizer.step(closure)
    return found


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.02),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters, lr=0.02, max_iter=10, line_search_fn="strong_wolfe"),
}


@pytest.mark.mpi
@pytest.mark.all_sizes(name="adam")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_is_that_of_a_plain_loop(world, name):
    data = classified()
    choices = [torch.arange(0, 121, 2), torch.arange(50), torch.arange(120, 20, -1), torch.arange(121)]
    network, other = classifier(), classifier()
    solver = DataParallel(
        network, cross_entropy, comm=world, options=BaselineOptions(optimizer=name, learning_rate=0.02)
    )
    results = [solver.step(data, rows) for rows in choices]
    found = [(result.loss, result.gradient_norm) for result in results]
    assert world.bcast(found) == found
    assert [result.iteration for result in results] == [1, 2, 3, 4]
    if world.rank == 0:
        batches = [(data[0][rows], data[1][rows]) for rows in choices]
        expected = by_hand(other, OPTIMIZERS[name](other.parameters()), batches)
        # L-BFGS divides by differences of gradients, which magnify rounding.
        tolerance = 1e-7 if name == "lbfgs" else 1e-11
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(flat(network.parameters()), flat(other.parameters()), rtol=tolerance, atol=tolerance)


@pytest.mark.mpi
def test_gradient_evaluations(world):
    """One a step, more where shards are uneven; with a line search as many as it asks for."""
    batch = classified(24 * world.size)
    solver = DataParallel(
        classifier(), cross_entropy, comm=world, options=BaselineOptions(optimizer="adam", learning_rate=0.01)
    )
    assert [solver.step(batch).gradient_evaluations for _ in range(2)] == pytest.approx([1.0, 1.0])
    busiest = math.ceil(121 / world.size) * world.size / 121
    assert solver.step(classified()).gradient_evaluations == pytest.approx(busiest)
    calls = []
    network = classifier()
    solver = DataParallel(
        network, cross_entropy, comm=world, options=BaselineOptions(optimizer="lbfgs", learning_rate=0.1)
    )
    network[0].weight.register_hook(lambda _: calls.append(1))
    assert solver.step(batch).gradient_evaluations == pytest.approx(len(calls))
    assert len(calls) > 1


@pytest.mark.mpi
@pytest.mark.all_sizes(name="adam")
@pytest.mark.parametrize("name", ["adam", "lbfgs"])
def test_running_statistics_move_once_a_step(world, name):
    network = classifier(batch_norm=True)
    solver = DataParallel(
        network, cross_entropy, comm=world, options=BaselineOptions(optimizer=name, learning_rate=0.01)
    )
    for count in (1, 2):
        solver.step(classified())
        assert network[1].num_batches_tracked == count
    means = network[1].running_mean
    assert means.norm() > 0.0
    torch.testing.assert_close(means, torch.from_numpy(world.bcast(means.numpy())), rtol=1e-13, atol=0.0)


@pytest.mark.mpi
def test_batch_that_is_too_small_is_refused(world):
    solver = DataParallel(
        classifier(), cross_entropy, comm=world, options=BaselineOptions(optimizer="adam", learning_rate=0.01)
    )
    with pytest.raises(InvalidInput, match="batch_size: the batch has 0 samples"):
        solver.step(classified(0))


@pytest.mark.mpi
def test_description(world):
    solver = DataParallel(
        classifier(), cross_entropy, comm=world, options=BaselineOptions(optimizer="sgd", learning_rate=0.25)
    )
    assert f"{world.size} ranks" in solver.describe() and "0.25" in solver.describe()
