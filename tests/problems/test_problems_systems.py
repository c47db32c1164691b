"""Equations that people bring, alone and in systems: operators, conditions and references, in float64."""

import numpy as np
import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from apts_mpi import problems
from apts_mpi.errors import InvalidInput
from apts_mpi.problems import build, cavity, etdrk4, gray_scott, helmholtz, inverse, pinn, transport
from apts_mpi.problems.cavity_flow import cavity_flow, interpolated
from apts_mpi.problems.hard import HardConditions, WithCoefficients

PI = torch.pi

# Ghia, Ghia and Shin 1982, tables I and II: u on the vertical, v on the horizontal centre line at Re = 100.
GHIA_Y = [0.9766, 0.9531, 0.8516, 0.7344, 0.6172, 0.5, 0.4531, 0.2813, 0.1719, 0.1016, 0.0625]
GHIA_U = [0.84123, 0.68717, 0.23151, 0.00332, -0.13641, -0.20581, -0.21090, -0.15662, -0.10150, -0.06434, -0.04192]
GHIA_X = [0.9688, 0.9453, 0.9063, 0.8594, 0.8047, 0.5, 0.2344, 0.1563, 0.0938, 0.0625]
GHIA_V = [-0.05906, -0.10313, -0.16914, -0.22445, -0.24533, 0.05454, 0.17527, 0.16077, 0.12317, 0.09233]


def points(count, lower, upper):
    return torch.from_numpy(pinn.scattered_points(count, lower, upper))


def residuals(problem, exact):
    """Of every sample: outputs minus values, (M, k), where they count."""
    inputs, targets = problem.train
    width = targets.shape[1] // 2
    return (problem.forward(exact, inputs) - targets[:, :width]) * (targets[:, width:] > 0)


def waves(z, speed=1.0):
    t, x = PI * z[:, :1], PI * z[:, 1:]
    return torch.sin(x) * torch.cos(speed * t) + 0.5 * torch.sin(4 * x) * torch.cos(4 * speed * t)


def rod(z):
    t, x = PI**2 * z[:, :1], PI * z[:, 1:]
    u = torch.exp(-0.3 * t) * torch.sin(x) + 0.5 * torch.exp(-2.7 * t) * torch.sin(3 * x)
    return torch.cat([u, torch.full_like(u, 0.3)], dim=1)


@pytest.mark.parametrize(
    ("problem", "exact"),
    [
        (helmholtz.helmholtz_2d(torch.float64), lambda z: torch.sin(PI * z[:, :1]) * torch.sin(4 * PI * z[:, 1:])),
        (
            helmholtz.helmholtz_2d(torch.float64, waves=2),
            lambda z: torch.sin(PI * z[:, :1]) * torch.sin(2 * PI * z[:, 1:]),
        ),
        (transport.wave(torch.float64), waves),
        (transport.wave(torch.float64, speed=2.0), lambda z: waves(z, 2.0)),
        (transport.advection(torch.float64, speed=30.0), lambda z: torch.sin(z[:, 1:] - 30.0 * z[:, :1])),
        (inverse.inverse_diffusion(torch.float64, noise=0.0), rod),
    ],
    ids=["helmholtz", "two waves", "wave", "faster wave", "advection", "inverse"],
)
def test_the_exact_solution_has_no_residual_and_no_error(problem, exact):
    """Tight: rounding of the largest derivatives, of some hundred."""
    assert residuals(problem, exact).abs().max() < 1e-10

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.none = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, z):
            return exact(z) + self.none

    assert problem.metrics["relative_l2_error"](Exact()) < 1e-12
    assert problem.metrics["relative_l2_error"](problem.network) > 0.1


def test_derivatives_of_all_values_against_those_of_torch():
    weight = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def function(z):
        return torch.sin(z @ weight) * z[:, :1]

    z = points(6, [-1.0, -1.0], [1.0, 1.0])
    with torch.no_grad():  # As where a loss is only reported.
        values, gradients, second = pinn.derivatives_of_all(function, z, second=[1, 0])
    torch.testing.assert_close(values, function(z))
    for row, point in enumerate(z):
        torch.testing.assert_close(gradients[row], jacobian(lambda x: function(x[None])[0], point))
        for output in range(3):
            bend = hessian(lambda x, output=output: function(x[None])[0, output], point)
            torch.testing.assert_close(second[row, output], bend.diagonal().flip(0))


