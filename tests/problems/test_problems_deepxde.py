"""Problems of deepxde: the same loss to rounding, whatever the conditions, and derivatives sample by sample."""

import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev, vmap

from apts_mpi.errors import InvalidInput
from apts_mpi.problems import from_deepxde

os.environ["DDE_BACKEND"] = "pytorch"
import deepxde as dde

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
NAMES = ("deepxde_poisson", "deepxde_diffusion", "deepxde_burgers")


@pytest.fixture(autouse=True)
def in_float64():
    """As all tests, these leave torch's default dtype as it was."""
    before = torch.get_default_dtype()
    dde.config.set_default_float("float64")
    yield
    dde.config.set_default_float("float32")
    torch.set_default_dtype(before)


def on_any(x, on_boundary):
    return on_boundary


def network(inputs=2, outputs=1, seed=0):
    torch.manual_seed(seed)
    return dde.nn.FNN([inputs, 8, 8, outputs], "tanh", "Glorot uniform")


def total(data, net, weights=None):
    """deepxde's own total loss."""
    model = dde.Model(data, net)
    model.compile("adam", lr=1e-3, loss_weights=weights, verbose=0)
    _, losses = model._outputs_losses(True, data.train_x, data.train_y, data.train_aux_vars)
    return float(torch.as_tensor(losses).sum())


def loss_of(problem, rows=slice(None)):
    inputs, targets = (half[rows] for half in problem.train)
    return problem.loss(problem.forward(problem.network, inputs), targets)


def square():
    """Made in the tests' precision."""
    return dde.geometry.Rectangle([0, 0], [1, 2])


def laplace(x, u):
    return dde.grad.hessian(u, x, i=0, j=0) + dde.grad.hessian(u, x, i=1, j=1) - torch.sin(x[:, :1])


def stokes(x, u):
    slopes = [dde.grad.jacobian(u, x, i=i, j=i) for i in (0, 1)]
    mixed = dde.grad.hessian(u, x, component=1, i=0, j=1)
    return [slopes[0] + slopes[1], mixed * u[:, :1] - u[:, 2:]]


def of_third_order(x, u):
    u_x = dde.grad.jacobian(u, x, i=0, j=0)
    return dde.grad.hessian(u_x, x, i=0, j=1) + u


CASES = (
    *("dirichlet", "weights", "robin", "periodic", "measured", "system"),
    *("third order", "equation alone", "conditions alone"),
)


