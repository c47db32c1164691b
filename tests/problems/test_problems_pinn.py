"""Physics-informed networks: operators, right-hand sides and references, in float64."""

import numpy as np
import pytest
import torch

from apts_mpi import problems
from apts_mpi.problems import allen_cahn, burgers, pinn, poisson

PI = torch.pi


def points(count, lower, upper):
    return torch.from_numpy(pinn.scattered_points(count, lower, upper))


def residuals(name, exact):
    """Residual of every sample, outputs minus values, (M,)."""
    problem = problems.build(name, dtype=torch.float64)
    inputs, targets = problem.train
    return (problem.forward(exact, inputs) - targets[:, :1]).squeeze(1)


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_poisson_residual_of_the_exact_solution_is_zero(dimensions):
    def exact(x):
        return torch.sin(PI * x).prod(dim=1, keepdim=True)

    assert residuals(f"poisson-{dimensions}d", exact).abs().max() < 1e-9


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_poisson_residual_of_another_function_is_not(dimensions):
    wrong = residuals(f"poisson-{dimensions}d", lambda x: torch.sin(PI * x).prod(dim=1, keepdim=True) + x[:, :1])
    assert wrong.abs().max() > 0.5


@pytest.mark.parametrize("name", ["poisson-1d", "poisson-2d", "poisson-3d", "burgers"])
def test_loss_is_the_sum_of_the_two_means(name):
    problem = problems.build(name, dtype=torch.float64, seed=5)
    inputs, targets = problem.train
    outputs = problem.forward(problem.network, inputs).detach()
    squares = (outputs - targets[:, :1]).square().squeeze(1)
    interior = inputs[:, -1] == pinn.INTERIOR
    coefficient, weights = 10.0, torch.ones(int(interior.sum()), dtype=torch.float64)
    if name == "burgers":
        coefficient, weights = 1.0, inputs[interior, 1].abs().sqrt()
    expected = (weights * squares[interior]).sum() / weights.sum() + coefficient * squares[~interior].mean()
    torch.testing.assert_close(problem.loss(outputs, targets), expected)
    torch.testing.assert_close(outputs[~interior], problem.network(inputs[~interior, :-1]).detach())


@pytest.mark.parametrize(
    ("name", "interior", "boundary"),
    [
        ("poisson-1d", 100, 2),
        ("poisson-2d", 400, 80),
        ("poisson-3d", 2000, 600),
        ("burgers", 2000, 200),
        ("allen-cahn", 2000, 0),
    ],
)
def test_points(name, interior, boundary):
    inputs, _ = problems.build(name, dtype=torch.float64).train
    coordinates, kind = inputs[:, :-1], inputs[:, -1]
    assert [int((kind == value).sum()) for value in (pinn.INTERIOR, pinn.BOUNDARY)] == [interior, boundary]
    assert len(coordinates.unique(dim=0)) >= len(coordinates) - 2  # Burgers' corners are there twice.
    lower = torch.tensor([0.0, -1.0]) if name in ("burgers", "allen-cahn") else torch.zeros(coordinates.shape[1])
    assert ((coordinates >= lower) & (coordinates <= 1.0)).all()
    on_boundary = ((coordinates == lower) | (coordinates == 1.0)).any(dim=1)
    assert torch.equal(on_boundary, kind == pinn.BOUNDARY)


def test_points_of_burgers_are_dense_at_the_front_and_weighted_for_means_over_the_domain():
    inputs, targets = problems.build("burgers", dtype=torch.float64).train
    interior = inputs[:, -1] == pinn.INTERIOR
    times, positions = inputs[interior, 0], inputs[interior, 1]
    assert (positions.abs() < 0.005).sum() > 100  # 10 of 2,000 even ones
    weights = targets[interior, 1] / targets[interior, 1].sum()
    # Means over 0 < t < 1, -1 < x < 1; the points are quasi-random, with errors of about 1/2000.
    for values, mean in [(times, 1 / 2), (positions**2, 1 / 3), ((times * positions) ** 2, 1 / 9), (positions, 0.0)]:
        assert float(weights @ values) == pytest.approx(mean, abs=2e-3)


def test_derivatives_of_a_polynomial():
    x = points(9, [-1.0, -1.0], [1.0, 1.0])
    with torch.no_grad():  # As where a loss is only reported.
        values, gradients, second = pinn.derivatives(
            lambda z: z[:, :1] ** 3 * z[:, 1:] + z[:, 1:] ** 2, x, second=[1, 0]
        )
    a, b = x[:, :1], x[:, 1:]
    torch.testing.assert_close(values, a**3 * b + b**2)
    torch.testing.assert_close(gradients, torch.cat([3 * a**2 * b, a**3 + 2 * b], dim=1))
    torch.testing.assert_close(second, torch.cat([torch.full_like(a, 2.0), 6 * a * b], dim=1))


