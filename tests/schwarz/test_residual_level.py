"""The coarse level in the space of the residuals: against dense equations, on any ranks, subdomains and layout."""

import numpy as np
import pytest
import torch
from mpi4py import MPI
from networks import FEATURES, classified, classifier, cross_entropy, squared_error
from staged_networks import built, mlp
from torch import nn
from torch.func import functional_call, jacrev

import apts_mpi.schwarz.residual_level
from apts_mpi import (
    APTS,
    APTSOptions,
    CoarseOptions,
    InvalidInput,
    LocalOptions,
    PipelineOptions,
    SchwarzOptions,
    StagedAPTS,
    TrustRegionOptions,
)
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.problems.losses import weighted_squared_error
from apts_mpi.schwarz.residual_system import Columns, NormalSystem, by_factors, by_products, cheaper_form
from apts_mpi.tools.events import Events
from apts_mpi.trust_region.levenberg_marquardt import FIRST, Damping

SAMPLES = 61
NEWTON = CoarseOptions(model="residual", acceleration=0.0)


def linear_in_one(outputs, targets):
    """Squared errors of two outputs, and the mean of a third: there the gradient is in the range of no root."""
    return (outputs[:, :2] - 1.0).square().mean() + 0.3 * outputs[:, 2].mean() + 0.0 * targets.sum()


def weighted(outputs, targets):
    """A third of the samples does not count."""
    return ((targets % 3)[:, None] * (outputs - 1.0).square()).mean()


LOSSES = {"cross entropy": cross_entropy, "weighted": weighted, "linear in one": linear_in_one}


def small(width=7):
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)]
    return nn.Sequential(*layers).double()


def dense_step(network, loss, inputs, targets):
    """-(J^T H J + lambda I)^-1 g with H the Hessian of the whole batch's loss, by an eigen-decomposition."""
    values = {name: value.detach() for name, value in network.named_parameters()}
    parts = jacrev(lambda values: functional_call(network, values, (inputs,)).flatten())(values)
    jacobian = torch.cat([part.flatten(1) for part in parts.values()], dim=1)
    outputs = network(inputs).detach()

    def of_outputs(flat_outputs):
        return loss(flat_outputs.view(outputs.shape), targets)

    hessian = torch.autograd.functional.hessian(of_outputs, outputs.flatten())
    slope = torch.autograd.functional.jacobian(of_outputs, outputs.flatten())
    matrix, gradient = jacobian.T @ hessian @ jacobian, jacobian.T @ slope
    damping = FIRST * float(f"{float(matrix.trace()):.6e}")
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return -vectors @ ((vectors.T @ gradient) / (eigenvalues + damping))


