"""Between steps nothing of the solver's is on the user's network: it can be saved, copied, scripted and compiled."""

import copy
import gc
import io
import weakref

import pytest
import torch
from mpi4py import MPI
from networks import CLASSES, FEATURES, classified, cross_entropy
from torch import nn

from apts_mpi import APTS, APTSOptions, LocalOptions, StagedAPTS
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.private import private_of
from apts_mpi.tools.events import Events

OPTIONS = {
    "default": APTSOptions(),
    "kfac": APTSOptions(local=LocalOptions(solver="kfac")),
    "adam": APTSOptions(local=LocalOptions(solver="adam", iterations=2)),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 400), nn.Tanh(), nn.Linear(400, CLASSES)
    ).double()


def hooks_on(trained):
    """All that torch would call."""
    names = "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _state_dict_hooks".split()
    found = [hook for module in trained.modules() for name in names for hook in getattr(module, name).values()]
    for parameter in trained.parameters():
        found += [*(parameter._backward_hooks or {}).values(), *(parameter._post_accumulate_grad_hooks or {}).values()]
    found += list(torch.nn.modules.module._global_forward_hooks.values())
    return found


def made(world, trained, layout, options):
    if layout == "staged":
        options = APTSOptions(layout="staged", local=options.local)
        return StagedAPTS(trained, cross_entropy, comm=world, options=options)
    return APTS(trained, cross_entropy, comm=world, options=options)


def saved_size(value):
    file = io.BytesIO()
    torch.save(value, file)
    return len(file.getvalue())


@pytest.mark.mpi
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("layout", ["replicated", "staged"])
def test_no_hooks_stay_and_the_network_can_be_saved(world, layout, name):
    trained = network()
    if layout == "staged" and world.size > 4:
        pytest.skip("the network has four stages")
    for _ in range(3):
        solver = made(world, trained, layout, OPTIONS[name])
        solver.step(classified())
        if layout == "staged":
            break
    assert hooks_on(trained) == []
    if layout == "staged":
        return
    file = io.BytesIO()
    torch.save(trained, file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=False).eval()
    inputs = classified()[0]
    trained.eval()
    for other in (loaded, copy.deepcopy(trained), torch.jit.trace(trained, inputs), torch.jit.script(trained)):
        assert torch.equal(other(inputs), trained(inputs))
    trained.train()
    assert solver.step(classified()).accepted


@pytest.mark.mpi
def test_no_hooks_stay_after_an_error(world):
    trained = network()
    solver = made(world, trained, "replicated", OPTIONS["kfac"])
    solver.step(classified())

    def fail(module, inputs):
        raise RuntimeError("on purpose")

    hook = trained[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        solver.step(classified())
    hook.remove()
    hook = trained[2].register_full_backward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        solver.step(classified())
    hook.remove()
    assert hooks_on(trained) == []
    assert solver.step(classified()).accepted


@pytest.mark.mpi
def test_saving_some_of_the_parameters_saves_no_others(world):
    trained = network()
    before = saved_size(trained[5].state_dict()), saved_size(trained.state_dict())
    made(world, trained, "replicated", OPTIONS["default"]).step(classified())
    after = saved_size(trained[5].state_dict()), saved_size(trained.state_dict())
    # Of a file's own words some are longer.
    assert after[0] < before[0] + 2000 and after[1] < before[1] + 2000


@pytest.mark.mpi
@pytest.mark.parametrize("solver", ["auto", "kfac", "adam"])
def test_a_compiled_network_keeps_its_graphs(world, solver):
    """The first steps compile, for what is trained, judged and looked at, or not looked at; later ones do not."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    trained = torch.compile(network(), backend=backend)
    trainer = APTS(trained, cross_entropy, comm=world, options=APTSOptions(local=LocalOptions(solver=solver)))
    losses = [trainer.step(classified()).schwarz.loss for _ in range(7)]
    count = len(graphs)
    losses += [trainer.step(classified()).schwarz.loss for _ in range(7)]
    assert len(graphs) == count <= 4 and losses[-1] < losses[0]
    torch._dynamo.reset()


def test_a_dropped_solver_is_freed():
    trained = network()
    solver = made(MPI.COMM_SELF, trained, "replicated", OPTIONS["kfac"])
    solver.step(classified())
    values = weakref.ref(solver.holding.objective.reduction.total)
    del solver
    gc.collect()
    assert values() is None


@pytest.mark.mpi
def test_solvers_that_are_dropped_leave_no_communicators(world):
    """A library has room for some two thousand; those of one of the user's are made once."""
    trained = network()
    groups = None
    for _ in range(20):
        made(world, trained, "replicated", OPTIONS["default"])
        groups = groups or set(private_of(world).groups)
    assert set(private_of(world).groups) == groups
    for _ in range(2500):
        Communicator(world, Events()).group(0)
