"""The methods of the papers by name, against their algorithms written down again from the equations, in one process."""

import math

import pytest
import torch
from networks import classified, classifier, cross_entropy, flat, make_solver
from test_reference import SUBDOMAINS, Reference
from torch.func import functional_call, jvp

from apts_mpi.options.methods import of_method

ITERATIONS = 10


class Paper:
    """The iterations of a method on one batch: local solves, assembly, judgement, then steps down the gradient."""

    def __init__(self, network, batch, chosen):
        self.network, self.batch, self.chosen = network, batch, chosen
        self.radius = chosen.trust_region.initial_radius
        self.window, self.kept, self.rejected = [], None, 0
        # Of the coarse level, which follows the ratio once a step was accepted on the batch.
        self.factor, self.has_accepted = 1.0, False

    def at_present(self):
        return Reference(self.network, self.batch, self.chosen)

    def iterate(self):
        present = self.at_present()
        if self.kept is None:
            self.kept, self.local_reduction = self.corrections(present)
        step, predicted = self.assembled(present)
        stays = self.has_accepted
        accepted = self.judge(present, step, predicted)
        if stays:
            self.factor *= 4.0 if self.rho < 0.25 else 0.25 if self.rho > 0.75 else 1.0
        if accepted or self.chosen.schwarz.prediction == "local":
            self.kept = None
        for _ in range(self.chosen.global_step.iterations):
            present = self.at_present()
            gradient = present.gradient
            step = -self.radius / gradient.norm() * gradient
            if self.judge(present, step, -(gradient @ step).item()):
                self.kept = None

    def corrections(self, present):
        """Of the subdomains, zero elsewhere, shape (N, n); and the sum of what their objectives fell by."""
        of_data = self.chosen.schwarz.decomposition == "data"
        local_radius = self.radius / (SUBDOMAINS if of_data else math.sqrt(SUBDOMAINS))
        found, reduction = torch.zeros(SUBDOMAINS, len(present.theta), dtype=torch.float64), 0.0
        for index in range(SUBDOMAINS):
            block, value, gradient = present.local_problem(index)
            start = torch.zeros_like(present.theta[block])
            end = present.trust_region(local_radius, value, gradient, start)
            if not of_data and not end.any():
                # A subdomain that found nothing better gives the steepest descent, so that each correction goes down.
                end = present.down(present.gradient[block], local_radius)
            found[index, block] = end
            reduction += value(start) - value(end)
        return found, reduction

    def assembled(self, present):
        if self.chosen.coarse.model != "none":
            return self.recombined(present)
        step = self.kept.sum(dim=0)
        step = step * min(1.0, self.radius / max(step.norm().item(), self.radius / 2))
        if self.chosen.schwarz.prediction == "local":
            return step, self.local_reduction
        return step, -(present.gradient @ step).item()

    def recombined(self, present):
        """The minimiser of the damped Gauss-Newton model in the span of corrections and parts of the gradient."""
        parts = torch.zeros_like(self.kept)
        for index in range(SUBDOMAINS):
            block = present.local_problem(index)[0]
            parts[index, block] = present.gradient[block]
        columns = torch.stack(
            [column / column.norm() for column in torch.cat([self.kept, parts]) if column.norm() > 0.0]
        )
        left, sizes, _ = torch.linalg.svd(columns.T, full_matrices=False)
        basis = left[:, sizes > 1e-5]

        def outputs(values):
            return functional_call(self.network, present.parameters(values), self.batch[0])

        shares = outputs(present.theta).detach().softmax(dim=1)
        matrix = torch.zeros(len(basis.T), len(basis.T), dtype=torch.float64)
        tangents = [jvp(outputs, (present.theta,), (column,))[1].detach() for column in basis.T]
        for row, left in enumerate(tangents):
            for column, right in enumerate(tangents):
                curved = shares * right - shares * (shares * right).sum(dim=1, keepdim=True)
                matrix[row, column] = (left * curved).sum() / len(left)
        slope = basis.T @ present.gradient
        values, vectors = torch.linalg.eigh(matrix)
        damped = values + max(0.1 * self.factor, 1e-8) * values.max()
        turned = vectors.T @ slope
        low, high = 0.0, 1e6
        if (turned / damped).norm() > self.radius:
            for _ in range(200):
                middle = (low + high) / 2
                low, high = (middle, high) if (turned / (damped + middle)).norm() > self.radius else (low, middle)
        step = -vectors @ (turned / (damped + low))
        return basis @ step, -(slope @ step + step @ matrix @ step / 2).item()

    def judge(self, present, step, predicted):
        options = self.chosen.trust_region
        loss, trial = (present.loss(present.theta + part, self.batch).item() for part in (0.0 * step, step))
        accepted = predicted > 0.0 and (max([loss, *self.window]) - trial) / predicted >= options.eta1
        self.rho = rho = (loss - trial) / predicted if predicted > 0.0 else -math.inf
        self.has_accepted |= accepted
        if rho < options.shrink_below:
            self.radius = options.decrease_factor * min(self.radius, step.norm().item() or self.radius)
        elif rho >= options.eta2:
            self.radius *= options.increase_factor
        if accepted:
            torch.nn.utils.vector_to_parameters(present.theta + step, self.network.parameters())
            self.window = [*self.window, loss][-options.window :] if options.window else []
        self.rejected += not accepted
        return accepted


@pytest.mark.mpi
@pytest.mark.all_sizes(method="iapts")
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("apts", {"trust_region.initial_radius": 2.0}),
        ("iapts", {"trust_region.initial_radius": 2.0}),
        ("apts-data", {"trust_region.initial_radius": 2.0}),
        ("apts-data", {"trust_region.initial_radius": 4.0, "local.iterations": 5}),
        ("napts", {"trust_region.initial_radius": 2.0, "coarse.samples": 1.0, "coarse.norm": "2"}),
    ],
)
def test_ten_iterations(world, method, changes):
    chosen = of_method(method, {"subdomains": SUBDOMAINS} | changes)
    network, batch = classifier(), classified()
    solver = make_solver(world, chosen, network)
    solver.step(batch)
    for _ in range(ITERATIONS - 1):
        solver.step()
    if world.rank > 0:
        return
    paper = Paper(classifier(), batch, chosen)
    for _ in range(ITERATIONS):
        paper.iterate()
    assert solver.state.radius == pytest.approx(paper.radius, rel=1e-9)
    assert paper.rejected > 0  # the judge had something to do
    torch.testing.assert_close(flat(network.parameters()), flat(paper.network.parameters()), rtol=1e-10, atol=1e-10)
    first, last = (cross_entropy(net(batch[0]), batch[1]).item() for net in (classifier(), network))
    assert last < first - 0.05