def test_gray_scott_operator_on_manufactured_functions():
    """u = sin(x) cos(t), v = x^2 exp(-t): derivatives by hand."""
    z = points(50, [0.0, -1.0], [1.0, 1.0])
    t, x = z[:, :1], z[:, 1:]
    u, v = torch.sin(x) * torch.cos(t), x**2 * torch.exp(-t)
    d, r, f, k = 0.002, 60.0, 2.4, 3.6
    expected = torch.cat(
        [
            -torch.sin(x) * torch.sin(t) + 2 * d * u + r * u * v**2 - f * (1 - u),
            -v - d * 2 * torch.exp(-t) - r * u * v**2 + (f + k) * v,
        ],
        dim=1,
    )

    def functions(z):
        t, x = z[:, :1], z[:, 1:]
        return torch.cat([torch.sin(x) * torch.cos(t), x**2 * torch.exp(-t)], dim=1)

    _, found = gray_scott.gray_scott_operator(functions, z)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_navier_stokes_operator_on_the_flow_of_kovasznay():
    """An exact solution on the plane (Kovasznay 1948); of another Reynolds number it is none."""
    decay = 20.0 - np.sqrt(400.0 + 4.0 * np.pi**2)

    def flow(z):
        x, y = z[:, :1], 2 * PI * z[:, 1:]
        e = torch.exp(decay * x)
        v = decay / (2 * PI) * e * torch.sin(y)
        return torch.cat([1 - e * torch.cos(y), v, (1 - e**2) / 2], dim=1)

    z = points(100, [0.0, 0.0], [1.0, 1.0])
    _, found = cavity.navier_stokes_operator(flow, z, 40.0)
    assert found.abs().max() < 1e-12
    _, other = cavity.navier_stokes_operator(flow, z, 50.0)
    assert other[:, :2].abs().max() > 1e-2 and other[:, 2].abs().max() < 1e-12


def test_walls_of_the_cavity():
    inputs, targets = problems.build("lid-driven-cavity", dtype=torch.float64).train
    on_wall = inputs[:, 2] == pinn.BOUNDARY
    place, (values, weights) = inputs[on_wall, :2], targets[on_wall].split(3, dim=1)
    assert ((place == 0) | (place == 1)).any(dim=1).all() and len(place) == 240
    lid = values[:, 0] == 1
    assert lid.sum() == 60 and (place[lid, 1] == 1).all() and (place[lid, 0] % 1 > 0).all()
    assert (values[~lid] == 0).all() and (values[:, 1:] == 0).all() and (weights[:, :2] > 0).all()
    (origin,) = place[weights[:, 2] > 0]
    assert (origin == 0).all()


def test_flow_in_the_cavity_is_that_of_ghia():
    """Their second-order grid of 129 points is that far from a converged flow; see the next test for this one."""
    nodes, u, v = cavity_flow(100.0)
    middle = np.array([0.5])
    np.testing.assert_allclose(interpolated(nodes, u, middle, np.array(GHIA_Y))[0], GHIA_U, atol=6e-3)
    np.testing.assert_allclose(interpolated(nodes, v, np.array(GHIA_X), middle)[:, 0], GHIA_V, atol=1e-2)


def test_flow_in_the_cavity_is_converged_and_conserves_mass():
    axis = np.linspace(0.1, 0.9, 17)
    coarse, fine = (cavity_flow(100.0, degree) for degree in (24, 32))
    for part in (1, 2):
        found, finer = (interpolated(flow[0], flow[part], axis, axis) for flow in (coarse, fine))
        assert np.abs(found - finer).max() < 1e-3
    nodes, u, _ = fine
    # No net flow through the middle, by Simpson's rule on the polynomial.
    y = np.linspace(0.0, 1.0, 1001)
    weights = np.where(np.arange(1001) % 2, 4.0, 2.0) / 3000.0
    weights[[0, -1]] /= 2.0
    assert abs(weights @ interpolated(nodes, u, np.array([0.5]), y)[0]) < 1e-6


def test_interpolation_of_a_polynomial():
    nodes, _, _ = cavity_flow(1.0, degree=8)
    x, y = np.linspace(0.0, 1.0, 7), nodes[2:5]
    values = interpolated(nodes, np.outer(nodes**3, nodes**2 - nodes), x, y)
    np.testing.assert_allclose(values, np.outer(x**3, y**2 - y), atol=1e-13)


def test_etdrk4_is_of_order_four():
    """w' = -w + w^2, w(0) = 1/2: w = 1 / (1 + exp(t)); and the linear part alone is exact."""
    start = np.full((1, 4), 0.5)
    linear = np.full((1, 3), -1.0)
    errors = []
    for steps in (4, 8, 16):
        found = etdrk4.march(start, linear, lambda w: w**2, 2.0, steps, 2)
        errors.append(np.abs(found[:, 0, 0] - 1.0 / (1.0 + np.exp([0.0, 1.0, 2.0]))).max())
    assert errors[2] < 1e-5 and 12.0 < errors[0] / errors[1] < 20.0 and 12.0 < errors[1] / errors[2] < 20.0
    exact = etdrk4.march(start, linear, np.zeros_like, 2.0, 2, 2)
    np.testing.assert_allclose(exact[-1], 0.5 * np.exp(-2.0), rtol=1e-14)


