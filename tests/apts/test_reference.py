"""The solver against the method written down again in plain torch, and against known answers.

Nothing here uses the package's own arithmetic; tolerances are rounding of sums in another order.
"""

import math

import pytest
import torch
from networks import classified, classifier, cross_entropy, flat, loss_and_gradient, make_solver, options, squared_error
from torch import nn
from torch.func import functional_call

SUBDOMAINS = 6  # as many as the classifier has layers


class Reference:
    """One Schwarz step of the classifier, with a subdomain a layer or a sixth of the data, all in one process."""

    def __init__(self, network, batch, chosen):
        self.network, self.batch, self.chosen = network, batch, chosen
        self.of_data = chosen.schwarz.decomposition == "data"
        self.names = [name for name, _ in network.named_parameters()]
        self.shapes = [parameter.shape for parameter in network.parameters()]
        self.theta = flat(network.parameters())
        sizes = [flat(module.parameters()).numel() for module in network if isinstance(module, nn.Linear)]
        self.edges = [sum(sizes[:count]) for count in range(len(sizes) + 1)]
        self.gradient = self.derivative(lambda values: self.loss(values, batch), self.theta)

    def parameters(self, values):
        parts = values.split([shape.numel() for shape in self.shapes])
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def loss(self, values, batch):
        return cross_entropy(functional_call(self.network, self.parameters(values), batch[0]), batch[1])

    @staticmethod
    def derivative(function, values):
        values = values.clone().requires_grad_()
        return torch.autograd.grad(function(values), values)[0]

    def extended(self, index):
        """First and last layer of a subdomain with its overlap."""
        overlap = self.chosen.schwarz.overlap
        return max(index - overlap, 0), min(index + overlap, SUBDOMAINS - 1)

    def samples(self, index):
        inputs, targets = self.batch
        if self.chosen.schwarz.local_data == "full":
            return inputs, targets
        own = slice(len(inputs) * index // SUBDOMAINS, len(inputs) * (index + 1) // SUBDOMAINS)
        return inputs[own], targets[own]

    def local_function(self, index):
        """f_d without the correction, as a function of all parameters."""
        inputs, targets = self.samples(index)
        first, last = self.extended(index)
        if self.chosen.schwarz.variant == "exact" or last == SUBDOMAINS - 1:
            return lambda values: self.loss(values, (inputs, targets))
        # A layer is a linear map and the activation after it.
        own = self.network[2 * first : 2 * last + 2]
        with torch.no_grad():
            entering = self.network[: 2 * first](inputs)
            leaving = own(entering)
        rest = self.network[2 * last + 2 :]
        weights = self.derivative(lambda outputs: cross_entropy(rest(outputs), targets), leaving)

        def product(values):
            parameters = self.parameters(values)
            inside = {name: parameters[name] for name, _ in own.named_parameters()}
            return (functional_call(own, inside, entering) * weights).sum()

        return product

    def local_problem(self, index):
        """Value and gradient of the first-order consistent local objective, as functions of the displacement."""
        function = self.local_function(index)
        first, last = self.extended(index)
        block = slice(self.edges[first], self.edges[last + 1])
        if self.of_data:
            block = slice(0, len(self.theta))
        own = self.derivative(function, self.theta)[block]

        def moved(displacement):
            values = self.theta.clone()
            values[block] += displacement
            return values

        def value(displacement):
            linear = (self.gradient[block] - own) @ displacement
            return function(moved(displacement)).item() + linear.item()

        def gradient(displacement):
            return self.derivative(function, moved(displacement))[block] - own + self.gradient[block]

        return block, value, gradient

    def down(self, gradient, radius):
        if self.chosen.trust_region.norm == "inf":
            return -radius * torch.sign(gradient)
        return -radius / gradient.norm() * gradient

    def steepest_descent(self, radius, gradient, displacement):
        iterations = self.chosen.local.iterations
        for _ in range(iterations):
            displacement = displacement + self.down(gradient(displacement), radius / iterations)
        return displacement

    def trust_region(self, radius, value, gradient, displacement):
        options, kind = self.chosen.trust_region, 2 if self.chosen.trust_region.norm == "2" else math.inf
        reach = radius
        for _ in range(self.chosen.local.iterations):
            trial = displacement + self.down(gradient(displacement), reach)
            trial = trial * min(1.0, radius / torch.linalg.vector_norm(trial, kind).item())
            predicted = -(gradient(displacement) @ (trial - displacement)).item()
            rho = (value(displacement) - value(trial)) / predicted if predicted > 0.0 else -1.0
            if rho >= options.eta1:
                displacement = trial
            if rho < options.shrink_below:
                reach = options.decrease_factor * reach
            elif rho >= options.eta2:
                reach = min(options.increase_factor * reach, radius)
        return displacement

    def step(self, radius):
        """The assembled correction."""
        options = self.chosen
        local_radius = radius
        if options.trust_region.norm == "2" and not self.of_data:
            local_radius = radius / math.sqrt(SUBDOMAINS)
        covered = torch.zeros_like(self.theta)
        for index in range(SUBDOMAINS):
            covered[self.local_problem(index)[0]] += 1.0
        total = torch.zeros_like(self.theta)
        for index in range(SUBDOMAINS):
            block, value, gradient = self.local_problem(index)
            start = torch.zeros_like(self.theta[block])
            if options.local.solver == "sgd":
                displacement = self.steepest_descent(local_radius, gradient, start)
            else:
                displacement = self.trust_region(local_radius, value, gradient, start)
            correction = torch.zeros_like(self.theta)
            correction[block] = displacement
            if options.schwarz.type == "restrict" and not self.of_data:
                owned = torch.zeros_like(correction)
                owned[self.edges[index] : self.edges[index + 1]] = 1.0
                correction *= owned
            else:
                correction /= covered.clamp(min=1.0)
            assert self.gradient @ correction < 0.0  # else the solver goes down the gradient instead
            total += correction
        return options.schwarz.damping * total


@pytest.mark.mpi
@pytest.mark.all_sizes(choice={"variant": "inexact", "solver": "tr", "iterations": 3, "overlap": 1, "type": "basic"})
@pytest.mark.parametrize(
    "choice",
    [
        {"variant": "exact", "solver": "sgd", "iterations": 1},
        {"variant": "exact", "solver": "sgd", "iterations": 3, "damping": 0.5},
        {"variant": "exact", "solver": "tr", "iterations": 3, "norm": "inf", "initial_radius": 0.05},
        {"variant": "exact", "solver": "tr", "iterations": 4, "local_data": "full", "initial_radius": 5.0},
        {"variant": "exact", "solver": "sgd", "iterations": 2, "overlap": 1, "type": "basic"},
        {"variant": "inexact", "solver": "sgd", "iterations": 3, "norm": "inf", "initial_radius": 0.05},
        {"variant": "inexact", "solver": "sgd", "iterations": 2, "local_data": "full"},
        {"variant": "inexact", "solver": "tr", "iterations": 3, "overlap": 1, "type": "basic"},
        {"variant": "inexact", "solver": "tr", "iterations": 2, "overlap": 2, "type": "restrict"},
        {"decomposition": "data", "solver": "sgd", "iterations": 3},
        {"decomposition": "data", "solver": "tr", "iterations": 3, "norm": "inf", "initial_radius": 0.05},
    ],
    ids=lambda choice: "-".join(map(str, choice.values())),
)
def test_one_step(world, choice):
    chosen = options(subdomains=SUBDOMAINS, **choice)
    network, batch = classifier(), classified()
    solver = make_solver(world, chosen, network)
    judged = solver.step(batch).schwarz
    if world.rank > 0:
        return
    reference = Reference(classifier(), batch, chosen)
    step = reference.step(chosen.trust_region.initial_radius)
    torch.testing.assert_close(solver.holding.schwarz.correction, step, rtol=1e-10, atol=1e-12)
    assert step.count_nonzero() > 0.9 * len(step)  # no local solve stood still
    loss, trial_loss = (reference.loss(reference.theta + part, batch).item() for part in (0.0 * step, step))
    predicted = -(reference.gradient @ step).item()
    assert judged.loss == pytest.approx(loss, rel=1e-13)
    assert judged.trial_loss == pytest.approx(trial_loss, rel=1e-10)
    assert judged.predicted_reduction == pytest.approx(predicted, rel=1e-10)
    assert judged.rho == pytest.approx((loss - trial_loss) / predicted, rel=1e-9)
    kind = 2 if chosen.trust_region.norm == "2" else math.inf
    assert judged.step_norm == pytest.approx(torch.linalg.vector_norm(step, kind).item(), rel=1e-10)
    assert judged.gradient_norm == pytest.approx(reference.gradient.norm().item(), rel=1e-12)
    moved = step if judged.accepted else 0.0 * step
    torch.testing.assert_close(flat(network.parameters()), reference.theta + moved, rtol=1e-10, atol=1e-12)


def first_order_trust_region(network, loss, batch, radius, kind, steps, direction):
    """A trust region by hand: the model is the tangent plane, its minimiser a multiple of ``direction(gradient)``."""
    parameters = list(network.parameters())
    found = []
    for _ in range(steps):
        value, gradient = loss_and_gradient(network, loss, batch)
        step = direction(gradient)
        step = step * (radius / torch.linalg.vector_norm(step, kind))
        before = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, part in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
                parameter += part.view_as(parameter)
        trial, predicted = loss_and_gradient(network, loss, batch)[0], -(gradient @ step).item()
        rho = (value - trial) / predicted
        found.append((value, trial, predicted, rho, radius))
        if rho < 1e-4:
            with torch.no_grad():
                for parameter, old in zip(parameters, before, strict=True):
                    parameter.copy_(old)
        if rho < 0.25:
            radius = radius / 4
        elif rho >= 0.75:
            radius = 2 * radius
    return found


def steepest(kind):
    return (lambda gradient: -gradient) if kind == 2 else (lambda gradient: -torch.sign(gradient))


def compare_with_hand_written(world, chosen, steps, direction):
    """Run the solver on all ranks, the trust region by hand on rank 0; return what the solver found."""
    network, other, batch = classifier(), classifier(), classified()
    solver = make_solver(world, chosen, network)
    judged = [solver.step(batch).schwarz for _ in range(steps)]
    if world.rank == 0:
        kind, radius = float(chosen.trust_region.norm), chosen.trust_region.initial_radius
        expected = first_order_trust_region(other, cross_entropy, batch, radius, kind, steps, direction)
        found = [(j.loss, j.trial_loss, j.predicted_reduction, j.rho, j.radius) for j in judged]
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(flat(network.parameters()), flat(other.parameters()), rtol=1e-10, atol=1e-12)
    return judged


@pytest.mark.mpi
@pytest.mark.all_sizes(solver="tr", norm="2")
@pytest.mark.parametrize("solver", ["sgd", "tr"])
@pytest.mark.parametrize(("norm", "radius"), [("2", 6.0), ("inf", 0.3)])
def test_one_subdomain_is_a_first_order_trust_region(world, solver, norm, radius):
    chosen = options(subdomains=1, solver=solver, norm=norm, initial_radius=radius)
    judged = compare_with_hand_written(world, chosen, 12, steepest(float(norm)))
    # The run had steps of every kind.
    assert {j.accepted for j in judged} == {True, False}
    assert any(j.next_radius > j.radius for j in judged)


class AdamDirection:
    """The step of torch.optim.Adam from the origin."""

    def __init__(self, size):
        self.point = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.optimizer = torch.optim.Adam([self.point], lr=1.0)

    def __call__(self, gradient):
        with torch.no_grad():
            self.point.zero_()
        self.point.grad = gradient
        self.optimizer.step()
        step = self.point.detach().clone()
        assert step @ gradient < 0.0  # else the solver goes down the gradient instead
        return step


@pytest.mark.mpi
def test_one_subdomain_with_adam_goes_along_torchs_adam(world):
    """The direction is that of torch.optim.Adam, its length the radius."""
    chosen = options(subdomains=1, solver="adam", norm="2", initial_radius=0.2)
    direction = AdamDirection(flat(classifier().parameters()).numel()) if world.rank == 0 else None
    compare_with_hand_written(world, chosen, 8, direction)


def least_squares(samples=40, features=5, outputs=3):
    """A linear problem with a known minimiser: weights and bias, shape (features + 1, outputs), and the loss there."""
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(samples, features, generator=generator).double()
    targets = torch.randn(samples, outputs, generator=generator).double()
    extended = torch.cat([inputs, torch.ones(samples, 1).double()], dim=1)
    solution = torch.linalg.lstsq(extended, targets).solution
    return (inputs, targets), solution, squared_error(extended @ solution, targets).item()


@pytest.mark.mpi
@pytest.mark.parametrize(
    "choice",
    [
        {"solver": "sgd", "norm": "2", "global_step": "first-order"},
        {"solver": "tr", "iterations": 5, "norm": "inf", "local_data": "full", "variant": "inexact"},
    ],
    ids=lambda choice: "-".join(map(str, choice.values())),
)
def test_quadratic_converges_to_its_minimiser(world, choice):
    batch, solution, least = least_squares()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 3)).double()
    chosen = options(subdomains=4, partition="index", initial_radius=1.0, min_radius=1e-12, **choice)
    solver = make_solver(world, chosen, network, squared_error)
    solver.step(batch)
    for _ in range(70):
        judged = solver.step().schwarz
    # Near the minimum a loss of 1 falls by less than its rounding, 1e-16, within 1e-8 of the minimiser.
    assert judged.loss == pytest.approx(least, rel=1e-12)
    found = torch.cat([network[0].weight.T, network[0].bias[None]])
    torch.testing.assert_close(found, solution, rtol=0.0, atol=1e-6)