def cases():
    """Name: (equation, conditions, outputs of the network, weights)."""
    icbc = dde.icbc
    dirichlet = icbc.DirichletBC(square(), lambda x: x[:, :1] ** 2, on_any)
    neumann = icbc.NeumannBC(square(), lambda x: np.cos(x[:, 1:]), lambda x, on: on and np.isclose(x[0], 1.0))
    robin = icbc.RobinBC(square(), lambda x, u: u**2, lambda x, on: on and np.isclose(x[1], 2.0))
    periodic = [
        icbc.PeriodicBC(square(), 0, lambda x, on: on and np.isclose(x[0], 0.0), derivative_order=order)
        for order in (0, 1)
    ]
    places = np.array([[0.2, 0.3], [0.7, 1.5], [0.5, 0.5]])
    measured = icbc.PointSetBC(places, np.array([[1.0], [2.0], [0.5]]))
    several = icbc.PointSetBC(places, np.arange(6.0).reshape(3, 2), component=[2, 0])
    operator = icbc.OperatorBC(square(), lambda x, u, _: dde.grad.jacobian(u, x, i=0, j=1) * u, on_any)
    pointwise = icbc.PointSetOperatorBC(places, np.ones((3, 1)), lambda x, u, _: dde.grad.jacobian(u, x, j=0) + u)
    return {
        "dirichlet": (laplace, [dirichlet], 1, None),
        "weights": (laplace, [dirichlet, neumann], 1, [0.1, 3.0, 20.0]),
        "robin": (laplace, [robin, neumann], 1, None),
        "periodic": (laplace, periodic, 1, [1.0, 2.0, 3.0]),
        "measured": (laplace, [measured, operator, pointwise], 1, [1.0, 5.0, 2.0, 0.5]),
        "system": (stokes, [icbc.DirichletBC(square(), lambda x: 0, on_any, component=1), several], 3, [1, 2, 3, 4]),
        "third order": (of_third_order, [dirichlet], 1, None),
        "equation alone": (laplace, [], 1, None),
        "conditions alone": (None, [dirichlet], 1, None),
    }


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_deepxde(case):
    equation, conditions, outputs, weights = cases()[case]
    data = dde.data.PDE(square(), equation, conditions, num_domain=37, num_boundary=24)
    net = network(outputs=outputs)
    problem = from_deepxde(data, net, loss_weights=weights)
    assert problem.network is net
    expected = total(data, net, weights)
    assert float(loss_of(problem).detach()) == pytest.approx(expected, rel=1e-12)
    with torch.no_grad():  # As where a loss is only reported.
        assert float(loss_of(problem).detach()) == pytest.approx(expected, rel=1e-12)
    # Mean over the samples, whichever are in a pass.
    count = len(problem.train[0])
    parts = [
        loss_of(problem, slice(*edge)).detach().item() * (edge[1] - edge[0])
        for edge in ((0, 11), (11, 12), (12, count))
    ]
    assert sum(parts) / count == pytest.approx(float(loss_of(problem).detach()), rel=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_deepxde(case):
    equation, conditions, outputs, weights = cases()[case]
    data = dde.data.PDE(square(), equation, conditions, num_domain=37, num_boundary=24)
    net = network(outputs=outputs)
    problem = from_deepxde(data, net, loss_weights=weights)
    mine = torch.autograd.grad(loss_of(problem), list(net.parameters()), materialize_grads=True)
    points = torch.from_numpy(data.train_x).requires_grad_()
    dde.grad.clear()
    losses = data.losses(None, net(points), dde.losses.get("MSE"), points, None)
    total_loss = sum(weight * loss for weight, loss in zip(weights or [1.0] * len(losses), losses, strict=True))
    theirs = torch.autograd.grad(total_loss, list(net.parameters()), allow_unused=True)
    for one, other in zip(mine, theirs, strict=True):
        # The last bias has none in an equation of derivatives alone.
        torch.testing.assert_close(one, torch.zeros_like(one) if other is None else other, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", ["dirichlet", "weights", "periodic", "system"])
def test_all_rows_come_from_one_pass(case):
    """Sample by sample, as the Gauss-Newton matrix is formed without a backward pass for each residual."""
    equation, conditions, outputs, weights = cases()[case]
    data = dde.data.PDE(square(), equation, conditions, num_domain=9, num_boundary=8)
    problem = from_deepxde(data, network(outputs=outputs), loss_weights=weights)
    values = {name: value.detach() for name, value in problem.network.named_parameters()}

    def outputs_of(values, sample):
        return problem.forward(lambda x: functional_call(problem.network, values, (x,)), sample[None])[0]

    rows = vmap(jacrev(outputs_of), in_dims=(None, 0))(values, problem.train[0])
    output = problem.forward(problem.network, problem.train[0])
    by_autograd = torch.autograd.grad(output[4, 0], problem.network.linears[0].weight, allow_unused=True)[0]
    torch.testing.assert_close(rows["linears.0.weight"][4, 0], by_autograd)


@pytest.mark.parametrize("name", NAMES)
def test_examples_have_the_loss_of_deepxde_and_an_error(name):
    program = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    torch.manual_seed(0)
    data, net = program["data_and_network"]()
    problem = from_deepxde(data, net)
    assert float(loss_of(problem).detach()) == pytest.approx(total(data, net), rel=1e-12)
    points, solution, _ = data.test()
    expected = dde.metrics.l2_relative_error(solution, net(torch.from_numpy(points)).detach().numpy())
    assert problem.metrics["relative_l2_error"](net) == pytest.approx(expected, rel=1e-12)


def test_drawn_points_are_within_the_domain_and_weigh_as_those_before():
    program = runpy.run_path(str(EXAMPLES / "deepxde_diffusion.py"))
    problem = program["problem"]()
    inputs, targets = problem.train
    rows = problem.redraw.rows
    assert len(rows) == 40 and ((inputs[rows, 0].abs() < 1) & (inputs[rows, 1] > 0)).all()
    state = np.random.get_state()[1].copy()  # noqa: NPY002 - what deepxde draws from
    drawn = [problem.redraw.draw(torch.Generator().manual_seed(seed), 30) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0][0], drawn[1][0]) and not torch.equal(drawn[0][0], drawn[2][0])
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert torch.equal(drawn[0][1][0], targets[rows[0]]) and (drawn[0][0][:, 2:] == 0).all()


def test_hard_constraints_and_features_of_the_network_count():
    net = network()
    net.apply_feature_transform(lambda x: torch.sin(x))
    net.apply_output_transform(lambda x, u: u * x[:, :1] + 1.0)
    data = dde.data.PDE(square(), laplace, [], num_domain=20)
    assert float(loss_of(from_deepxde(data, net)).detach()) == pytest.approx(total(data, net), rel=1e-12)


COEFFICIENT = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)  # as dde.Variable is