def test_parameter_gradient_of_the_residual_loss():
    problem = problems.build("poisson-2d", dtype=torch.float64)
    inputs, targets = (part[:40] for part in problem.train)

    def loss():
        return problem.loss(problem.forward(problem.network, inputs), targets)

    loss().backward()
    parameter = problem.network[2].weight
    direction = torch.ones_like(parameter)
    derivative = (parameter.grad * direction).sum()
    with torch.no_grad():
        parameter += 1e-5 * direction
        above = loss()
        parameter -= 2e-5 * direction
        below = loss()
    torch.testing.assert_close(derivative, (above - below) / 2e-5, rtol=1e-7, atol=1e-7)


def test_burgers_operator_on_a_travelling_wave():
    """u = c - a tanh(a (x - c t) / (2 nu)) solves the equation on the whole line."""
    a, c, nu = 0.1, 0.3, burgers.VISCOSITY

    def wave(z):
        return c - a * torch.tanh(a * (z[:, 1:] - c * z[:, :1]) / (2 * nu))

    values, left_hand_side = burgers.burgers_operator(wave, points(200, [0.0, -0.3], [1.0, 0.5]))
    assert left_hand_side.abs().max() < 1e-12 and values.std() > 0.05


def test_burgers_conditions():
    """The initial value continues as a function that vanishes at x = -1 and 1."""
    inputs, targets = problems.build("burgers", dtype=torch.float64).train
    kept = inputs[:, -1] == pinn.BOUNDARY
    t, x = inputs[kept, 0], inputs[kept, 1]
    expected = torch.where(t == 0, -torch.sin(PI * x), torch.zeros_like(x))
    torch.testing.assert_close(targets[kept, 0], expected, rtol=0, atol=1e-15)


def test_burgers_reference_satisfies_equation_and_conditions():
    solution = burgers.solution
    t, x = np.meshgrid(np.linspace(0.05, 0.95, 19), np.linspace(-0.95, 0.95, 39), indexing="ij")
    t, x = t.ravel(), x.ravel()
    h = 2e-4

    def u(dt, dx):
        return solution(np.column_stack([t + dt, x + dx]))

    u_t = (u(h, 0) - u(-h, 0)) / (2 * h)
    u_x = (u(0, h) - u(0, -h)) / (2 * h)
    u_xx = (u(0, h) - 2 * u(0, 0) + u(0, -h)) / h**2
    # Relative to the largest term, near 500 at the front; the differences are of second order.
    assert np.abs(u_t + u(0, 0) * u_x - burgers.VISCOSITY * u_xx).max() < 2e-3 * np.abs(u(0, 0) * u_x).max()
    positions = np.linspace(-1.0, 1.0, 21)
    initial = solution(np.column_stack([np.zeros(21), positions]))
    np.testing.assert_allclose(initial, -np.sin(np.pi * positions), atol=1e-12)
    times = np.linspace(0.0, 1.0, 21)
    for side in (-1.0, 1.0):
        np.testing.assert_allclose(solution(np.column_stack([times, np.full(21, side)])), 0.0, atol=1e-12)


def test_burgers_reference_is_odd_converged_and_steep():
    grid = pinn.scattered_points(500, [0.0, -1.0], [1.0, 1.0])
    mirrored = grid * [1.0, -1.0]
    np.testing.assert_allclose(burgers.solution(grid), -burgers.solution(mirrored), atol=1e-12)
    np.testing.assert_allclose(burgers.solution(grid), burgers.solution(grid, quadrature_nodes=220), atol=1e-12)
    # The largest slope, 152.00516 at t = 0.5105, is published: Basdevant et al. 1986.
    near = np.linspace(0.50, 0.52, 41)
    h = 1e-5
    slopes = burgers.solution(np.column_stack([near, np.full(41, h)])) / h
    assert abs(np.abs(slopes).max() - 152.00516) < 1e-2 and abs(near[np.abs(slopes).argmax()] - 0.5105) < 1e-3


def test_allen_cahn_operator_on_a_standing_wave():
    """u = tanh(x sqrt(5 / (2 D))) solves the equation on the whole line."""
    steepness = np.sqrt(allen_cahn.REACTION_RATE / (2 * allen_cahn.DIFFUSIVITY))
    values, left_hand_side = allen_cahn.allen_cahn_operator(
        lambda z: torch.tanh(steepness * z[:, 1:]), points(200, [0.0, -0.02], [1.0, 0.02])
    )
    assert left_hand_side.abs().max() < 1e-12 and values.std() > 0.1


def test_allen_cahn_operator_on_uniform_growth():
    """u' = 5 (u - u^3), u(0) = 1/2: u = (1 + 3 exp(-10 t))^(-1/2)."""
    _, left_hand_side = allen_cahn.allen_cahn_operator(
        lambda z: (1 + 3 * torch.exp(-10 * z[:, :1])) ** -0.5 + 0 * z[:, 1:], points(50, [0.0, -1.0], [1.0, 1.0])
    )
    assert left_hand_side.abs().max() < 1e-12