def options(coarse=NEWTON, **parts):
    chosen = {"local": LocalOptions(solver="gauss-newton"), "coarse": coarse} | parts
    return APTSOptions(**chosen)


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("width", [4, 12], ids=["more rows", "more parameters"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("subdomains", [1, 2, 4, 8])
def test_sum_of_corrections_is_the_dense_step(world, subdomains, loss, width):
    inputs, targets = classified(SAMPLES)
    network = small(width)
    expected = dense_step(network, LOSSES[loss], inputs, targets)
    chosen = options(subdomains=subdomains, schwarz=SchwarzOptions(partition="index"))
    solver = APTS(network, LOSSES[loss], comm=world, options=chosen)
    solver.step((inputs, targets))
    assert (solver.holding.coarse.step - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.mpi
def test_momentum_that_leads_up_is_forgotten(world):
    """No damping shortens it, so that rejections have to."""
    coarse = CoarseOptions(model="residual", momentum=0.9, acceleration=0.0)
    solver = APTS(small(), cross_entropy, comm=world, options=options(coarse))
    solver.step(classified(SAMPLES))
    solver.holding.coarse.last_step.copy_(10.0 * torch.sign(solver._gradient))
    assert not solver.step().schwarz.accepted
    assert any(solver.step().schwarz.accepted for _ in range(12))


@pytest.mark.mpi
@pytest.mark.parametrize("acceleration", [0.0, 0.75])
def test_the_network_is_evaluated_no_more_than_it_takes(world, acceleration):
    """At the end of the step, where the outputs that rows need are kept; for the rows; and for the acceleration."""
    network, calls = small(), []
    coarse = CoarseOptions(model="residual", acceleration=acceleration)
    solver = APTS(network, cross_entropy, comm=world, options=options(coarse))
    solver.step(classified(SAMPLES))
    assert any(solver.step().schwarz.accepted for _ in range(20))
    network[0].register_forward_hook(lambda *_: calls.append(None))
    solver.step()
    assert len(calls) == (3 if acceleration else 2)


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("form", ["kernel", "normal", "products"])
@pytest.mark.parametrize("across", [False, True], ids=["range", "across"])
def test_equations_are_solved_as_the_dense_ones_are(world, form, across):
    """Singular rows, a damping far below them, and a slope that they do not span."""
    comm = Communicator(world, Events())
    generator = np.random.default_rng(0)
    rows, size = 40, 30
    left, _ = np.linalg.qr(generator.standard_normal((rows, 20)))
    right, _ = np.linalg.qr(generator.standard_normal((size, 20)))
    whole = torch.from_numpy(left @ np.diag(np.logspace(0.0, -3.0, 20)) @ right.T)
    data, remainder = (torch.from_numpy(generator.standard_normal(count)) for count in (rows, size))
    own = whole[comm.rank * rows // comm.size : (comm.rank + 1) * rows // comm.size].clone()
    systems = {
        "kernel": lambda: by_factors(Columns(own, comm, comm), comm),
        "normal": lambda: NormalSystem(own, comm),
        "products": lambda: by_products(Columns(own, comm, comm), comm),
    }
    system = systems[form]()
    assert system.trace == pytest.approx(float(whole.square().sum()), rel=1e-5)
    damping = system.factorise(1e-8)
    assert damping == 1e-8
    slope = whole.T @ data + (remainder if across else 0.0)
    values, vectors = torch.linalg.eigh(whole.T @ whole)
    expected = vectors @ ((vectors.T @ slope) / (values.clamp_min(0.0) + damping))
    found = system.solve(data, remainder if across else None)
    # Rounding errors of the matrix, 1e-16, over the damping; of the expected one as well.
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    torch.testing.assert_close(system.times(found), whole @ found, rtol=1e-10, atol=1e-10 * float(found.norm()))


@pytest.mark.mpi
def test_problems_too_large_for_a_matrix_take_the_same_steps(world, monkeypatch):
    expected = APTS(small(), cross_entropy, comm=MPI.COMM_SELF, options=options(subdomains=1))
    monkeypatch.setattr(apts_mpi.schwarz.residual_level, "LARGEST_DENSE", 50)
    found = APTS(small(), cross_entropy, comm=world, options=options(subdomains=3))
    expected.step(classified(SAMPLES)), found.step(classified(SAMPLES))
    for _ in range(3):
        one, other = expected.step().schwarz, found.step().schwarz
        assert other.trial_loss == pytest.approx(one.trial_loss, rel=1e-6)


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("momentum, acceleration", [(0.0, 0.75), (0.9, 0.75), (0.9, 0.0)])
def test_iterates_depend_neither_on_ranks_nor_on_subdomains(world, momentum, acceleration):
    coarse = CoarseOptions(model="residual", momentum=momentum, acceleration=acceleration)
    losses = []
    for comm, subdomains in ((MPI.COMM_SELF, 1), (world, 5), (world, 1)):
        chosen = options(coarse, subdomains=subdomains, schwarz=SchwarzOptions(partition="index"))
        solver = APTS(small(), cross_entropy, comm=comm, options=chosen)
        solver.step(classified(SAMPLES))
        losses.append([solver.step().schwarz.trial_loss for _ in range(5)])
    # Rounding errors of reductions, which six steps magnify.
    assert losses[1] == pytest.approx(losses[0], rel=1e-8)
    assert losses[2] == pytest.approx(losses[0], rel=1e-8)


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
@pytest.mark.parametrize("loss", LOSSES)
def test_staged_steps_are_the_replicated_ones(world, loss):
    if world.size > 8:
        pytest.skip("nine layers")
    data = classified(SAMPLES)
    replicated, stage = built(mlp), built(mlp)
    expected = APTS(replicated, LOSSES[loss], comm=MPI.COMM_SELF, options=options())
    chosen = options(layout="staged", pipeline=PipelineOptions(micro_batches=3), stall_timeout=60.0)
    found = StagedAPTS(stage, LOSSES[loss], comm=world, options=chosen)
    expected.step(data), found.step(data)
    for _ in range(3):
        one, other = expected.step().schwarz, found.step().schwarz
        assert other.trial_loss == pytest.approx(one.trial_loss, rel=1e-8)
        assert other.step_norm == pytest.approx(one.step_norm, rel=1e-6)


def sines(samples=40):
    points = torch.linspace(-1.0, 1.0, samples, dtype=torch.float64)[:, None]
    return points, torch.sin(3.0 * points)


@pytest.mark.parametrize("subdomains", [1, 7])
def test_residuals_that_can_vanish_do_so_superlinearly(subdomains):
    """More parameters than residuals: the loss goes to rounding, the last steps by many digits each."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 1)).double()
    inputs = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64)[:, None]
    chosen = options(CoarseOptions(model="residual"), subdomains=subdomains)
    solver = APTS(network, squared_error, comm=MPI.COMM_SELF, options=chosen)
    losses = [solver.step((inputs, torch.sin(3.0 * inputs))).schwarz.trial_loss]
    while losses[-1] > 1e-24 and len(losses) < 60:
        losses.append(solver.step().schwarz.trial_loss)
    assert losses[-1] <= 1e-24
    assert losses[-1] < 1e-4 * losses[-2] or losses[-2] < 1e-4 * losses[-3]


@pytest.mark.parametrize("subdomains", [1, 2, 4, 10])
def test_badly_conditioned_least_squares_take_ten_steps(subdomains):
    """Condition 1e8: the loss is within rounding of the least one, that of the noise across the columns."""
    generator = np.random.default_rng(0)
    left, _ = np.linalg.qr(generator.standard_normal((200, 40)))
    right, _ = np.linalg.qr(generator.standard_normal((40, 40)))
    matrix = left @ np.diag(np.logspace(0.0, -8.0, 40)) @ right.T * 10.0
    noise = generator.standard_normal(200)
    noise -= left @ (left.T @ noise)
    best = np.mean(noise**2)
    targets = matrix @ generator.standard_normal(40) + noise
    network = nn.Linear(40, 1, bias=False).double()
    chosen = options(
        CoarseOptions(model="residual"),
        subdomains=subdomains,
        schwarz=SchwarzOptions(partition="index"),
        trust_region=TrustRegionOptions(max_radius=1e12),
    )
    solver = APTS(network, squared_error, comm=MPI.COMM_SELF, options=chosen)
    result = solver.step((torch.from_numpy(matrix), torch.from_numpy(targets)[:, None]))
    for _ in range(9):
        result = solver.step()
    assert result.schwarz.trial_loss - best <= 1e-10 * best


def test_wide_network_takes_as_many_steps_cut_into_any_number():
    counts = []
    for subdomains in (1, 2, 8, 32):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1)).double()
        chosen = options(
            CoarseOptions(model="residual"), subdomains=subdomains, schwarz=SchwarzOptions(partition="index")
        )
        solver = APTS(network, squared_error, comm=MPI.COMM_SELF, options=chosen)
        steps, loss = 1, solver.step(sines()).schwarz.trial_loss
        while loss > 1e-8 and steps < 200:
            steps, loss = steps + 1, solver.step().schwarz.trial_loss
        counts.append(steps)
    assert max(counts) < 200
    assert max(counts) <= 1.1 * min(counts)


def test_acceleration_follows_the_curve_of_the_outputs():
    """Of outputs that are a square of the parameters: half of the second derivative is all that is left out."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.root = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))

        def forward(self, inputs):
            return inputs * self.root.square()

    data = torch.ones(1, 1, dtype=torch.float64), torch.full((1, 1), 5.0, dtype=torch.float64)
    found = []
    for acceleration in (0.0, 0.75):
        network = Square()
        coarse = CoarseOptions(model="residual", acceleration=acceleration)
        APTS(network, squared_error, comm=MPI.COMM_SELF, options=options(coarse, subdomains=1)).step(data)
        found.append(float(network.root.detach()))
    damped = 1.0 / (1.0 + FIRST)
    velocity = damped / 4.0
    bent = -0.5 * damped * 2.0 * velocity**2 / 4.0
    assert found == pytest.approx([2.0 + velocity, 2.0 + velocity + bent], rel=1e-6)


def test_frozen_parameters_stay_and_the_others_move_as_if_they_were_no_parameters():
    network, reduced = small(), small()
    inputs, targets = classified(SAMPLES)
    solver = APTS(network, cross_entropy, comm=MPI.COMM_SELF, options=options())
    for value in network[0].parameters():
        value.requires_grad_(False)
    for value in reduced[0].parameters():
        value.requires_grad_(False)
    other = APTS(reduced, cross_entropy, comm=MPI.COMM_SELF, options=options())
    assert solver.step((inputs, targets)).schwarz.trial_loss == pytest.approx(
        other.step((inputs, targets)).schwarz.trial_loss, rel=1e-12
    )


def test_first_radius_of_the_user_holds_the_first_step_alone():
    chosen = options(trust_region=TrustRegionOptions(initial_radius=1e-3))
    solver = APTS(small(), cross_entropy, comm=MPI.COMM_SELF, options=chosen)
    first = solver.step(classified(SAMPLES)).schwarz
    assert first.accepted
    assert 1e-4 <= first.step_norm <= 1.001e-3
    free = APTS(small(), cross_entropy, comm=MPI.COMM_SELF, options=options())
    assert free.step(classified(SAMPLES)).schwarz.step_norm > 0.1
    for _ in range(30):
        last = solver.step().schwarz
    assert last.step_norm > 1e-2


def test_damping_follows_rho():
    damping = Damping()
    damping.value = damping.for_matrix(100.0)
    assert damping.value == 100.0 * FIRST == damping.for_matrix(7.0)
    for rho, factor in ((0.5, 1.0), (0.0, 2.0), (0.9, 0.488), (2.0, 1 / 3), (1.001, 0.01), (1.0, 1e-3), (0.99, 0.1)):
        before = damping.value
        damping.follow(before, True, rho, True)
        assert damping.value == pytest.approx(factor * before)
    before = damping.value
    damping.follow(before, True, 1.0, False)  # below the rounding noise of the loss
    assert damping.value == before
    for rise in (2.0, 8.0, 64.0):
        damping.follow(damping.value, False, -1.0, True)
        assert damping.value == pytest.approx(rise * before)
    damping.follow(damping.value, True, 0.5, True)
    damping.follow(damping.value, False, -1.0, True)
    assert damping.value == pytest.approx(128.0 * before)
    damping.shorten(1e50)  # the step was too short to change a parameter
    assert damping.value == pytest.approx(1e49) and damping.rise == 2.0


def test_a_batch_that_says_nothing_leaves_the_damping():
    """One sample beyond all numbers: the batch is skipped, and the next ones go on as if it had not been."""
    torch.manual_seed(0)
    inputs, targets = torch.randn(40, FEATURES).double(), torch.randn(40, 3).double()
    losses = []
    for bad in (None, 1e180, float("nan")):
        solver = APTS(small(), squared_error, comm=MPI.COMM_SELF, options=options())
        solver.step((inputs, targets))
        if bad is not None:
            spoilt = targets.clone()
            spoilt[3] = bad
            before = solver.holding.coarse.damping.value
            assert solver.step((inputs, spoilt)).skipped
            assert solver.holding.coarse.damping.value == before
        losses.append([solver.step((inputs, targets)).schwarz.loss for _ in range(6)])
    assert losses[0] == losses[1] == losses[2] and losses[0][-1] < 0.5 * losses[0][0]


def test_a_damping_that_is_far_too_large_comes_down():
    solver = APTS(small(), squared_error, comm=MPI.COMM_SELF, options=options())
    torch.manual_seed(0)
    batch = torch.randn(40, FEATURES).double(), torch.randn(40, 3).double()
    first = solver.step(batch).schwarz.loss
    solver.holding.coarse.damping.value = 1e40
    for _ in range(80):
        last = solver.step().schwarz.loss
    assert last < 0.1 * first


@pytest.mark.parametrize(
    "rows, parameters, ranks, form",
    [
        (480, 1981, 1, "kernel"),
        (2200, 1761, 1, "normal"),
        (2000, 2941, 1, "kernel"),
        (2200, 1761, 2, "normal"),
        (100, 5000, 8, "kernel"),
        (5000, 100, 8, "normal"),
        (1000, 1010, 4, "normal"),  # the rows would have to be gathered
    ],
)
def test_the_cheaper_matrix_is_formed(rows, parameters, ranks, form):
    assert cheaper_form(rows, parameters, ranks) == form


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"local": LocalOptions(solver="kfac")}, "coarse.model: 'residual' needs the rows"),
        ({"local": LocalOptions(solver="gauss-newton", iterations=2)}, "local.iterations: 2"),
        ({"schwarz": SchwarzOptions(decomposition="data")}, "coarse.model: 'residual' is for subdomains of parameters"),
        ({"schwarz": SchwarzOptions(local_data="full")}, "schwarz.local_data: 'full'"),
        ({"schwarz": SchwarzOptions(overlap=1)}, "schwarz.overlap: 1 .* give 0"),
        (
            {"coarse": CoarseOptions(model="gauss-newton", momentum=0.9)},
            "coarse.momentum: 0.9 is for coarse.model",
        ),
        (
            {"coarse": CoarseOptions(model="none", acceleration=0.5)},
            "coarse.acceleration: 0.5 is for coarse",
        ),
    ],
)
def test_what_cannot_be_is_refused(parts, message):
    with pytest.raises(InvalidInput, match=message):
        APTS(small(), cross_entropy, comm=MPI.COMM_SELF, options=options(**parts))


