"""Dense Gauss-Newton against dense formulas: few rows, teams, masks, scalars, and losses without curvature."""

import dataclasses
import math

import pytest
import torch
from mpi4py import MPI
from networks import CLASSES, FEATURES, classified, classifier, cross_entropy, flat, make_solver, options
from torch import nn

from apts_mpi import APTS, APTSOptions, InvalidInput, LocalOptions, TrustRegionOptions
from apts_mpi.curvature.dense import LARGEST_DENSE, BlockJacobian, of_rows, pull_rows, uses_rows
from apts_mpi.curvature.loss_curvature import roots
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.network.partition import split
from apts_mpi.staged.solver import StagedAPTS
from apts_mpi.trust_region.subproblem import minimise_in_ball, newton_in_ball


def dense_jacobian(outputs, parameters):
    """d outputs / d parameters, shape (outputs, parameters), one reverse pass an output."""
    rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in outputs.flatten()]
    return torch.stack([flat(row) for row in rows])


def dense_curvature(loss, outputs, targets, parameters):
    """The Gauss-Newton matrix."""
    jacobian, point = dense_jacobian(outputs, parameters), outputs.detach().flatten()
    hessian = torch.autograd.functional.hessian(lambda values: loss(values.view(outputs.shape), targets), point)
    return jacobian.T @ hessian @ jacobian


def damp(matrix, damping):
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_options(damping=1e-7, **changes):
    chosen = options(solver="gauss-newton", **changes)
    return dataclasses.replace(chosen, local=dataclasses.replace(chosen.local, damping=damping))


class Looking:
    """A local solver that lets a test look at the local objective first."""

    def __init__(self, own, look):
        self.own, self.look, self.seen = own, look, 0

    def solve(self, local, radius, kind):
        self.look(local)
        self.own.solve(local, radius, kind)
        self.seen += 1


@pytest.mark.parametrize("damping", [1e-7, 1e-2])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("radius", [1e-3, 0.3, 20.0, 1e12])
def test_step_in_the_span_of_the_rows_is_that_of_the_whole_matrix(radius, inside, damping):
    """For a slope that is a combination of the rows, and for one that is not."""
    rows = normal(20, 300) * torch.logspace(0.0, -3.0, 20, dtype=torch.float64)[:, None]
    slope = rows.sum(dim=0) if inside else normal(300, seed=1)
    matrix = damp(rows.T @ rows, damping)
    added = matrix[0, 0] - rows[:, 0] @ rows[:, 0]
    expected, shift = newton_in_ball(matrix, slope, radius)
    basis, rows, slope = of_rows(rows, slope)
    small = rows.T @ rows
    small.diagonal().add_(added)
    step, own_shift = newton_in_ball(small, slope, radius)
    # Of a damping of 1e-7 that many digits are left.
    torch.testing.assert_close(basis @ step, expected, rtol=0.0, atol=1e-7 * expected.norm().item())
    assert own_shift == pytest.approx(shift, rel=1e-7)