def test_allen_cahn_loss_is_the_mean_square_of_the_residual():
    problem = problems.build("allen-cahn", dtype=torch.float64, seed=5)
    inputs, targets = problem.train
    _, left_hand_side = allen_cahn.allen_cahn_operator(problem.network, inputs[:, :-1])
    outputs = problem.forward(problem.network, inputs)
    torch.testing.assert_close(problem.loss(outputs, targets), left_hand_side.square().mean())


def test_allen_cahn_network_has_the_initial_values():
    network = problems.build("allen-cahn", dtype=torch.float64).network
    positions = np.linspace(-1.0, 1.0, 33)
    points_at_start = torch.from_numpy(np.column_stack([np.zeros(33), positions]))
    np.testing.assert_allclose(
        network(points_at_start).detach().squeeze(1), allen_cahn.initial_values(positions), rtol=0, atol=1e-15
    )


def test_allen_cahn_network_is_periodic():
    network = problems.build("allen-cahn", dtype=torch.float64).network
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    left, right = (network(torch.stack([t, torch.full_like(t, side)], dim=1)) for side in (-1.0, 1.0))
    torch.testing.assert_close(left, right)


def test_allen_cahn_kink_diffuses():
    """It satisfies the heat equation at any distance, begins at 0, and takes the slope 1 away from the kink."""
    time, distance = points(200, [1e-3, 0.0], [1.0, 0.05]).split(1, dim=1)
    values, gradients, second = pinn.derivatives(
        lambda z: allen_cahn.diffused_kink(z[:, :1], z[:, 1:]), torch.cat([time, distance], dim=1), second=[1]
    )
    assert values.std() > 1e-3
    torch.testing.assert_close(gradients[:, :1], allen_cahn.DIFFUSIVITY * second, rtol=1e-10, atol=1e-14)
    assert allen_cahn.diffused_kink(0 * time, distance).abs().max() == 0.0
    at_kink = torch.cat([time, 0 * distance], dim=1)
    _, gradients, _ = pinn.derivatives(lambda z: allen_cahn.diffused_kink(z[:, :1], z[:, 1:]), at_kink, second=[1])
    torch.testing.assert_close(gradients[:, 1], -torch.ones(200, dtype=torch.float64))


def test_allen_cahn_network_is_smooth_where_the_interval_ends():
    """With nothing learnt the slope jumps there at the start alone, from -2 to 2."""
    network = allen_cahn.PeriodicFromInitialValues(lambda features: 0.0 * features[:, :1])
    _, gradients, _ = pinn.derivatives(network, points(100, [1e-3, 1.0], [1.0, 1.0]), second=[1])
    assert gradients[:, 1].abs().max() < 1e-12
    at_start = torch.tensor([[0.0, 1.0 - 1e-9]], dtype=torch.float64)
    assert pinn.derivatives(network, at_start, second=[1])[1][0, 1].item() == pytest.approx(-2.0, rel=1e-6)


def test_allen_cahn_reference_satisfies_the_equation():
    times, positions, values = allen_cahn.reference_solution(nodes=1024, steps=1000, snapshots=500)
    h = positions[1] - positions[0]
    u = values[50:-1]  # The first snapshots still carry the kink of the initial value at x = 1.
    u_t = (values[51:] - values[49:-2]) / (times[2] - times[0])
    near, far = (np.roll(u, width, axis=1) + np.roll(u, -width, axis=1) for width in (1, 2))
    u_xx = (16 * near - far - 30 * u) / (12 * h**2)
    residual = u_t - allen_cahn.DIFFUSIVITY * u_xx - allen_cahn.REACTION_RATE * (u - u**3)
    assert np.abs(residual).max() < 1e-3 * np.abs(u_t).max()


def test_allen_cahn_reference_has_known_properties():
    times, positions, values = allen_cahn.reference_solution()
    assert times[0] == 0.0 and times[-1] == 1.0
    np.testing.assert_array_equal(values[0], allen_cahn.initial_values(positions))
    assert np.abs(values).max() <= 1.0 + 1e-12  # The maximum principle.
    np.testing.assert_allclose(values[:, 1:], values[:, :0:-1], atol=1e-10)  # Even in x.
    _, _, fine = allen_cahn.reference_solution(nodes=2048, steps=2000)
    assert np.linalg.norm(values - fine[:, ::2]) < 1e-5 * np.linalg.norm(fine)


def test_relative_error_of_the_network_against_the_reference():
    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return self.factor * torch.sin(PI * x).prod(dim=1, keepdim=True)

    exact = Exact()
    error = problems.build("poisson-2d").metrics["relative_l2_error"]
    assert error(exact) < 1e-14
    with torch.no_grad():
        exact.factor.mul_(1.25)
    assert abs(error(exact) - 0.25) < 1e-14


def test_source_is_the_laplacian_of_the_solution():
    x = np.array([[0.5, 0.5], [0.25, 0.5]])
    np.testing.assert_allclose(poisson.source(x), [2 * np.pi**2, np.sqrt(2) * np.pi**2])
