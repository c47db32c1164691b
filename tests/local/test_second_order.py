"""Local solvers and global steps with second-order models, as parts of the whole solver."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy, flat, make_solver, numbers, options, squared_error
from torch import nn

from apts_mpi import APTS, InvalidInput, LocalOptions
from apts_mpi.curvature.dense import gram
from apts_mpi.curvature.products import GaussNewtonProducts
from apts_mpi.trust_region.models import LSR1, ProductModel


def with_products(chosen, product):
    """The options with this curvature for both kinds of steihaug."""
    return dataclasses.replace(
        chosen,
        local=dataclasses.replace(chosen.local, product=product),
        global_step=dataclasses.replace(chosen.global_step, product=product),
    )


class Probe:
    """Takes the place of a local solver: lets a test look at the local objective during a step."""

    def __init__(self, look):
        self.look, self.seen = look, False

    def solve(self, local, radius, kind):
        self.look(local, radius, kind)
        self.seen = True


def visit(solver, look):
    probes = {subdomain.index: Probe(look) for subdomain in solver.holding.decomposition.carried}
    solver.holding.schwarz.solvers.update(probes)
    solver.step(classified())
    assert all(probe.seen for probe in probes.values())


def direction(local, seed):
    """A unit vector, the same on all ranks of a team."""
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(local.block), generator=generator, dtype=torch.float64)
    return vector / vector.norm()


variants = pytest.mark.parametrize("variant", ["exact", "inexact"])


@pytest.mark.mpi
@variants
@pytest.mark.parametrize(
    ("partition", "subdomains", "batch_norm"), [("layer", 1, True), ("index", 3, False), ("layer", 3, True)]
)
def test_hessian_products_of_the_local_objective_make_a_model_of_order_3(
    world, variant, partition, subdomains, batch_norm
):
    chosen = options(
        variant=variant, partition=partition, subdomains=subdomains, overlap=subdomains // 2, solver="lsr1"
    )
    solver = make_solver(world, chosen, classifier(batch_norm=batch_norm, dropout=0.3))

    def look(local, radius, kind):
        local.begin()
        local.block += 0.1 * direction(local, 1)
        value, gradient = local.value_and_gradient()
        gradient, start = gradient.clone(), local.block.clone()
        model = ProductModel(local.products("hessian"))
        steps = [[size * direction(local, seed) for seed in range(3)] for size in (4e-2, 2e-2)]
        predictions = [[model.predict(gradient, step) for step in alike] for alike in steps]
        remainders = [0.0, 0.0]
        for which in (0, 1):
            for step, predicted in zip(steps[which], predictions[which], strict=True):
                local.block.copy_(start + step)
                remainders[which] += abs((value - local.value()).item() - predicted)
        # Of a block that is linear in its parameters the model is exact.
        assert remainders[0] < 1e-13 or 6.5 < remainders[0] / remainders[1] < 9.5

    visit(solver, look)


@pytest.mark.mpi
@pytest.mark.all_sizes(subdomains=1)
@pytest.mark.parametrize(("subdomains", "partition"), [(1, "layer"), (6, "index")])
def test_gauss_newton_products_of_the_local_objective_are_those_of_the_dense_matrix(world, subdomains, partition):
    solver = make_solver(world, options(variant="exact", partition=partition, subdomains=subdomains, solver="lsr1"))
    team = solver.holding.decomposition.team

    def look(local, radius, kind):
        rows = local.gauss_newton_rows()
        along = direction(local, 2)
        found = local.products("gauss-newton")(along)
        own = local.weight * (rows.T @ (rows @ along))
        total = torch.from_numpy(sum(team.mpi.allgather(own.numpy())))
        torch.testing.assert_close(found, total, rtol=1e-9, atol=1e-13)

    visit(solver, look)


CHOICES = [
    {"solver": "lsr1", "variant": "exact"},
    {"solver": "lsr1", "variant": "inexact"},
    {"solver": "steihaug", "variant": "exact"},
    {"solver": "steihaug", "variant": "inexact", "product": "hessian"},
]
choices = pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(choice.values()))


def chosen_options(choice, **changes):
    choice = dict(choice)
    product = choice.pop("product", "gauss-newton")
    return with_products(options(**choice, **changes), product)


class Checked:
    """A local solver whose result is looked at."""

    def __init__(self, own):
        self.own, self.moved = own, False

    def solve(self, local, radius, kind):
        start = local.block.clone()
        self.own.solve(local, radius, kind)
        displacement = local.block - start
        length = torch.linalg.vector_norm(displacement, ord=2.0 if kind == "2" else torch.inf).item()
        assert length <= radius * (1.0 + 1e-12)
        assert length == 0.0 or local.value() < local.start_value
        self.moved |= length > 0.0


@choices
@pytest.mark.parametrize("norm", ["2", "inf"])
@pytest.mark.parametrize("initial_radius", [1e-2, 0.5, 20.0])
def test_local_steps_stay_in_the_ball_and_lower_the_objective(choice, norm, initial_radius):
    chosen = chosen_options(choice, norm=norm, subdomains=2, iterations=4, initial_radius=initial_radius)
    solver = make_solver(MPI.COMM_SELF, chosen)
    solvers = solver.holding.schwarz.solvers
    solvers.update({index: Checked(own) for index, own in solvers.items()})
    for _ in range(3):
        solver.step(classified())
    assert all(own.moved for own in solvers.values())


@pytest.mark.mpi
def test_rejected_trials_are_remembered(world):
    solver = make_solver(world, options(variant="exact", subdomains=1, solver="lsr1", initial_radius=100.0))
    (own,) = solver.holding.schwarz.solvers.values()
    solver.holding.schwarz.solvers[0] = checked = Checked(own)
    solver.step(classified())
    assert not checked.moved
    assert [step.norm().item() for step in own.memory.steps] == pytest.approx([100.0], rel=1e-12)


def compare_with_one_rank(world, chosen):
    """Iterations on all ranks and on this one alone agree, to what conjugate gradients make of rounding."""
    networks = classifier(), classifier()
    traces = []
    for comm, network in zip((world, MPI.COMM_SELF), networks, strict=True):
        solver = make_solver(comm, chosen, network)
        results = [solver.step(classified()), solver.step(), solver.step(classified(97, seed=2))]
        assert any(result.accepted for result in results)
        traces.append([judged for result in results for judged in numbers(result)])
    torch.testing.assert_close(*map(torch.tensor, traces), rtol=1e-8, atol=1e-8)
    values = [flat(network.parameters()) for network in networks]
    torch.testing.assert_close(*values, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(values[0], torch.from_numpy(world.bcast(values[0].numpy())), rtol=1e-13, atol=1e-13)
    assert world.bcast(traces[0]) == traces[0]


@pytest.mark.mpi
@pytest.mark.all_sizes(choice=CHOICES[0], norm="2")
@choices
@pytest.mark.parametrize(
    ("norm", "subdomains", "initial_radius"), [("2", 1, 0.3), ("inf", 1, 0.03), ("2", 6, 20.0), ("inf", 6, 0.3)]
)
def test_local_solvers_on_any_number_of_ranks(world, choice, norm, subdomains, initial_radius):
    """With one subdomain its solver is collective over all ranks; six are more than the ranks, or fewer."""
    changes = {"norm": norm, "subdomains": subdomains, "initial_radius": initial_radius}
    compare_with_one_rank(world, chosen_options(choice, iterations=2, **changes))


class GlobalStep(NamedTuple):
    model: str
    norm: str
    solver: str
    product: str
    initial_radius: float


GLOBAL_STEPS = [
    GlobalStep("lsr1", norm="2", solver="sgd", product="gauss-newton", initial_radius=0.3),
    GlobalStep("lsr1", norm="inf", solver="kfac", product="gauss-newton", initial_radius=0.3),
    GlobalStep("steihaug", norm="2", solver="kfac", product="gauss-newton", initial_radius=0.3),
    GlobalStep("steihaug", norm="2", solver="kfac", product="hessian", initial_radius=20.0),
    GlobalStep("steihaug", norm="inf", solver="kfac", product="gauss-newton", initial_radius=0.03),
    GlobalStep("steihaug", norm="inf", solver="sgd", product="hessian", initial_radius=0.03),
    GlobalStep("steihaug", norm="2", solver="sgd", product="gauss-newton", initial_radius=20.0),
]


@pytest.mark.mpi
@pytest.mark.all_sizes(case=GLOBAL_STEPS[1])
@pytest.mark.parametrize("case", GLOBAL_STEPS, ids=lambda case: "-".join(map(str, case)))
def test_global_steps_on_any_number_of_ranks(world, case):
    chosen = options(
        global_step=case.model,
        norm=case.norm,
        solver=case.solver,
        variant="inexact",
        initial_radius=case.initial_radius,
    )
    chosen = dataclasses.replace(chosen, local=dataclasses.replace(chosen.local, damping=0.01))
    compare_with_one_rank(world, with_products(chosen, case.product))


@pytest.mark.mpi
@pytest.mark.parametrize("model", ["lsr1", "steihaug"])
@pytest.mark.parametrize("norm", ["2", "inf"])
def test_global_step_is_in_the_ball_and_its_prediction_is_the_model(world, model, norm):
    """Against a model on one process, from the whole batch."""
    network = classifier()
    inputs, targets = classified()
    chosen = options(global_step=model, norm=norm, subdomains=3, initial_radius=0.3)
    solver = make_solver(world, chosen, network)

    def gradient():
        loss = cross_entropy(network(inputs), targets)
        return flat(torch.autograd.grad(loss, list(network.parameters())))

    memory = LSR1()
    find = solver.holding.global_step.find
    points, seen = [], []

    def checked(passes, own, radius, same):
        if model == "lsr1":
            before, slope = points[-1]
            memory.update(solver.holding.objective.vector.values - before, gradient() - slope)
            expected = memory
        else:
            products = GaussNewtonProducts(network(inputs), targets, cross_entropy, list(network.parameters()))
            expected = ProductModel(products)
        step, predicted = find(passes, own, radius, same)
        kind = 2.0 if norm == "2" else math.inf
        assert torch.linalg.vector_norm(step, kind).item() <= radius * (1.0 + 1e-12)
        assert predicted == pytest.approx(expected.predict(gradient(), step), rel=1e-8)
        assert predicted > 0.0
        seen.append(step)
        return step, predicted

    solver.holding.global_step.find = checked
    for _ in range(4):
        before, slope = solver.holding.objective.vector.values.clone(), gradient()
        points.append((before, slope))
        solver.step((inputs, targets))
    assert len(seen) == 4
    assert model != "lsr1" or 0 < len(memory.steps) == len(solver.holding.global_step.memory.steps)


def linear_problem():
    """A least-squares fit: its minimum is known, and its Gauss-Newton matrix is its Hessian."""
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    extended = torch.cat([inputs, torch.ones(60, 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(extended, targets).solution
    return nn.Linear(4, 2).double(), (inputs, targets), torch.cat([solution[:-1].T.flatten(), solution[-1]])


@pytest.mark.parametrize(
    "choice",
    [
        {"solver": "lsr1", "iterations": 4},
        {"solver": "steihaug", "iterations": 4},
        {"solver": "sgd", "global_step": "lsr1"},
        {"solver": "sgd", "global_step": "steihaug"},
    ],
    ids=lambda choice: "-".join(map(str, choice.values())),
)
def test_a_quadratic_is_brought_to_its_minimum(choice):
    torch.manual_seed(0)
    network, batch, solution = linear_problem()
    solver = make_solver(
        MPI.COMM_SELF, options(variant="exact", subdomains=1, initial_radius=1.0, **choice), network, squared_error
    )
    for iteration in range(40):
        solver.step(batch if iteration == 0 else None)
    torch.testing.assert_close(flat(network.parameters()), solution, rtol=1e-5, atol=1e-5)


@pytest.mark.mpi
@choices
def test_not_a_number_changes_nothing(world, choice):
    inputs, targets = classified()
    broken = inputs.clone()
    broken[7] = math.nan
    network = classifier()
    solver = make_solver(world, chosen_options(choice, iterations=2, global_step=choice["solver"]), network)
    before = flat(network.parameters())
    assert not any(result.accepted for result in [solver.step((broken, targets)), solver.step()])
    assert torch.equal(flat(network.parameters()), before)
    assert solver.step((inputs, targets)).accepted


def test_gauss_newton_products_need_outputs_that_meet_the_loss():
    bad = options(variant="inexact", solver="steihaug")
    with pytest.raises(InvalidInput, match=r"local\.product.*inexact.*--schwarz\.variant exact"):
        APTS(classifier(), cross_entropy, comm=MPI.COMM_SELF, options=bad)
    solver = APTS(classifier(), cross_entropy, comm=MPI.COMM_SELF, options=options(variant="auto", solver="steihaug"))
    assert solver.options.schwarz.variant == "exact"


def test_products_are_named():
    with pytest.raises(InvalidInput, match=r"local\.product: 'fisher' is not allowed"):
        LocalOptions(product="fisher")


def test_gram_matrix():
    """Of a slice of rows, as a block is one of all subdomains' rows; symmetric to the bit."""
    rows = torch.randn(50, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[:, 3:10]
    matrix = gram(rows)
    torch.testing.assert_close(matrix, rows.T @ rows, rtol=1e-13, atol=1e-13)
    assert torch.equal(matrix, matrix.T)
