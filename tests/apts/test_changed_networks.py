"""A solver notices what its user does to the network between steps: it follows, or says on all ranks what to do."""

from pathlib import Path

import pytest
import torch
from networks import FEATURES, classified, classifier, cross_entropy, flat
from torch import nn
from torch.nn.utils import prune

from apts_mpi import APTS, APTSOptions, CoarseOptions, GlobalStepOptions, InvalidInput, LocalOptions, StagedAPTS
from apts_mpi.checkpoint import CheckpointDirectory, newest_valid
from apts_mpi.options import TrustRegionOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import Events

OPTIONS = {
    "default": {},
    "kfac": {"local": LocalOptions(solver="kfac")},
    "adam": {"local": LocalOptions(solver="adam", iterations=3)},
    "tr": {"local": LocalOptions(solver="tr", iterations=2)},
    "lsr1": {"local": LocalOptions(solver="lsr1", iterations=2)},
    "global lsr1": {"global_step": GlobalStepOptions(model="lsr1")},
    "global steihaug": {"global_step": GlobalStepOptions(model="steihaug")},
    "noisy": {"noise": "batches", "trust_region": TrustRegionOptions(pull=0.1)},
    "without coarse level": {"coarse": CoarseOptions(model="none")},
}


def make(world, network, layout="replicated", **chosen):
    if layout == "staged":
        return StagedAPTS(network, cross_entropy, comm=world, options=APTSOptions(layout="staged", **chosen))
    return APTS(network, cross_entropy, comm=world, options=APTSOptions(**chosen))


def bits(parameter):
    return parameter.detach().clone().view(torch.int64)


@pytest.mark.mpi
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", ["replicated", "staged"])
def test_a_parameter_frozen_later_stays_until_it_is_unfrozen(world, layout, name):
    if layout == "staged" and name in ("global lsr1", "noisy"):
        pytest.skip("not in layout staged")
    network = classifier()
    with torch.no_grad():
        network[0].bias[0] = -0.0
    solver = make(world, network, layout, **OPTIONS[name])
    batch = classified()
    for _ in range(2):
        solver.step(batch)
    # In a stage, those of the two layers that it has.
    own = [parameter for layer in (network[0], network[4]) for parameter in layer.parameters()]
    for parameter in own:
        parameter.requires_grad_(False)
    before, others = [bits(parameter) for parameter in own], flat(network.parameters())
    losses = [solver.step(batch if index % 2 == 0 else None).schwarz.loss for index in range(6)]
    assert all(torch.equal(old, bits(parameter)) for old, parameter in zip(before, own, strict=True))
    assert not any(parameter.requires_grad for parameter in own)
    # A stage may rest as a whole.
    assert any(world.allgather(not torch.equal(flat(network.parameters()), others))) and losses[-1] < losses[0]
    for parameter in own:
        parameter.requires_grad_(True)
    accepted = [solver.step(batch).accepted for _ in range(4)]
    assert any(accepted)
    assert not own or any(not torch.equal(old, bits(p)) for old, p in zip(before, own, strict=True))


def replace_head(network):
    network[10] = nn.Linear(16, 3).double()


def prune_layer(network):
    prune.random_unstructured(network[2], "weight", 0.5)