def test_automatic_choice_is_for_networks_that_a_function_calls():
    def forward(network, inputs):
        return network(inputs)

    def chosen(forward=None, loss=weighted, **parts):
        solver = APTS(small(), loss, comm=MPI.COMM_SELF, options=APTSOptions(**parts), forward=forward)
        return solver.options.coarse.model, solver.options.local.solver, solver.options.schwarz.local_data

    assert chosen(forward) == ("residual", "gauss-newton", "shared")
    assert chosen(forward, loss=weighted_squared_error)[0] == "residual"
    assert chosen(forward, loss=cross_entropy) == ("gauss-newton", "gauss-newton", "full")
    assert chosen(forward, loss=cross_entropy, coarse=CoarseOptions(model="residual"))[0] == "residual"
    assert chosen() == ("gauss-newton", "kfac", "shared")
    assert chosen(coarse=CoarseOptions(model="residual"))[:2] == ("residual", "gauss-newton")
    assert chosen(forward, coarse=CoarseOptions(model="gauss-newton"))[2] == "full"
    assert chosen(forward, coarse=CoarseOptions(columns=("correction",)))[0] == "gauss-newton"
    assert chosen(forward, coarse=CoarseOptions(momentum=0.5, acceleration=0.0))[0] == "residual"
    assert chosen(forward, schwarz=SchwarzOptions(overlap=1))[0] == "gauss-newton"
    assert chosen(forward, local=LocalOptions(solver="gauss-newton"))[0] == "gauss-newton"


def test_rows_of_a_classifier_are_those_of_all_samples_whatever_their_hessian():
    """Saturated outputs have roots of nearly zero: the residuals stay finite, and so does the step."""
    network = classifier()
    with torch.no_grad():
        network[-1].weight.mul_(1e4)
    solver = APTS(network, cross_entropy, comm=MPI.COMM_SELF, options=options())
    result = solver.step(classified(SAMPLES)).schwarz
    assert np.isfinite([result.step_norm, result.predicted_reduction]).all()
    assert result.predicted_reduction > 0.0
