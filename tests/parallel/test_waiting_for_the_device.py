"""What makes the host wait for a device: numbers that are read from tensors, counted in an iteration."""

import pytest
import torch
from networks import classified, classifier, cross_entropy

from apts_mpi import APTS, APTSOptions, GlobalStepOptions, LocalOptions, SchwarzOptions

READING = ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "__index__")


@pytest.fixture
def read(monkeypatch):
    """Names of the methods that read a tensor, in their order."""
    calls = []
    for name in READING:
        method = getattr(torch.Tensor, name)

        def counted(self, *arguments, name=name, method=method):
            calls.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return calls


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("options", "judged"),
    [
        (APTSOptions(), 1),
        (APTSOptions(local=LocalOptions(solver="muon", iterations=2)), 1),
        (APTSOptions(local=LocalOptions(solver="adam", iterations=3)), 1),
        (APTSOptions(local=LocalOptions(solver="tr", iterations=3)), 1),
        (APTSOptions(schwarz=SchwarzOptions(decomposition="data"), local=LocalOptions(solver="sgd")), 1),
        (APTSOptions(global_step=GlobalStepOptions(model="first-order")), 2),
    ],
    ids=["kfac", "muon", "adam", "tr", "data", "first-order global step"],
)
def test_an_iteration_reads_one_record_and_the_coarse_model(world, read, options, judged):
    """A record a judged step; of the coarse level its matrices in one, and on rank 0 the length of its step.

    And before the local solves, whose state lasts, whether the gradient is finite.
    """
    solver = APTS(classifier(), cross_entropy, comm=world, options=options)
    solver.step(classified())
    read.clear()
    solver.step(classified(seed=3))
    assert read.count("tolist") == judged + 1
    coarse = ["cpu", "__float__"] if world.rank == 0 else ["cpu"]
    # Of the batch, of which nothing is under way yet: the denominator, and some samples, which are compared.
    batch = ["__float__", *["cpu", "cpu"] * (world.size > 1)]
    assert sorted(name for name in read if name != "tolist") == sorted(coarse + batch)
