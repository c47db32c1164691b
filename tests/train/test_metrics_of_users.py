"""Metrics that a user's problem brings."""

import pytest
import torch
from mpi4py import MPI
from torch import nn

from apts_mpi.compare.full_batch.run import measure
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems import Problem
from apts_mpi.tools.events import Events
from apts_mpi.train.metrics import Metrics, whole_outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metrics_make_their_tensors_in_the_type_of_the_network(dtype):
    """As the function that makes the problem does: a network in float64 takes no points in float32."""

    def largest(network):
        with torch.no_grad():
            return network(torch.linspace(-1.0, 1.0, 5)[:, None]).max()

    network = nn.Linear(1, 1).to(dtype)
    data = torch.zeros(4, 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype)
    problem = Problem(
        name="mine", network=network, loss=nn.functional.mse_loss, train=data, metrics={"largest": largest}
    )
    expected = float((network.weight.abs() + network.bias).detach())
    comm = Communicator(MPI.COMM_SELF, Events())
    found = Metrics(problem, comm, whole_outputs(network, comm)).measure(data, None)
    assert found["largest"] == pytest.approx(expected) and measure(problem)["largest"] == pytest.approx(expected)
    assert torch.get_default_dtype() == torch.float32