@pytest.mark.mpi
@pytest.mark.all_sizes(radius=0.05, local_data="shard", subdomains=2)
@pytest.mark.parametrize("local_data", ["full", "shard"])
@pytest.mark.parametrize(("subdomains", "replicas"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("radius", [0.05, 1e4])
def test_few_rows_give_the_step_of_the_dense_matrix(world, local_data, subdomains, replicas, radius):
    """Ranks of a team share the rows; those of a shard do not span the gradient of the whole batch."""
    if world.size % replicas:
        pytest.skip("needs a multiple of the replicas")
    network, (inputs, targets) = classifier(), classified(17)
    parameters = list(network.parameters())
    gradient = flat(torch.autograd.grad(cross_entropy(network(inputs), targets), parameters))
    curvatures = []
    for part in range(subdomains):
        own = slice(*split(17, subdomains, part)) if local_data == "shard" else slice(0, 17)
        curvatures.append(dense_curvature(cross_entropy, network(inputs[own]), targets[own], parameters))
    chosen = dense_options(
        damping=1e-3,
        subdomains=subdomains,
        replicas=replicas,
        partition="index",
        local_data=local_data,
        initial_radius=radius,
    )
    solver = make_solver(world, chosen, network)
    solver.step((inputs, targets))
    reach = radius / subdomains**0.5
    for part, curvature in zip(solver.holding.decomposition.subdomains, curvatures, strict=True):
        block = slice(part.start, part.stop)
        assert uses_rows(17 * CLASSES, part.stop - part.start)
        matrix, slope, step = (
            damp(curvature[block, block], 1e-3),
            gradient[block],
            solver.holding.schwarz.correction[block],
        )
        expected, _ = newton_in_ball(matrix, slope, reach)
        torch.testing.assert_close(step, expected, rtol=0.0, atol=1e-9 * expected.norm().item())
        best = torch.from_numpy(minimise_in_ball(matrix.numpy(), slope.numpy(), reach))
        drops = [-(slope @ x + 0.5 * x @ matrix @ x).item() for x in (step, best)]
        assert drops[0] >= 0.9 * drops[1] > 0.0


def test_few_rows_are_used_where_that_costs_less():
    assert uses_rows(20, 3721)
    assert not uses_rows(2000, 640)
    assert not uses_rows(600, 640)
    assert uses_rows(LARGEST_DENSE, LARGEST_DENSE + 1)  # of which there is no matrix


def large_problem(samples):
    network = nn.Sequential(nn.Linear(200, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    return network, (normal(samples, 200), normal(samples, 1, seed=1))


@pytest.mark.mpi
def test_a_large_block_needs_a_small_batch(world, monkeypatch):
    chosen = dense_options(subdomains=1, initial_radius=1.0)
    network, batch = large_problem(16)
    assert make_solver(world, chosen, network, nn.functional.mse_loss).step(batch).accepted
    network, batch = large_problem(LARGEST_DENSE + 1)
    solver = make_solver(world, chosen, network, nn.functional.mse_loss)
    monkeypatch.setattr(BlockJacobian, "rows", lambda *_: pytest.fail("there is no memory for them"))
    with pytest.raises(InvalidInput, match=r"12929 parameters and a batch of 4097 rows .* both exceed"):
        solver.step(batch)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_all_ranks_hear_of_a_block_that_is_too_large(world):
    """The second subdomain is small, and its ranks have nothing against it."""
    network, batch = large_problem(LARGEST_DENSE + 1)
    chosen = dense_options(subdomains=2, partition="layer", local_data="full", initial_radius=1.0)
    solver = make_solver(world, chosen, network, nn.functional.mse_loss)
    assert [part.stop - part.start > LARGEST_DENSE for part in solver.holding.decomposition.subdomains] == [True, False]
    where = "rank 0: " if world.size > 1 else ""
    with pytest.raises(SharedInvalidInput, match=f"^{where}local.solver: 'gauss-newton' .* both exceed"):
        solver.step(batch)


@pytest.mark.mpi
def test_samples_that_are_not_numbers_are_a_rejection(world):
    network, (inputs, targets) = classifier(), classified()
    inputs[5, 3] = math.nan
    solver = make_solver(world, dense_options(subdomains=2, local_data="full"), network)
    before = flat(network.parameters())
    assert not any(result.accepted for result in [solver.step((inputs, targets)), solver.step()])
    assert torch.equal(flat(network.parameters()), before)
    assert solver.step(classified()).accepted


def test_roots_of_other_samples_than_those_that_are_not_numbers():
    outputs, targets = normal(6, 3), torch.arange(6) % 3
    expected = roots(cross_entropy, outputs, targets)
    outputs[2, 1] = math.nan
    found = roots(cross_entropy, outputs, targets)
    kept = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[kept], expected[kept], rtol=1e-12, atol=1e-15)
    assert found.isfinite().all()


LINEAR_LOSSES = {
    "mean": lambda outputs, targets: outputs.mean(),
    "weighted": lambda outputs, targets: (outputs * torch.ones(3, dtype=outputs.dtype, requires_grad=True)).mean(),
}


@pytest.mark.parametrize("name", LINEAR_LOSSES)
def test_a_loss_linear_in_the_outputs_has_no_curvature(name):
    found = roots(LINEAR_LOSSES[name], normal(5, 3), torch.zeros(5))
    assert torch.equal(found, torch.zeros(5, 3, 3, dtype=torch.float64))


@pytest.mark.mpi
@pytest.mark.parametrize("samples", [8, 100])
def test_without_curvature_the_step_goes_down_the_gradient(world, samples):
    """Deep Ritz: the outputs are the density of an energy, and the loss is their mean."""

    def density(network, points):
        def value(point):
            return (point * (1.0 - point) * network(point[None])[0])[0]

        slopes = torch.func.vmap(torch.func.grad(value))(points)
        return 0.5 * slopes.square() - torch.func.vmap(value)(points)[:, None]

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    batch = torch.linspace(0.0, 1.0, samples, dtype=torch.float64)[:, None], torch.zeros(samples, 1)
    gradient = flat(torch.autograd.grad(density(network, batch[0]).mean(), list(network.parameters())))
    chosen = APTSOptions(subdomains=1, trust_region=TrustRegionOptions(initial_radius=0.1))
    solver = APTS(network, LINEAR_LOSSES["mean"], comm=world, options=chosen, forward=density)
    assert solver.options.local.solver == "gauss-newton"
    first = solver.step(batch).schwarz.loss
    step = solver.holding.coarse.step
    torch.testing.assert_close(step / step.norm(), -gradient / gradient.norm(), rtol=1e-9, atol=1e-12)
    assert 0.01 <= step.norm() <= 0.1
    for _ in range(40):
        last = solver.step().schwarz.loss
    # The energy, of which the points are a quadrature, falls from 0 and above to -1/24.
    assert last < min(0.0, first)


class Inverse(nn.Module):
    """With an unknown coefficient, a parameter without dimensions."""

    def __init__(self):
        super().__init__()
        self.coefficient = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def forward(self, inputs):
        return self.coefficient * self.network(inputs).exp()


def rows_of(network, inputs, targets, loss=nn.functional.mse_loss):
    return BlockJacobian([network], list(network.parameters()), loss).rows(inputs, targets)


def test_parameters_without_dimensions():
    torch.manual_seed(0)
    network, inputs, targets = Inverse(), normal(7, 3), normal(7, 2, seed=1)
    parameters = list(network.parameters())
    assert parameters[0].dim() == 0
    jacobian = dense_jacobian(network(inputs), parameters)
    rows = rows_of(network, inputs, targets)
    torch.testing.assert_close(rows, jacobian * (2.0 / 14.0) ** 0.5, rtol=1e-10, atol=1e-13)
    units = torch.eye(2, dtype=torch.float64)[:, None].expand(2, 7, 2)
    by_parameters, _ = pull_rows([network], parameters, inputs, [units])
    torch.testing.assert_close(by_parameters, jacobian, rtol=1e-10, atol=1e-13)


class Noisy(nn.Module):
    """Draws in several ways for each sample, without a module that says so."""

    def __init__(self, rate=0.3):
        super().__init__()
        self.first, self.last, self.rate = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES), rate

    def forward(self, inputs):
        hidden = nn.functional.dropout(torch.tanh(self.first(inputs)), self.rate)
        hidden = nn.functional.alpha_dropout(hidden, 0.2, True)
        return self.last(hidden + 0.1 * torch.randn_like(hidden))


def assert_rows_are_those_of_one_pass(make):
    """With what it draws, on all samples at once."""
    torch.manual_seed(0)
    network, (inputs, targets) = make().double(), classified(11)
    parameters = list(network.parameters())
    torch.manual_seed(5)
    expected = dense_curvature(cross_entropy, network(inputs), targets, parameters)
    torch.manual_seed(5)
    rows = rows_of(network, inputs, targets, cross_entropy)
    torch.testing.assert_close(rows.T @ rows, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize("make", [Noisy, lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(FEATURES, CLASSES))])
def test_masks_are_those_of_the_batch(monkeypatch, make, chunk):
    monkeypatch.setattr("apts_mpi.curvature.dense.SAMPLES_AT_ONCE", chunk)
    assert_rows_are_those_of_one_pass(make)


@pytest.mark.mpi
def test_masks_are_those_of_the_pass(world):
    """The gradient of squared outputs is a combination of the rows, if these have its masks."""
    torch.manual_seed(0)
    network, (inputs, _) = Noisy().double(), classified(8)
    solver = make_solver(
        world,
        dense_options(subdomains=1, local_data="full"),
        network,
        lambda outputs, targets: outputs.square().mean(),
    )

    def look(local):
        local.begin()
        own = local._cache.gradient
        rows = local.gauss_newton_rows()
        assert 2 * len(rows) < len(own)
        weights = torch.linalg.lstsq(rows.T, own[:, None]).solution
        torch.testing.assert_close(rows.T @ weights, own[:, None], rtol=0.0, atol=1e-12 * own.norm().item())

    solver.holding.objective.keep_gradients = True
    looking = solver.holding.schwarz.solvers[0] = Looking(solver.holding.schwarz.solvers[0], look)
    assert solver.step((inputs, inputs)).accepted
    assert looking.seen == 1


class SharedNoise(nn.Module):
    def forward(self, inputs):
        return inputs + torch.randn(inputs.shape[1:], dtype=inputs.dtype)


class WithSlope(nn.Module):
    """Derivatives of the values by the inputs, as most programs compute them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, inputs):
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            values = self.layers(inputs)
            (slope,) = torch.autograd.grad(values.sum(), inputs, create_graph=True)
            return torch.cat([values, slope[:, : CLASSES - 1]], dim=1)


@pytest.mark.parametrize("at_once", [4, 32])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Sequential(nn.Linear(FEATURES, CLASSES), SharedNoise()),
        lambda: nn.Sequential(nn.Linear(FEATURES, CLASSES), nn.RReLU()),
        WithSlope,
    ],
    ids=["shared noise", "rrelu", "autograd.grad"],
)
def test_what_cannot_be_differentiated_sample_by_sample(monkeypatch, make, at_once):
    monkeypatch.setattr("apts_mpi.curvature.dense.OUTPUTS_AT_ONCE", at_once)
    assert_rows_are_those_of_one_pass(make)


def test_one_number_a_sample_without_a_dimension_of_its_own():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(FEATURES, 1), nn.Flatten(0)).double()
    inputs, targets = normal(7, FEATURES), normal(7, seed=1)
    jacobian = dense_jacobian(network(inputs), list(network.parameters()))
    torch.testing.assert_close(rows_of(network, inputs, targets), jacobian * (2.0 / 7.0) ** 0.5, rtol=1e-10, atol=1e-13)


class Unbatched(torch.autograd.Function):
    """Without a rule for several backward passes at once."""

    @staticmethod
    def forward(ctx, inputs):
        return inputs.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float(gradient.sum() * 0.0 + 1.0)


def test_outputs_that_cannot_be_differentiated_several_at_once_are_one_by_one():
    class Module(nn.Linear):
        def forward(self, inputs):
            return Unbatched.apply(super().forward(inputs))

    network, (inputs, targets) = Module(FEATURES, CLASSES).double(), classified(11)
    plain = nn.Linear(FEATURES, CLASSES).double()
    plain.load_state_dict(network.state_dict())
    found, expected = (rows_of(own, inputs, targets, cross_entropy) for own in (network, plain))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def call(network, inputs):
    return network(inputs)


@pytest.mark.parametrize(
    ("rate", "training", "solver"), [(0.3, True, "kfac"), (0.0, True, "gauss-newton"), (0.3, False, "gauss-newton")]
)
def test_dropout_counts_where_it_draws(rate, training, solver):
    network = nn.Sequential(nn.Linear(3, 4), nn.Dropout(rate), nn.Linear(4, 1)).train(training)
    composed = APTS(network, nn.functional.mse_loss, comm=MPI.COMM_SELF, forward=call).options
    assert composed.local.solver == solver


def test_layout_staged_refuses_what_it_cannot_count_or_draw():
    for network, message in [
        (classifier(width=100), "subdomain of .* parameters exceeds 4096"),
        (classifier(dropout=0.3), "dropout would draw other masks"),
    ]:
        chosen = APTSOptions(layout="staged", local=LocalOptions(solver="gauss-newton"))
        with pytest.raises(InvalidInput, match=f"layout staged .*{message}.* choose kfac"):
            StagedAPTS(network, cross_entropy, comm=MPI.COMM_SELF, options=chosen)