CHANGES = {
    "replaced module": (replace_head, "10 was replaced after the solver was made; make a new solver"),
    "replaced activation": (lambda network: network.__setitem__(1, nn.ReLU()), "1 was replaced"),
    "replaced parameter": (
        lambda network: setattr(network[2], "weight", nn.Parameter(torch.zeros(16, 16).double())),
        "2.weight was replaced",
    ),
    "tied": (lambda network: setattr(network[4], "weight", network[2].weight), "4.weight was replaced"),
    "added module": (lambda network: network.append(nn.Linear(3, 3).double()), "11 was added"),
    "added parameter": (lambda network: network.register_parameter("own", nn.Parameter(torch.zeros(1))), "own was add"),
    "removed module": (lambda network: network.__delitem__(10), "10 was taken away"),
    "removed parameter": (lambda network: network[2].register_parameter("bias", None), "2.bias was taken away"),
    "parametrised": (lambda network: nn.utils.parametrizations.weight_norm(network[2]), "2"),
    "pruned": (prune_layer, "2.weight was taken away"),
    "converted": (lambda network: network.float(), "its parameters were replaced"),
    "unfrozen": (lambda network: network[8].requires_grad_(True), "8.weight was frozen when the solver was made"),
    "all frozen": (lambda network: network.requires_grad_(False), "all that the solver trains is frozen"),
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("again", [False, True], ids=["new batch", "same batch"])
def test_what_cannot_be_followed_is_refused_on_all_ranks(world, name, again):
    change, words = CHANGES[name]
    network = classifier()
    network[8].requires_grad_(False)
    solver = make(world, network)
    solver.step(classified())
    if world.rank == world.size - 1 or name == "all frozen":
        change(network)
    with pytest.raises(InvalidInput, match=f"network: {words}"):
        solver.step(None if again else classified())


@pytest.mark.mpi
def test_changes_of_a_stage_are_refused_on_all_ranks(world):
    network = classifier()
    solver = make(world, network, "staged")
    solver.step(classified())
    if world.rank == 0:
        network[0] = nn.Linear(FEATURES, 16).double()
    with pytest.raises(InvalidInput, match=r"network: 0 was replaced .*; make a new solver"):
        solver.step(classified())


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("again", [False, True], ids=["new batch", "same batch"])
def test_ranks_that_do_not_do_the_same_are_told(world, again):
    def step_after(change):
        network = classifier()
        solver = make(world, network)
        solver.step(classified())
        if world.rank == 1:
            change(network)
        return solver.step(None if again else classified())

    with pytest.raises(InvalidInput, match="rank . has other parameters with requires_grad than rank .; freeze the"):
        step_after(lambda network: network[0].requires_grad_(False))
    with pytest.raises(InvalidInput, match="rank . has other parameters than rank .; change or load the same"):
        step_after(lambda network: network.load_state_dict(classifier(seed=4).state_dict()))
    step_after(lambda network: network.load_state_dict(network.state_dict()))


@pytest.mark.mpi(min_size=2)
def test_a_batch_on_some_ranks_alone_is_refused(world):
    solver = make(world, classifier())
    solver.step(classified())
    with pytest.raises(InvalidInput, match="step: rank 1 was given no batch, others were"):
        solver.step(None if world.rank == 1 else classified())


class Freezing(nn.Linear):
    on = False

    def forward(self, inputs):
        outputs = super().forward(inputs)
        if self.on:
            self.weight.requires_grad_(False)
        return outputs


@pytest.mark.mpi
def test_freezing_within_a_step_is_refused(world):
    layer = Freezing(FEATURES, 3).double()
    solver = make(world, nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 3).double()), **OPTIONS["without coarse level"])
    solver.step(classified())
    layer.on = True
    with pytest.raises(InvalidInput, match="network: its forward pass changes requires_grad"):
        solver.step(classified())


@pytest.mark.mpi
def test_a_new_solver_takes_the_state_over(world, tmp_path):
    """As the refusals say: where the same parameters are trained."""
    network = classifier()
    solver = make(world, network, local=LocalOptions(solver="adam"))
    for _ in range(3):
        solver.step(classified())
    path, comm = Path(world.bcast(str(tmp_path))), Communicator(world, Events())
    CheckpointDirectory(path, comm).save(*solver.save(), 3)
    expected = solver.step(classified()).schwarz
    other = make(world, classifier(seed=3), local=LocalOptions(solver="adam"))
    found, _ = newest_valid(path, comm)
    other.load(found, found.metadata)
    assert other.step(classified()).schwarz == expected


@pytest.mark.mpi
def test_evaluation_mode_and_use_between_steps_are_no_change(world):
    network = classifier(batch_norm=True)
    solver = make(world, network)
    for mode in (False, True, False):
        network.train(mode)
        network(classified(8)[0])
        network.load_state_dict(network.state_dict())
        network.requires_grad_(True)
        solver.step(classified())
        assert network.training == mode
