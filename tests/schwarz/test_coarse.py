"""The coarse level against dense formulas: reduced matrices, steps, predictions, and degenerate input."""

import dataclasses

import networks
import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from apts_mpi import APTS, APTSOptions, CoarseOptions, LocalOptions, SchwarzOptions, TrustRegionOptions
from apts_mpi.curvature.linearisation import Column, Linearisation
from apts_mpi.network.parameters import FlatParameters
from apts_mpi.network.segments import SegmentedNetwork
from apts_mpi.objective.batch import Batch
from apts_mpi.objective.mean_loss import MeanLoss
from apts_mpi.objective.objective import Objective
from apts_mpi.objective.passes import Pass
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.schwarz.reduced_curvature import RowCurvature, share_of_samples
from apts_mpi.schwarz.reduced_model import ReducedModel, orthonormal_coefficients
from apts_mpi.tools.events import Events
from apts_mpi.trust_region.subproblem import minimise_in_ball

SELF = Communicator(MPI.COMM_SELF, Events())


def dense_jacobian(network, outputs_of, inputs):
    """d outputs / d parameters, shape (outputs, parameters), one reverse pass an output."""
    outputs = outputs_of(network, inputs).flatten()
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(value, list(network.parameters()), retain_graph=True)])
        for value in outputs
    ]
    return torch.stack(rows)


def dense_hessian(loss, outputs, targets):
    shape = outputs.shape
    return torch.autograd.functional.hessian(lambda point: loss(point.view(shape), targets), outputs.detach().flatten())


def huber_targets(outputs):
    return torch.zeros_like(outputs)


LOSSES = {
    "cross entropy": (nn.functional.cross_entropy, lambda outputs: torch.arange(len(outputs)) % 3),
    "squared error": (nn.functional.mse_loss, lambda outputs: torch.ones_like(outputs)),
    "binary cross entropy": (
        nn.functional.binary_cross_entropy_with_logits,
        lambda outputs: (outputs > 0).to(outputs.dtype),
    ),
    "log cosh": (lambda outputs, targets: (outputs - targets).cosh().log().mean(), torch.zeros_like),
}