def test_etdrk4_of_modes_that_hardly_decay():
    """The coefficients of L = 0 are those of Runge and Kutta, without a quotient 0 / 0."""
    given = etdrk4.coefficients(np.zeros(1), 0.3)
    np.testing.assert_allclose([*given], [[1], [1], [0.15], [0.05], [0.05], [0.05]], rtol=1e-13)


def test_gray_scott_reference_is_converged_symmetric_and_starts_as_the_network():
    times, positions, values = gray_scott.reference_solution()
    _, _, fine = gray_scott.reference_solution(512, 2000)
    assert np.abs(values - fine[:, :, ::2]).max() < 1e-7
    np.testing.assert_allclose(values[:, :, 1:], values[:, :, :0:-1], atol=1e-10)
    assert times[-1] == 1.0 and values.min() > -1e-9 and values[:, 0].max() < 1.0 + 1e-9
    network = problems.build("gray-scott", dtype=torch.float64).network
    place = torch.from_numpy(np.column_stack([np.zeros(256), positions]))
    np.testing.assert_allclose(network(place).detach(), values[0].T, atol=1e-12)
    shifted = network(place + torch.tensor([0.3, 2.0]))
    torch.testing.assert_close(shifted, network(place + torch.tensor([0.3, 0.0])))


def test_gray_scott_reference_satisfies_the_equations():
    """Differences of fourth order of the steps' ends, inside the time."""
    _, _, values = gray_scott.reference_solution(256, 500)
    wave_numbers = np.fft.rfftfreq(256, d=2.0 / 256) * 2.0 * np.pi
    t = 0.02
    w_t = (values[:-4] - 8 * values[1:-3] + 8 * values[3:-1] - values[4:]) / (12 * t)
    u, v = np.moveaxis(values[2:-2], 1, 0)
    w_xx = np.fft.irfft(-(wave_numbers**2) * np.fft.rfft(values[2:-2]), 256)
    reaction = 60.0 * u * v**2
    r_u = w_t[:, 0] - (0.004 * w_xx[:, 0] - reaction + 2.4 * (1 - u))
    r_v = w_t[:, 1] - (0.002 * w_xx[:, 1] + reaction - 6.0 * v)
    assert max(np.abs(r_u).max(), np.abs(r_v).max()) < 2e-2 * np.abs(w_t).max()


@pytest.mark.parametrize("name", ["wave", "advection", "inverse-diffusion"])
def test_hard_conditions_hold_whatever_the_parameters(name):
    network = problems.build(name, dtype=torch.float64, seed=3).network
    x = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)[:, None] * (2 * PI if name == "advection" else 1.0)
    start = torch.cat([torch.zeros_like(x), x], dim=1).requires_grad_()
    values = network(start)[:, :1]
    first, second = torch.sin(PI * x), torch.sin((4 if name == "wave" else 3) * PI * x)
    expected = torch.sin(x) if name == "advection" else first + 0.5 * second
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-14)
    if name == "wave":
        assert torch.autograd.grad(values.sum(), start)[0][:, 0].abs().max() == 0.0
    times = torch.linspace(0.0, 0.5, 5, dtype=torch.float64)[:, None]
    left, right = (network(torch.cat([times, torch.full_like(times, end)], dim=1))[:, :1] for end in (0.0, x[-1, 0]))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-13)
    assert name == "advection" or left.abs().max() < 1e-13


def test_coefficients_are_parameters_and_values():
    network = WithCoefficients(HardConditions(torch.nn.Linear(2, 1), lambda z: z[:, :1], lambda z: z[:, 1:]), [2.0])
    found = network(torch.zeros(3, 2))
    assert found.shape == (3, 2) and (found[:, 1] == 2.0).all()
    assert "coefficients" in dict(network.named_parameters())


def test_measurements_have_the_noise_that_was_asked_for():
    inputs, targets = inverse.inverse_diffusion(torch.float64, noise=0.1).train
    measured = inputs[:, 2] == pinn.BOUNDARY
    errors = targets[measured, 0].numpy() - inverse.solution(inputs[measured, :2].numpy())
    assert abs(errors.std() - 0.1) < 0.015 and abs(errors.mean()) < 0.02 and len(errors) == 200


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build("helmholtz-2d", arguments={"waves": "0"}), "waves: 0 .* give 1 or more"),
        (lambda: transport.wave(torch.float32, speed=0.0), "speed: 0.0 .* above 0"),
        (lambda: transport.advection(torch.float32, speed=-1.0), "speed: -1.0 .* above 0"),
        (lambda: inverse.inverse_diffusion(torch.float32, noise=-0.1), "noise: -0.1 .* give 0 or more"),
        (lambda: cavity.lid_driven_cavity(torch.float32, reynolds=1e4), "reynolds: 10000.0 .* up to 400"),
    ],
)
def test_arguments_that_make_no_problem(make, message):
    with pytest.raises(InvalidInput, match=message):
        make()
