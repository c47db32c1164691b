"""Batches, targets and outputs that are trees of tensors, by every local solver, on any number of ranks."""

import collections
import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from mpi4py import MPI
from networks import cross_entropy, flat, make_solver, numbers, options
from torch import nn
from tree_networks import Found, convex, coupled, coupled_in_mapping, make_two_inputs, two_inputs

from apts_mpi import APTS, APTSOptions, CoarseOptions, GlobalStepOptions, InvalidInput, LocalOptions, StagedAPTS
from apts_mpi.curvature.linearisation import Column, Linearisation
from apts_mpi.curvature.products import GaussNewtonProducts
from apts_mpi.curvature.rows import GaussNewtonRows
from apts_mpi.network.activations import differentiable
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Cache, Pass
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.tools.events import Events

SELF = Communicator(MPI.COMM_SELF, Events())


def dense_curvature(network, loss, batch):
    """``J^T H J`` of the outputs that are numbers, all of them together; no curvature is left out."""
    inputs, targets = batch
    outputs = network(**inputs)
    names = [name for name in ("classes", "value", "extent") if getattr(outputs, name).requires_grad]
    parts = [getattr(outputs, name) for name in names]
    values = torch.cat([part.flatten() for part in parts])
    parameters = list(network.parameters())
    rows = [torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True) for value in values]
    jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])

    def of_values(values):
        split = values.split([part.numel() for part in parts])
        shaped = {name: part.view_as(like) for name, part, like in zip(names, split, parts, strict=True)}
        return loss(replace(outputs, **shaped), targets)

    return jacobian.T @ torch.autograd.functional.hessian(of_values, values.detach()) @ jacobian


def curved(outputs, targets):
    """With curvature between the auxiliary output, which has no samples, and the others."""
    return coupled(outputs, targets) + (outputs.extent * outputs.value).mean()


def objective_of(network, loss, inputs):
    segmented, vector = SegmentedNetwork(network, None), FlatParameters(network)
    segmented.measure(inputs)
    return Objective(segmented=segmented, vector=vector, loss=loss, inexact=False, keep_gradients=False, comm=SELF)