def data_of(**changes):
    return dde.data.PDE(**{"geometry": square(), "pde": laplace, "bcs": [], "num_domain": 9} | changes)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"pde": lambda x, u: COEFFICIENT * u}, {}, "data: its equations have a variable to be trained"),
        ({}, {"loss_weights": [1.0, 2.0]}, r"loss_weights: \[1.0, 2.0\] .* give 1"),
        ({"pde": lambda x, u: u[:, 0]}, {}, r"shape of equation 0: \(9,\) .* give \(9, 1\)"),
        ({"auxiliary_var_function": lambda x: x}, {}, "auxiliary_var_function: .* in the equation"),
        (
            {"bcs": lambda: [dde.icbc.DirichletBC(square(), lambda x: 0, on_any)]},
            {},
            "points of condition 0: 0 .* num_boundary",
        ),
        (
            {"bcs": lambda: [dde.icbc.DirichletBC(square(), lambda x: x[:, 0], on_any)], "num_boundary": 8},
            {},
            r"values of a condition: shape \(8,\) .* give \(8, 1\)",
        ),
        (
            {"bcs": lambda: [dde.icbc.PointSetBC(np.zeros((4, 2)), np.zeros((4, 1)), batch_size=2)]},
            {},
            "batch_size of condition 0: 2 .* leave it out",
        ),
    ],
)
def test_what_would_be_another_problem_is_refused(changes, options, message):
    # Conditions are made in the precision of the test.
    changes = {name: value() if name == "bcs" else value for name, value in changes.items()}
    with pytest.raises(InvalidInput, match=message):
        from_deepxde(data_of(**changes), network(), **options)


def test_other_networks_and_data_are_refused():
    regularised = dde.nn.FNN([2, 4, 1], "tanh", "Glorot uniform", regularization=["l2", 1e-3])
    with pytest.raises(InvalidInput, match="regularization of the network: .* --weight-decay"):
        from_deepxde(data_of(), regularised)
    with pytest.raises(InvalidInput, match="data: 'Function' .* give a deepxde.data.PDE"):
        from_deepxde(dde.data.Function(square(), lambda x: x[:, :1], 5, 5), network())

    class Own(dde.icbc.DirichletBC):
        pass

    with pytest.raises(InvalidInput, match="condition 0: 'Own' .* give one of DirichletBC, IC"):
        from_deepxde(data_of(bcs=[Own(square(), lambda x: 0, on_any)], num_boundary=8), network())
