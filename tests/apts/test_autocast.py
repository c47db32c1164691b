"""The network in bfloat16, and everything else in float32."""

import pytest
import torch
from networks import classified, classifier, cross_entropy
from run_files import history
from staged_networks import staged
from torch.utils._python_dispatch import TorchDispatchMode

from apts_mpi import APTS, APTSOptions, GlobalStepOptions, LocalOptions, StagedAPTS, TrustRegionOptions
from apts_mpi.errors import InvalidInput
from apts_mpi.problems import build
from apts_mpi.train.__main__ import main

# bfloat16 has 8 bits: a product is right to 2^-9, and the ranks' shards of a batch are multiplied in other blocks.
ROUNDING = 2.0**-8

BFLOAT16 = APTSOptions(autocast="bfloat16")


def batch():
    inputs, targets = classified()
    return inputs.float(), targets


class Products(TorchDispatchMode):
    """The dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default):
            self.dtypes.append(arguments[-1].dtype)
        return function(*arguments, **(keywords or {}))


@pytest.mark.mpi
def test_network_in_bfloat16_and_the_rest_in_float32(world):
    solver = APTS(classifier().float(), cross_entropy, comm=world, options=BFLOAT16)
    with Products() as products:
        solver.step(batch())
    assert torch.bfloat16 in products.dtypes
    objective, schwarz = solver.holding.objective, solver.holding.schwarz
    kept = [objective.vector.values, objective.vector.gradients, objective.reduction.total, schwarz.correction]
    kept += [mean for local in schwarz.solvers.values() for means in local.statistics for mean in means]
    passes = solver.holding.objective.evaluate(solver.batch.passes).caches
    kept += [cache.inputs for caches in passes for cache in caches]
    kept += [record.gradient for caches in passes for record in caches[0].records]
    assert len(kept) > 6 and {tensor.dtype for tensor in kept} == {torch.float32}


@pytest.mark.mpi
def test_trial_and_gradient_evaluation_have_the_same_precision(world):
    """The same point gives the same bits in both, and others than in float32."""
    network = classifier().float()
    solver = APTS(network, cross_entropy, comm=world, options=BFLOAT16)
    solver.step(batch())
    passes, objective = solver.batch.passes, solver.holding.objective
    losses = [objective.evaluate(passes).loss, objective.forward(passes, keep_graph=False).loss]
    assert torch.equal(*losses)
    with torch.no_grad():
        exact = sum(part.weight * cross_entropy(network(part.inputs), part.targets) for part in passes)
    assert 0.0 < abs(float(exact - losses[0])) < ROUNDING * float(exact)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "options",
    [
        APTSOptions(autocast="bfloat16", local=LocalOptions(solver=solver, iterations=2))
        for solver in ("kfac", "tr", "lsr1", "adam")
    ]
    + [
        APTSOptions(autocast="bfloat16", local=LocalOptions(solver="steihaug", product="hessian")),
        APTSOptions(autocast="bfloat16", global_step=GlobalStepOptions(model="steihaug")),
        APTSOptions(autocast="bfloat16", global_step=GlobalStepOptions(model="lsr1")),
    ],
    ids=["kfac", "tr", "lsr1", "adam", "steihaug", "global steihaug", "global lsr1"],
)
def test_every_solver_goes_down(world, options):
    solver = APTS(classifier().float(), cross_entropy, comm=world, options=options)
    results = [solver.step(batch()), *(solver.step() for _ in range(7))]
    assert results[-1].schwarz.loss < results[0].schwarz.loss
    assert solver.holding.objective.vector.values.dtype == torch.float32


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_ranks_agree_with_one(world):
    """The same four subdomains on any number of ranks: equal up to what bfloat16 rounds, after four iterations."""
    from mpi4py import MPI

    def losses(comm):
        options = APTSOptions(autocast="bfloat16", subdomains=4, replicas=1)
        solver = APTS(classifier().float(), cross_entropy, comm=comm, options=options)
        return [solver.step(batch()).schwarz.loss for _ in range(4)]

    if world.size > 4:
        pytest.skip("more ranks than subdomains")
    assert losses(world) == pytest.approx(losses(MPI.COMM_SELF), rel=4 * ROUNDING)


@pytest.mark.mpi
def test_stages_in_bfloat16(world):
    """The iterates are those of float32 up to rounding, with a step of which no curvature magnifies it."""

    def losses(autocast):
        torch.manual_seed(0)
        modules = [module for _ in range(world.size) for module in (torch.nn.Linear(10, 10), torch.nn.Tanh())]
        network = torch.nn.Sequential(*modules, torch.nn.Linear(10, 3))
        options = staged(APTSOptions(autocast=autocast, trust_region=TrustRegionOptions(initial_radius=0.3)))
        solver = StagedAPTS(network, cross_entropy, comm=world, options=options)
        with Products() as products:
            found = [solver.step(batch()).schwarz.loss for _ in range(3)]
        assert solver.holding.objective.vector.values.dtype == torch.float32
        assert (torch.bfloat16 in products.dtypes) == (autocast == "bfloat16")
        return found

    assert losses("bfloat16") == pytest.approx(losses("none"), rel=ROUNDING)


def test_float64_is_refused():
    with pytest.raises(InvalidInput, match=r"autocast: 'bfloat16' is for a network of float32, .* choose none, or"):
        APTS(classifier(), cross_entropy, options=BFLOAT16)


@pytest.mark.mpi(min_size=2)
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize("optimizer", [[], ["--optimizer=adam", "--learning-rate=1e-2"]], ids=["apts", "adam"])
def test_digits_are_learnt(world, mpi_tmp_path, optimizer):
    run = mpi_tmp_path / "run"
    main(["--autocast=bfloat16", "--epochs=6", *optimizer, "--device=cpu", f"--run-dir={run}"])
    if world.rank == 0:
        assert history(run)[-1]["test_accuracy"] > 0.9


def test_digits_are_computed_in_bfloat16():
    """The same network as in the test above."""
    problem = build("digits", data_dir=None, train_samples=100, seed=0, dtype=torch.float32)
    solver = APTS(problem.network, problem.loss, options=BFLOAT16)
    with Products() as products:
        solver.step(tuple(part[:64] for part in problem.train))
    assert torch.bfloat16 in products.dtypes