@pytest.mark.parametrize("loss", [coupled, curved])
def test_the_reduced_matrix_is_that_of_the_joint_hessian(loss):
    network, batch = make_two_inputs(), two_inputs(9)
    dense = dense_curvature(network, loss, batch)
    objective = objective_of(network, loss, batch[0])
    size = len(dense)
    ranges = [(0, size), (3, 20), (size // 2, size - 1), (size - 4, size)]
    columns = [Column(a, b, torch.randn(b - a, dtype=torch.float64)) for a, b in ranges]
    matrix = torch.zeros(size, len(columns), dtype=torch.float64)
    for number, column in enumerate(columns):
        matrix[column.start : column.stop, number] = column.values
    found = Linearisation(objective).reduced(Pass(*batch, 1.0, (0,), (), 0, 9), columns)
    # Both are sums of a few hundred float64 products.
    torch.testing.assert_close(found, matrix.T @ dense @ matrix, rtol=1e-10, atol=1e-12)
    products = GaussNewtonProducts(network(**batch[0]), batch[1], loss, list(network.parameters()))
    torch.testing.assert_close(products(matrix[:, 0]), dense @ matrix[:, 0], rtol=1e-10, atol=1e-12)


def test_rows_of_dense_blocks_are_those_of_the_joint_hessian():
    network, batch = make_two_inputs(), two_inputs(9)
    dense = dense_curvature(network, convex, batch)
    solver = make_solver(MPI.COMM_SELF, options(subdomains=1, solver="gauss-newton"), network, convex)
    solver.step(batch)  # has cut it
    network.load_state_dict(make_two_inputs().state_dict())
    run = solver.holding.objective.evaluate(solver.batch.passes)
    rows = GaussNewtonRows(solver.holding.objective, run.caches[0])
    assert rows.count() == 9 * 4
    found = rows.of(0, len(dense))
    torch.testing.assert_close(found.T @ found, dense, rtol=1e-9, atol=1e-11)


SOLVERS = {
    "sgd": options(subdomains=3),
    "adam": options(subdomains=3, solver="adam", iterations=3),
    "inexact": options(subdomains=3, solver="tr", iterations=2, variant="inexact"),
    "full": options(subdomains=2, solver="tr", iterations=2, local_data="full", global_step="first-order"),
    "gauss-newton": options(subdomains=2, solver="gauss-newton", local_data="full"),
    "coarse": replace(options(subdomains=3, solver="kfac"), coarse=CoarseOptions(model="gauss-newton")),
    "shared": replace(
        options(subdomains=3, solver="kfac", local_data="shared"), coarse=CoarseOptions(model="gauss-newton")
    ),
    "steihaug": replace(options(subdomains=3), global_step=GlobalStepOptions(model="steihaug", product="gauss-newton")),
}


def trace(solver, batches):
    found = [solver.step(batches[0]), solver.step(), solver.step(batches[1], torch.tensor([*range(30, 5, -1)]))]
    return [judged for result in found for judged in numbers(result)]


@pytest.mark.mpi
@pytest.mark.all_sizes(name="coarse")
@pytest.mark.all_sizes(name="inexact")
@pytest.mark.parametrize("name", SOLVERS)
def test_the_iterates_do_not_depend_on_the_ranks(world, name):
    batches = two_inputs(33), two_inputs(37, seed=2)
    network = make_two_inputs()
    found = trace(make_solver(world, SOLVERS[name], network, coupled), batches)
    assert world.bcast(found) == found
    assert not torch.equal(flat(network.parameters()), flat(make_two_inputs().parameters()))
    if world.rank == 0:
        alone = make_two_inputs()
        expected = trace(make_solver(MPI.COMM_SELF, SOLVERS[name], alone, coupled), batches)
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flat(network.parameters()), flat(alone.parameters()), rtol=1e-9, atol=1e-9)


@pytest.mark.mpi(min_size=2)
def test_shards_of_trees(world):
    """Each rank is given its own samples, of other numbers than its neighbours."""
    inputs, targets = two_inputs(20 * world.size)
    cut = [0, *(20 * rank + 3 for rank in range(1, world.size)), 20 * world.size]
    own = slice(cut[world.rank], cut[world.rank + 1])
    part = {name: value[own] for name, value in inputs.items()}, {name: value[own] for name, value in targets.items()}
    network = make_two_inputs()
    result = make_solver(world, options(subdomains=world.size, batch="shard"), network, coupled).step(part)
    expected = coupled(make_two_inputs()(**inputs), targets)
    assert result.schwarz.loss == pytest.approx(float(expected.detach()), rel=1e-12)


class Inputs(NamedTuple):
    image: torch.Tensor
    features: np.ndarray


def in_forms():
    """The same batch as other trees, with the function that calls the network with it."""
    (inputs, targets) = two_inputs()
    image, features = inputs.values()
    yield inputs, targets, None
    yield collections.UserDict(features=features.numpy(), image=image), collections.UserDict(targets), None
    yield (image, features), targets, lambda network, given: network(*given)
    yield Inputs(image, features.numpy()), targets, lambda network, given: network(given.image, given.features)
    yield [image, {"f": features}], targets, lambda network, given: network(given[0], given[1]["f"])


@pytest.mark.parametrize("returned", [Found, dict])
@pytest.mark.parametrize("form", range(5))
def test_other_trees_of_the_same_batch_lead_to_the_same_point(form, returned):
    inputs, targets, forward = list(in_forms())[form]
    loss = coupled if returned is Found else coupled_in_mapping
    network, expected = make_two_inputs(returned), make_two_inputs()
    chosen = APTSOptions(subdomains=2, local=LocalOptions(solver="adam"))
    solver = APTS(network, loss, comm=MPI.COMM_SELF, options=chosen, forward=forward)
    other = APTS(expected, coupled, comm=MPI.COMM_SELF, options=chosen)
    for _ in range(2):
        solver.step((inputs, targets))
        other.step(two_inputs())
    torch.testing.assert_close(flat(network.parameters()), flat(expected.parameters()), rtol=1e-10, atol=1e-10)


class OneMapping(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.features = nn.Linear(6, 8), nn.Linear(3, 8)

    def forward(self, batch):
        return torch.tanh(self.image(batch["image"].flatten(1)) + self.features(batch["features"]))


def test_a_network_that_takes_one_mapping():
    inputs, targets = two_inputs()
    network = nn.Sequential(OneMapping(), nn.Linear(8, 3)).double()
    solver = APTS(network, cross_entropy, comm=MPI.COMM_SELF)
    first, *_, last = [solver.step((inputs, targets["classes"])).schwarz.loss for _ in range(10)]
    assert last < 0.7 * first


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda inputs, targets: (tuple(inputs.values()), targets), r"image, features.*network\(\*inputs\)"),
        (lambda inputs, targets: ({"image": inputs["image"]}, targets), "arguments.*and the inputs are image"),
        (lambda inputs, targets: (inputs | {"x": inputs["image"]}, targets), "the inputs are image, features, x"),
        (lambda inputs, targets: (inputs, targets | {"value": 1.0}), r"targets\['value'\]: float"),
        (lambda inputs, targets: (inputs | {"features": "a"}, targets), r"inputs\['features'\]: str"),
        (lambda inputs, targets: (inputs | {"features": inputs["features"][1:]}, targets), "23 samples, but 24"),
        (lambda inputs, targets: (inputs, {"classes": targets["classes"][1:]}), "24 inputs but 23 targets"),
        (lambda inputs, targets: (inputs, {}), "targets: there is no tensor"),
        (lambda inputs, targets: inputs, "batch: dict is not allowed"),
    ],
)
def test_batches_that_are_refused(change, message):
    solver = make_solver(MPI.COMM_SELF, options(subdomains=2), make_two_inputs(), coupled)
    with pytest.raises(InvalidInput, match=message):
        solver.step(change(*two_inputs()))