NETWORKS = {
    "multilayer": lambda: nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)
    ),
    "convolutional": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Sigmoid(), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 3)
    ),
    "normalised": lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_reduced_matrix_equals_the_dense_one(name, loss):
    torch.manual_seed(0)
    network = NETWORKS[name]().double()
    inputs = torch.randn(9, 5, dtype=torch.float64)
    function, make_targets = LOSSES[loss]
    outputs = network(inputs)
    targets = make_targets(outputs.detach())
    vector = FlatParameters(network)
    size = vector.values.numel()
    # Ranges that overlap, cut tensors, and leave the first layers out.
    ranges = [(0, size), (3, 20), (size // 2, size - 1), (size - 4, size)]
    columns = [Column(a, b, torch.randn(b - a, dtype=torch.float64)) for a, b in ranges]
    dense = torch.zeros(size, len(columns), dtype=torch.float64)
    for number, column in enumerate(columns):
        dense[column.start : column.stop, number] = column.values
    product = dense_jacobian(network, lambda net, x: net(x), inputs) @ dense
    expected = product.T @ dense_hessian(function, outputs, targets) @ product

    segmented = SegmentedNetwork(network, None)
    segmented.measure(inputs)
    found = linearised(segmented, vector, function).reduced(
        Pass(inputs, targets, 1.0, (0,), (), 0, len(inputs)), columns
    )
    # Both are sums of a few hundred float64 products.
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def linearised(segmented, vector, loss):
    objective = Objective(
        segmented=segmented, vector=vector, loss=MeanLoss(loss), inexact=False, keep_gradients=False, comm=SELF
    )
    return Linearisation(objective)


def test_linearising_leaves_running_statistics_alone():
    network = NETWORKS["normalised"]().double()
    before = [buffer.clone() for buffer in network.buffers()]
    vector, segmented = FlatParameters(network), SegmentedNetwork(network, None)
    inputs = torch.randn(9, 5, dtype=torch.float64)
    segmented.measure(inputs[:2])
    before = [buffer.clone() for buffer in network.buffers()]
    column = Column(0, vector.values.numel(), torch.randn_like(vector.values))
    linearised(segmented, vector, nn.functional.mse_loss).reduced(
        Pass(inputs, torch.zeros(9, 3, dtype=torch.float64), 1.0, (0,), (), 0, 9), [column]
    )
    for buffer, saved in zip(network.buffers(), before, strict=True):
        assert torch.equal(buffer, saved)
    assert network[1].track_running_stats


def test_one_column_a_parameter_gives_the_dense_gauss_newton_step():
    """A subdomain a parameter, and no damping: the span is everything."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    inputs, targets = torch.randn(20, 2, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    jacobian = dense_jacobian(network, lambda net, x: net(x), inputs)
    residual = (network(inputs) - targets).flatten().detach()
    gradient = 2.0 / 20.0 * jacobian.T @ residual
    matrix = 2.0 / 20.0 * jacobian.T @ jacobian
    before = torch.cat([value.detach().flatten().clone() for value in network.parameters()])
    for radius in (1e-2, 0.3):
        expected = minimise_in_ball(matrix.numpy(), gradient.numpy(), radius)
        copy = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        copy.load_state_dict(network.state_dict())
        base = networks.options(
            subdomains=len(gradient), partition="index", solver="sgd", initial_radius=radius, eta1=0.0, shrink_below=0.0
        )
        chosen = dataclasses.replace(
            base, coarse=CoarseOptions(model="gauss-newton", columns=("correction",), samples=1.0, damping=0.0)
        )
        solver = APTS(copy, nn.functional.mse_loss, comm=MPI.COMM_SELF, options=chosen)
        result = solver.step((inputs, targets))
        step = solver.holding.coarse.step.numpy()
        np.testing.assert_allclose(step, expected, rtol=1e-6, atol=1e-9)
        predicted = -(gradient.numpy() @ step + 0.5 * step @ matrix.numpy() @ step)
        assert result.schwarz.predicted_reduction == pytest.approx(predicted, rel=1e-8)
    assert torch.equal(before, torch.cat([value.detach().flatten() for value in network.parameters()]))


def test_model_value_and_orthonormal_basis():
    generator = np.random.default_rng(0)
    columns = generator.normal(size=(30, 5))
    columns[:, 3] = 2.0 * columns[:, 1]  # dependent
    columns[:, 4] = 0.0
    gram = columns.T @ columns
    basis = columns @ orthonormal_coefficients(gram)
    assert basis.shape == (30, 3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-10)
    half = generator.normal(size=(30, 30))
    curvature = half @ half.T
    slope = generator.normal(size=30)
    model = ReducedModel(columns.T @ slope, columns.T @ curvature @ columns, gram)
    coefficients = model.minimise(0.1, damping=0.0, kind="2")
    step = columns @ coefficients
    assert np.linalg.norm(step) <= 0.1 * (1 + 1e-12)
    assert model.reduction(coefficients) == pytest.approx(-(slope @ step + 0.5 * step @ curvature @ step), rel=1e-10)
    for _ in range(200):  # no point of the span in the ball is better
        other = columns @ generator.normal(size=5)
        other *= 0.1 * generator.random() / np.linalg.norm(other)
        assert slope @ step + 0.5 * step @ curvature @ step <= slope @ other + 0.5 * other @ curvature @ other + 1e-12


@pytest.mark.parametrize("radius", [1e-2, 1e3])
def test_the_scaled_norm_is_marquardts_method(radius):
    generator = np.random.default_rng(1)
    columns = generator.normal(size=(30, 4)) * [1.0, 1e-3, 1e3, 1.0]
    half = generator.normal(size=(30, 30))
    curvature = columns.T @ (half @ half.T) @ columns
    slope = columns.T @ generator.normal(size=30)
    model = ReducedModel(slope, curvature, columns.T @ columns)
    coefficients = model.minimise(radius, damping=0.1, kind="scaled")
    # (C + shift diag C) a = -slope, with a shift above the damping only where the ball asks for it.
    shifts = -(curvature @ coefficients + slope) / (np.diag(curvature) * coefficients)
    np.testing.assert_allclose(shifts, shifts.mean(), rtol=1e-6)
    length = np.linalg.norm(columns @ coefficients)
    if radius == 1e3:
        assert shifts.mean() == pytest.approx(0.1, rel=1e-8) and length < radius
    else:
        assert shifts.mean() > 0.1 and length == pytest.approx(radius, rel=1e-8)
    # The lengths of the columns do not matter, unlike in the 2-norm.
    units = np.array([1.0, 10.0, 0.1, 5.0])
    scaled = ReducedModel(slope * units, curvature * np.outer(units, units), (columns * units).T @ (columns * units))
    other = scaled.minimise(radius, damping=0.1, kind="scaled")
    np.testing.assert_allclose(other * units, coefficients, rtol=1e-6)


def test_columns_without_curvature_and_the_scaled_norm():
    """They are followed to the ball, alone and beside others, and so is negative curvature."""
    slope = np.array([-1.0, -1.0])
    for curvature, expected in [
        (np.zeros((2, 2)), np.sqrt([0.5, 0.5])),
        # Shift and damping m with 1e4 * 1e-6 * m = 1 keep the second in the ball.
        (np.diag([1e4, 0.0]), np.array([1.0 / (1e4 * 101.0), 1.0])),
        (np.diag([-1.0, -1.0]), np.sqrt([0.5, 0.5])),
    ]:
        model = ReducedModel(slope, curvature, np.eye(2))
        found = model.minimise(1.0, damping=0.1, kind="scaled")
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert np.linalg.norm(found) == pytest.approx(1.0, rel=1e-6)


def test_columns_of_far_apart_curvature_are_all_kept_in_the_scaled_norm():
    """Columns are not orthogonal, so that every vector of an orthonormal basis has a part of the steepest."""
    generator = np.random.default_rng(3)
    columns = np.linalg.qr(generator.normal(size=(20, 3)))[0] @ (np.eye(3) + 0.3)
    curvature = np.diag([1.0, 1e-3, 1e-5])
    model = ReducedModel(np.array([-1.0, -1e-3, -1e-5]), curvature, columns.T @ columns)
    found = model.minimise(1e3, damping=0.1, kind="scaled")
    np.testing.assert_allclose(found, 1.0 / 1.1, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "batch_size", "share"),
    [((1,), 256, 1.0), ((1,), 2048, 0.25), ((16,), 64, 0.5), ((64,), 64, 0.125), ((64,), 4, 1.0)],
)
def test_as_many_samples_as_have_enough_targets(shape, batch_size, share):
    samples = torch.zeros(batch_size, 1), torch.zeros(batch_size, *shape)
    part = Pass(*samples, 1.0, (0,), (), 0, batch_size)
    assert share_of_samples(None, Batch(samples, None, [part], batch_size, [1.0])) == share
    assert share_of_samples(0.75, Batch(samples, None, [part], batch_size, [1.0])) == 0.75


@pytest.mark.mpi
@pytest.mark.all_sizes(overlap=5, iterations=1)
@pytest.mark.parametrize("overlap", [0, 5])
@pytest.mark.parametrize(("loss", "iterations"), [("cross_entropy", 1), ("mse_loss", 2)])
def test_curvature_from_the_rows_of_dense_blocks_equals_the_dense_one(world, overlap, loss, iterations):
    """Each rank has rows of its own subdomains only, teams split the samples, a second local iteration has others."""
    torch.manual_seed(0)
    network = NETWORKS["multilayer"]().double()
    inputs = torch.randn(23, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(23) % 3 if loss == "cross_entropy" else inputs[:, :3].sin()
    function = getattr(nn.functional, loss)
    options = APTSOptions(
        subdomains=3,
        schwarz=SchwarzOptions(variant="exact", partition="index", overlap=overlap),
        local=LocalOptions(solver="gauss-newton", iterations=iterations),
    )
    solver = APTS(network, function, comm=world, options=options)
    accepted = solver.step((inputs, targets)).accepted
    values, last_step = solver.holding.objective.vector.values.clone(), solver.holding.coarse.last_step.clone()
    solver.step((inputs, targets))
    assert accepted and isinstance(solver.holding.coarse.curvature, RowCurvature)
    if world.rank > 0:
        return
    solver.holding.objective.vector.values.copy_(values)
    columns = torch.zeros(len(values), 6, dtype=torch.float64)
    for part in solver.holding.decomposition.subdomains:
        owned = slice(part.owned_start, part.owned_stop)
        columns[owned, part.index] = solver.holding.schwarz.correction[owned]
        columns[owned, 3 + part.index] = last_step[owned]
    product = dense_jacobian(network, lambda net, x: net(x), inputs) @ columns
    hessian = dense_hessian(function, network(inputs), targets)
    np.testing.assert_allclose(
        solver.holding.coarse.model.curvature, product.T @ hessian @ product, rtol=1e-9, atol=1e-15
    )


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_corrections_of_the_step_before_widen_the_span(world):
    """With them the reduced model is never worse, and the iterates are those of one rank."""

    def run(comm, *columns):
        base = gauss_newton(initial_radius=0.1, subdomains=3)
        coarse = dataclasses.replace(base.coarse, columns=("correction", *columns), damping=0.0, samples=1.0)
        solver = networks.make_solver(comm, dataclasses.replace(base, coarse=coarse))
        first, second = (solver.step(networks.classified(seed=seed)).schwarz for seed in (1, 2))
        return first, second, solver

    plain, wide, serial = run(world), run(world, "last_correction"), run(MPI.COMM_SELF, "last_correction")
    assert plain[0].accepted
    assert plain[0].predicted_reduction == pytest.approx(wide[0].predicted_reduction, rel=1e-10)
    assert wide[1].predicted_reduction > plain[1].predicted_reduction
    assert wide[2].holding.coarse.last_correction.norm() > 0.0
    torch.testing.assert_close(
        *(solver.holding.objective.vector.values for solver in (wide[2], serial[2])), rtol=1e-8, atol=1e-12
    )


def test_dense_gauss_newton_alone_is_the_trust_region_step():
    """One subdomain, no coarse level, full data: the exact minimiser of the model in the ball, within a tenth of it."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    inputs, targets = torch.randn(20, 2, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    jacobian = dense_jacobian(network, lambda net, x: net(x), inputs)
    gradient = 2.0 / 20.0 * jacobian.T @ (network(inputs) - targets).flatten().detach()
    matrix = 2.0 / 20.0 * jacobian.T @ jacobian
    matrix.diagonal().add_(1e-7 * matrix.diagonal().mean())
    for radius in (1e-2, 0.3, 1e3):
        copy = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        copy.load_state_dict(network.state_dict())
        chosen = networks.options(
            subdomains=1, solver="gauss-newton", variant="exact", local_data="full", initial_radius=radius
        )
        solver = APTS(copy, nn.functional.mse_loss, comm=MPI.COMM_SELF, options=chosen)
        solver.step((inputs, targets))
        step = solver.holding.schwarz.correction
        exact = torch.from_numpy(minimise_in_ball(matrix.numpy(), gradient.numpy(), radius))
        best, found = (-(gradient @ x + 0.5 * x @ matrix @ x).item() for x in (exact, step))
        assert step.norm() <= radius * (1 + 1e-12) and found >= 0.9 * best


def gauss_newton(**changes):
    base = networks.options(**{"solver": "kfac", "variant": "inexact", **changes})
    return dataclasses.replace(base, coarse=CoarseOptions(samples=0.5, damping=0.1))


@pytest.mark.parametrize("norm", ["2", "inf"])
def test_steps_stay_in_the_ball(norm):
    solver = networks.make_solver(MPI.COMM_SELF, gauss_newton(norm=norm, initial_radius=1e-3))
    for _ in range(8):
        judged = solver.step(networks.classified()).schwarz
        assert judged.step_norm <= judged.radius * (1 + 1e-12)


def test_zero_gradient_and_zero_corrections_are_a_rejection():
    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    inputs = torch.randn(12, 3, dtype=torch.float64)
    targets = network(inputs).detach()
    solver = networks.make_solver(MPI.COMM_SELF, gauss_newton(subdomains=2), network, nn.functional.mse_loss)
    before = solver.holding.objective.vector.values.clone()
    result = solver.step((inputs, targets))
    assert not result.accepted
    assert torch.equal(solver.holding.objective.vector.values, before)


def test_a_linearisation_that_is_not_a_number_gives_the_plain_sum():
    """The loss and its gradient are finite, its second derivative is not: |x|^1.5 at 0."""

    def loss(outputs, targets):
        return (outputs - targets).abs().clamp_min(0.0).pow(1.5).mean()

    network = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    inputs = torch.randn(12, 3, dtype=torch.float64)
    targets = network(inputs).detach()
    targets[6:] += 1.0
    solver = networks.make_solver(MPI.COMM_SELF, gauss_newton(subdomains=2), network, loss)
    result = solver.step((inputs, targets))
    assert result.accepted and result.schwarz.predicted_reduction > 0.0
    torch.testing.assert_close(solver.holding.coarse.step, solver.holding.schwarz.correction)
    (note,) = result.notes
    assert "is not finite" in note


def test_a_loss_not_convex_in_the_outputs_still_goes_down():
    def loss(outputs, targets):
        return torch.sin(outputs - targets).mean()

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    batch = torch.randn(30, 3, dtype=torch.float64), torch.zeros(30, 1, dtype=torch.float64)
    solver = networks.make_solver(MPI.COMM_SELF, gauss_newton(subdomains=2), network, loss)
    results = [solver.step(batch).schwarz for _ in range(20)]
    assert results[-1].trial_loss < results[0].loss - 0.5
    assert all(judged.predicted_reduction > 0.0 for judged in results)


def test_a_rejected_step_costs_one_loss_evaluation_and_no_gradient():
    chosen = dataclasses.replace(
        gauss_newton(initial_radius=5.0),
        trust_region=TrustRegionOptions(initial_radius=50.0, eta1=0.98, eta2=0.99, shrink_below=0.98),
    )
    solver = networks.make_solver(MPI.COMM_SELF, chosen)
    results = [solver.step(networks.classified())]
    while results[-1].accepted:
        results.append(solver.step(networks.classified()))
    assert solver.holding.coarse.raised > 1.0
    again = solver.step()
    assert again.gradient_evaluations == pytest.approx(1.0 / 3.0)
    assert again.schwarz.loss == results[-1].schwarz.loss
    assert again.schwarz.step_norm <= results[-1].schwarz.radius


@pytest.mark.mpi
@pytest.mark.all_sizes(local_data="shard")
@pytest.mark.parametrize("local_data", ["shard", "full"])
def test_iterates_do_not_depend_on_the_ranks(world, local_data):
    def iterates(comm):
        solver = networks.make_solver(comm, gauss_newton(local_data=local_data))
        results = [networks.numbers(solver.step(networks.classified())) for _ in range(5)]
        return np.array(results).ravel(), solver.holding.objective.vector.values

    numbers, values = iterates(world)
    serial_numbers, serial_values = iterates(MPI.COMM_SELF)
    np.testing.assert_allclose(numbers, serial_numbers, rtol=1e-8)
    torch.testing.assert_close(values, serial_values, rtol=1e-8, atol=1e-12)


def test_the_samples_that_measure_the_curvature_do_not_depend_on_the_ranks():
    inputs = torch.arange(11.0)
    for share in (0.1, 0.5, 0.7, 1.0):
        whole = Pass(inputs, inputs, 11 / 20, (0,), (), 0, 11).thinned(share)
        assert whole.weight == pytest.approx(11 / 20)
        parts = [
            Pass(inputs[a:b], inputs[a:b], (b - a) / 20, (0,), (), a, 11).thinned(share)
            for a, b in ((0, 1), (1, 6), (6, 11))
        ]
        found = [part for part in parts if part is not None]
        assert torch.equal(torch.cat([part.inputs for part in found]), whole.inputs)
        assert sum(part.weight for part in found) == pytest.approx(whole.weight)
        for part in found:  # every chosen sample weighs the same
            assert part.weight / len(part.inputs) == pytest.approx(whole.weight / len(whole.inputs))


def test_defaults_compose():
    solver = APTS(networks.classifier(), networks.cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions(subdomains=3))
    assert solver.options.local == LocalOptions(solver="kfac", damping=0.3, relax=False, refresh=5, momentum=0.0)
    assert solver.options.schwarz.variant == "inexact" and solver.options.schwarz.local_data == "shared"
    assert solver.options.coarse.model == "gauss-newton"


def data_options(**changes):
    base = networks.options(**{"solver": "kfac", "variant": "exact", "subdomains": 3, **changes})
    schwarz = dataclasses.replace(base.schwarz, decomposition="data")
    return dataclasses.replace(base, schwarz=schwarz, coarse=CoarseOptions(samples=1.0))


@pytest.mark.mpi
@pytest.mark.all_sizes(model="gauss-newton")
@pytest.mark.parametrize("model", ["none", "gauss-newton"])
def test_decomposition_of_data_does_not_depend_on_the_ranks(world, model):
    def iterates(comm):
        chosen = dataclasses.replace(data_options(), coarse=CoarseOptions(model=model, samples=1.0))
        solver = networks.make_solver(comm, chosen)
        numbers = [networks.numbers(solver.step(networks.classified())) for _ in range(4)]
        return np.array(numbers).ravel(), solver.holding.objective.vector.values

    numbers, values = iterates(world)
    serial_numbers, serial_values = iterates(MPI.COMM_SELF)
    np.testing.assert_allclose(numbers, serial_numbers, rtol=1e-8)
    torch.testing.assert_close(values, serial_values, rtol=1e-8, atol=1e-12)


def test_decomposition_of_data_averages_first_order_consistent_corrections():
    """One steepest-descent iteration: every shard starts from the global gradient, so the mean is the global step."""
    chosen = dataclasses.replace(data_options(solver="sgd"), coarse=CoarseOptions(model="none"))
    solver = networks.make_solver(MPI.COMM_SELF, chosen)
    _, gradient = networks.loss_and_gradient(networks.classifier(), networks.cross_entropy, networks.classified())
    judged = solver.step(networks.classified()).schwarz
    expected = -judged.radius * gradient / gradient.norm()
    torch.testing.assert_close(solver.holding.schwarz.correction, expected, rtol=1e-10, atol=1e-14)
