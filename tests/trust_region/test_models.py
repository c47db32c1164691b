"""Quadratic models against dense matrices, and conjugate gradients in a ball against direct solutions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import classified, classifier, cross_entropy, flat, squared_error
from torch import nn

from apts_mpi.curvature.products import GaussNewtonProducts, HessianProducts
from apts_mpi.trust_region.models import LSR1, ProductModel
from apts_mpi.trust_region.norms import euclidean_radius
from apts_mpi.trust_region.subproblem import minimise_in_ball, steihaug

SIZE = 12


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def draw(generator, *shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def symmetric(seed, lowest):
    """A symmetric matrix with eigenvalues from ``lowest`` to 3."""
    vectors = torch.linalg.qr(draw(generator_of(seed), SIZE, SIZE))[0]
    return vectors @ torch.diag(torch.linspace(lowest, 3.0, SIZE, dtype=torch.float64)) @ vectors.T


def value_of(matrix, gradient, step):
    return (gradient @ step + 0.5 * step @ matrix @ step).item()


def textbook(pairs, gamma):
    """SR1 by its formula (Nocedal and Wright, 6.24): a rank-one update for each pair."""
    matrix = gamma * torch.eye(SIZE, dtype=torch.float64)
    for step, change in pairs:
        residual = change - matrix @ step
        matrix = matrix + torch.outer(residual, residual) / (residual @ step)
    return matrix


def fed(matrix, count, seed=1, pairs=5):
    """A model that was given steps and the matrix times each; the model and the pairs."""
    generator = generator_of(seed)
    given = [(step, matrix @ step) for step in draw(generator, count, SIZE)]
    model = LSR1(pairs)
    for pair in given:
        model.update(*pair)
    return model, given


indefinite = pytest.mark.parametrize("lowest", [-2.0, 0.1])


@indefinite
@pytest.mark.parametrize("count", [0, 1, 4, 9])
def test_lsr1_is_the_textbook_matrix_of_its_last_pairs(lowest, count):
    model, pairs = fed(symmetric(0, lowest), count)
    expected = textbook(pairs[-5:], model.gamma)
    products = torch.stack([model.product(unit) for unit in torch.eye(SIZE, dtype=torch.float64)])
    torch.testing.assert_close(products, expected, rtol=1e-9, atol=1e-10)
    if pairs:
        step, change = pairs[-1]
        along = (step @ change).item()
        expected = (change @ change).item() / along if along > 0.0 else (change.norm() / step.norm()).item()
        assert model.gamma == pytest.approx(expected, rel=1e-14)
        for step, change in pairs[-5:]:  # SR1 keeps all secants of a quadratic
            torch.testing.assert_close(model.product(step), change, rtol=1e-9, atol=1e-9)


@indefinite
@pytest.mark.parametrize("count", [0, 1, 4, 9])
@pytest.mark.parametrize("radius", [1e-3, 0.5, 1e3])
def test_lsr1_step_is_the_minimiser_of_the_dense_model(lowest, count, radius):
    model, _ = fed(symmetric(0, lowest), count)
    dense = torch.stack([model.product(unit) for unit in torch.eye(SIZE, dtype=torch.float64)])
    gradient = draw(generator_of(7), SIZE)
    expected = torch.from_numpy(minimise_in_ball(0.5 * (dense + dense.T).numpy(), gradient.numpy(), radius))
    step = model.minimise(gradient, radius)
    assert step.norm().item() <= radius * (1.0 + 1e-12)
    torch.testing.assert_close(step, expected, rtol=1e-7, atol=1e-8 * radius)
    predicted = model.predict(gradient, step)
    assert predicted == pytest.approx(-value_of(dense, gradient, step), rel=1e-10)
    assert predicted > 0.0


def test_lsr1_in_the_hard_case_goes_along_the_lowest_eigenvector():
    """The gradient is orthogonal to it, so that the sign is free but the length is that of the ball."""
    model, _ = fed(symmetric(0, -2.0), 4)
    dense = torch.stack([model.product(unit) for unit in torch.eye(SIZE, dtype=torch.float64)])
    values, vectors = torch.linalg.eigh(0.5 * (dense + dense.T))
    gradient = draw(generator_of(7), SIZE)
    gradient -= vectors[:, 0] * (vectors[:, 0] @ gradient)
    step = model.minimise(gradient, 50.0)
    assert values[0] < 0.0
    assert step.norm().item() == pytest.approx(50.0, rel=1e-10)
    regular = torch.where(torch.arange(SIZE) == 0, 0.0, -(vectors.T @ gradient) / (values - values[0]))
    expected = value_of(dense, gradient, vectors @ regular) + 0.5 * values[0] * (50.0**2 - regular @ regular)
    assert value_of(dense, gradient, step) == pytest.approx(expected.item(), rel=1e-6)


def test_lsr1_leaves_out_pairs_that_break_it():
    matrix = symmetric(0, -2.0)
    model, _ = fed(matrix, 3)
    before = [*model.steps]
    step = draw(generator_of(9), SIZE)
    product = model.product(step)
    across = draw(generator_of(10), SIZE)
    across -= step * (step @ across) / (step @ step)
    bad = [
        (torch.zeros(SIZE, dtype=torch.float64), step),
        (step, torch.full_like(step, torch.nan)),
        (step, product),  # nothing new
        (step, product + across),  # the denominator of the update is zero
    ]
    for pair in bad:
        model.update(*pair)
        assert all(torch.equal(*known) for known in zip(model.steps, before, strict=True))
    model.update(step, matrix @ step)
    assert len(model.steps) == 4


def test_lsr1_of_a_gradient_that_is_not_finite_is_not_finite():
    model, _ = fed(symmetric(0, 0.1), 3)
    assert not model.minimise(torch.full((SIZE,), torch.inf, dtype=torch.float64), 1.0).isfinite().any()


@given(seed=st.integers(0, 2**16), lowest=st.sampled_from([-1.0, 0.0, 0.5]), radius=st.sampled_from([0.1, 1.0, 30.0]))
def test_steihaug_lowers_the_model_within_the_ball(seed, lowest, radius):
    matrix, gradient = symmetric(seed, lowest), draw(generator_of(seed), SIZE)
    last = 0.0
    for iterations in range(1, 6):
        step, predicted = steihaug(lambda vector: matrix @ vector, gradient, radius, 0.0, iterations)
        assert step.norm().item() <= radius * (1.0 + 1e-12)
        assert predicted == pytest.approx(-value_of(matrix, gradient, step), rel=1e-9)
        assert predicted >= last * (1.0 - 1e-12)
        last = predicted
    cauchy = steihaug(lambda vector: matrix @ vector, gradient, radius, 0.0, 1)[1]
    assert last >= cauchy > 0.0


def spread(seed=5):
    """A symmetric positive definite matrix with eigenvalues far apart."""
    return torch.diag(torch.logspace(-2, 2, SIZE, dtype=torch.float64)) + 0.01 * symmetric(seed, 0.1)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_steihaug_solves_what_lies_inside_the_ball(preconditioned):
    matrix, gradient = spread(), draw(generator_of(3), SIZE)
    expected = -torch.linalg.solve(matrix, gradient)
    products = []

    def product(vector):
        products.append(vector)
        return matrix @ vector

    diagonal = matrix.diagonal()
    preconditioner = (lambda vector: vector / diagonal) if preconditioned else None
    step, predicted = steihaug(product, gradient, 1e3, 1e-10, 60, preconditioner)
    torch.testing.assert_close(step, expected, rtol=1e-7, atol=1e-7)
    assert predicted == pytest.approx(-0.5 * (gradient @ expected).item(), rel=1e-9)
    assert len(products) < (10 if preconditioned else 60)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_steihaug_ends_at_the_boundary_where_the_curvature_is_not_positive(preconditioned):
    diagonal = spread().diagonal()
    preconditioner = (lambda vector: vector / diagonal) if preconditioned else None
    gradient = draw(generator_of(3), SIZE)
    for matrix in (-spread(), 0.0 * spread()):
        step, predicted = steihaug(
            lambda vector, matrix=matrix: matrix @ vector, gradient, 2.5, 0.1, 10, preconditioner
        )
        assert step.norm().item() == pytest.approx(2.5, rel=1e-13)
        assert predicted == pytest.approx(-value_of(matrix, gradient, step), rel=1e-12)
        down = gradient if preconditioner is None else preconditioner(gradient)
        torch.testing.assert_close(step, -2.5 * down / down.norm(), rtol=1e-13, atol=1e-14)


def test_steihaug_with_every_column_is_the_ball_minimiser_of_an_indefinite_model():
    """In two dimensions along an eigenvector: negative curvature is met at once and followed to the boundary."""
    matrix = torch.diag(torch.tensor([2.0, -1.0], dtype=torch.float64))
    gradient = torch.tensor([0.0, 1.0], dtype=torch.float64)
    step, predicted = steihaug(lambda vector: matrix @ vector, gradient, 3.0, 1e-8, 10)
    torch.testing.assert_close(step, torch.tensor([0.0, -3.0], dtype=torch.float64))
    assert predicted == pytest.approx(3.0 + 4.5)


def test_steihaug_stops_when_another_rank_says_so():
    """One product an iteration, whatever this rank makes of its own numbers."""
    matrix, gradient = symmetric(5, 0.1), draw(generator_of(3), SIZE)
    answers = [False, False, False, True]
    heard = []

    def agree(stop):
        heard.append(stop)
        return answers[len(heard) - 1]

    step, _ = steihaug(lambda vector: matrix @ vector, gradient, 1e-3, 0.1, 10, agree=agree)
    assert heard == [True] * 4
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-12)


def test_steihaug_of_a_zero_gradient_is_zero():
    step, predicted = steihaug(lambda vector: vector, torch.zeros(4, dtype=torch.float64), 1.0, 0.1, 10)
    assert not step.any() and predicted == 0.0


def test_steihaug_of_numbers_that_are_not_finite_returns():
    """Such a prediction is judged a rejection."""
    gradient = torch.ones(4, dtype=torch.float64)
    assert math.isnan(steihaug(lambda vector: vector * torch.nan, gradient, 1.0, 0.1, 10)[1])
    assert math.isnan(steihaug(lambda vector: vector, gradient * torch.inf, 1.0, 0.1, 10)[1])


def test_euclidean_radius_holds_the_ball():
    assert euclidean_radius(0.5, 16, "2") == 0.5
    assert euclidean_radius(0.5, 16, "inf") == torch.full((16,), 0.5).norm().item()


def curved(outputs, targets):
    """A loss whose Hessian mixes samples and outputs and depends on the point."""
    return (outputs - targets).square().mean().exp() + outputs.square().mean() ** 2


def networks_and_losses():
    torch.manual_seed(4)
    convolutional = nn.Sequential(
        nn.Unflatten(1, (1, 10)), nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )
    inputs, classes = classified(17)
    numbers = draw(generator_of(8), 17, 3)
    return {
        "cross entropy": (classifier(width=6), cross_entropy, (inputs, classes)),
        "normalised": (classifier(width=6, batch_norm=True), cross_entropy, (inputs, classes)),
        "squared error": (convolutional.double(), squared_error, (inputs, numbers)),
        "coupled": (classifier(width=6), curved, (inputs, numbers)),
    }


CASES = networks_and_losses()
cases = pytest.mark.parametrize("case", CASES)


def remainders(values, model, sizes=(2e-2, 1e-2)):
    return [abs(values(size) - model(size)) for size in sizes]


@cases
def test_hessian_products_make_a_model_of_order_3(case):
    network, loss, (inputs, targets) = CASES[case]
    parameters = list(network.parameters())
    start = flat(parameters)
    along = draw(generator_of(2), len(start))
    along /= along.norm()
    value = loss(network(inputs), targets)
    gradient = flat(torch.autograd.grad(value, parameters, retain_graph=True))
    model = ProductModel(HessianProducts(value, parameters))

    def moved(size):
        nn.utils.vector_to_parameters(start + size * along, parameters)
        with torch.no_grad():
            result = loss(network(inputs), targets).item()
        nn.utils.vector_to_parameters(start, parameters)
        return result

    first = remainders(moved, lambda size: value.item() + size * (gradient @ along).item())
    third = remainders(moved, lambda size: value.item() - model.predict(gradient, size * along))
    assert 3.5 < first[0] / first[1] < 4.6
    assert third[0] / third[1] > 7.0 and third[0] < first[0]


@cases
def test_gauss_newton_products_make_a_model_of_order_3_of_the_linearised_network(case):
    network, loss, (inputs, targets) = CASES[case]
    parameters = list(network.parameters())
    outputs = network(inputs)
    start = flat(parameters)
    along = draw(generator_of(2), len(start))
    along /= along.norm()

    def moved(size):
        nn.utils.vector_to_parameters(start + size * along, parameters)
        with torch.no_grad():
            result = network(inputs)
        nn.utils.vector_to_parameters(start, parameters)
        return result

    tangent = (moved(1e-5) - moved(-1e-5)) / 2e-5
    gradient = flat(torch.autograd.grad(loss(outputs, targets), parameters, retain_graph=True))
    model = ProductModel(GaussNewtonProducts(outputs, targets, loss, parameters))
    value = loss(outputs, targets).item()
    found = remainders(
        lambda size: loss(outputs.detach() + size * tangent, targets).item(),
        lambda size: value - model.predict(gradient, size * along),
    )
    assert found[0] < 1e-12 or found[0] / found[1] > 7.0  # squared error is its own model


@cases
@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_products_are_symmetric_and_gauss_newton_of_a_convex_loss_not_negative(case, kind):
    network, loss, (inputs, targets) = CASES[case]
    parameters = list(network.parameters())
    outputs = network(inputs)
    if kind == "hessian":
        product = HessianProducts(loss(outputs, targets), parameters)
    else:
        product = GaussNewtonProducts(outputs, targets, loss, parameters)
    left, right = draw(generator_of(3), 2, len(flat(parameters)))
    assert (left @ product(right)).item() == pytest.approx((right @ product(left)).item(), rel=1e-9)
    if kind == "gauss-newton":
        assert (left @ product(left)).item() >= 0.0
    assert all(value.grad is None for value in parameters)


def test_products_of_what_is_linear_are_zero():
    network = nn.Linear(3, 2).double()
    parameters = list(network.parameters())
    outputs = network(torch.ones(4, 3, dtype=torch.float64))
    direction = torch.ones(8, dtype=torch.float64)
    assert not HessianProducts(outputs.sum(), parameters)(direction).any()
    assert not GaussNewtonProducts(outputs, torch.zeros(4, 2), lambda y, _: y.sum(), parameters)(direction).any()


def test_lsr1_finds_the_minimum_of_a_quadratic():
    """With as many pairs as unknowns: exact curvature after that many independent steps."""
    matrix, target = symmetric(0, 0.3), draw(generator_of(5), SIZE)
    model, point, gradient = LSR1(SIZE), torch.zeros(SIZE, dtype=torch.float64), -matrix @ target
    for _ in range(4 * SIZE):
        step = model.minimise(gradient, 1.0)
        change = matrix @ step
        if value_of(matrix, gradient, step) < 0.0:
            point, gradient = point + step, gradient + change
        model.update(step, change)
    torch.testing.assert_close(point, target, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e200, float("inf"), float("nan")])
@pytest.mark.parametrize("first", ["minimise", "update"])
def test_pairs_that_make_no_model_are_dropped(value, first):
    """A checkpoint may hold any."""
    model = LSR1()
    vector = torch.full((6,), value, dtype=torch.float64)
    model.restore([vector, vector], [vector, vector], 1.0)
    gradient = torch.ones(6, dtype=torch.float64)
    if first == "update":
        model.update(gradient, 2.0 * gradient)
    torch.testing.assert_close(model.minimise(gradient, 0.5), -0.5 * gradient / 6**0.5)
    assert math.isfinite(model.predict(gradient, gradient))