@pytest.mark.mpi(min_size=2)
def test_another_tree_on_one_rank_is_refused_on_all(world):
    inputs, targets = two_inputs()
    if world.rank == 1:
        inputs["more"] = inputs["image"]
    solver = make_solver(world, options(subdomains=2), make_two_inputs(), coupled)
    with pytest.raises(InvalidInput, match="batch: rank 1 has another tree of inputs than rank 0"):
        solver.step((inputs, targets))


@pytest.mark.mpi(min_size=2)
def test_other_numbers_in_one_leaf_are_named(world):
    inputs, targets = two_inputs()
    if world.rank == 1:
        inputs["features"][7] += 1.0
    solver = make_solver(world, options(subdomains=2), make_two_inputs(), coupled)
    with pytest.raises(InvalidInput, match=r"inputs\['features'\] than rank 0, first in sample 7"):
        solver.step((inputs, targets))


class OwnLoss(nn.Module):
    """Computes its loss itself, from targets among its inputs."""

    def __init__(self):
        super().__init__()
        self.inner, self.scores = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, image, labels):
        scores = self.scores(torch.tanh(self.inner(image.flatten(1))))
        return {"loss": cross_entropy(scores, labels), "scores": scores}


@pytest.mark.parametrize("solver", ["auto", "kfac", "gauss-newton", "adam"])
def test_a_loss_that_the_network_computes(solver):
    inputs, targets = two_inputs()
    torch.manual_seed(0)
    network = OwnLoss().double()
    chosen = APTSOptions(local=LocalOptions(solver=solver))
    apts = APTS(network, lambda outputs, targets: outputs["loss"], comm=MPI.COMM_SELF, options=chosen)
    batch = {"image": inputs["image"], "labels": targets["classes"]}, targets["classes"]
    losses = [apts.step(batch).schwarz.loss for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert differentiable(network(**batch[0]))


def test_dense_gauss_newton_refuses_a_curved_output_without_samples():
    with pytest.raises(InvalidInput, match=r"local.solver.*24 samples reads an output of shape \(\)"):
        make_solver(MPI.COMM_SELF, options(subdomains=1, solver="gauss-newton"), make_two_inputs(), curved).step(
            two_inputs()
        )


def test_a_cache_counts_its_samples():
    inputs, targets = two_inputs(5)
    assert Cache(None, inputs, torch.empty(0), targets).samples == 5


class Mapped(nn.Linear):
    def forward(self, inputs):
        return {"hidden": super().forward(inputs)}


class Unmapped(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs["hidden"])


@pytest.mark.mpi(min_size=2)
def test_mappings_flow_within_a_rank_and_not_between_stages(world):
    network = nn.Sequential(Mapped(3, 8), Unmapped(8, 3)).double()
    inputs, targets = two_inputs()
    batch = inputs["features"], targets["classes"]
    comm = world.Split(int(world.rank < 2), world.rank)
    if world.rank < 2:
        make_solver(comm, options(subdomains=2), copy.deepcopy(network)).step(batch)
        solver = StagedAPTS(network, cross_entropy, comm=comm, options=APTSOptions(layout="staged", stall_timeout=20.0))
        with pytest.raises(Exception, match="a dict leaves the stage, and only tensors|stage 0"):
            solver.step(batch)
    comm.Free()
