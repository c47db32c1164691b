"""Between steps the network is the user's: it can be called, saved, loaded and differentiated."""

import copy
import re

import pytest
import torch
from networks import classified, classifier, cross_entropy, flat, loss_and_gradient, make_solver, options, squared_error
from torch import nn

from apts_mpi import APTS, APTSOptions, InvalidInput, LocalOptions


def run(world, between, steps=3, **changes):
    """Train, with something done between the steps; the losses and the network."""
    network = classifier()
    solver = make_solver(world, options(solver="adam", iterations=2, initial_radius=0.1, **changes), network)
    losses = []
    for _ in range(steps):
        losses.append(solver.step(classified()).schwarz.loss)
        between(network)
    return losses, network


@pytest.fixture
def undisturbed(world):
    return run(world, lambda network: None)


def assert_same_run(found, expected):
    assert found[0] == expected[0]
    assert torch.equal(flat(found[1].parameters()), flat(expected[1].parameters()))


@pytest.mark.mpi
def test_parameters_are_views_of_the_flat_vector(world):
    network = classifier()
    before = flat(network.parameters())
    names = list(network.state_dict())
    solver = make_solver(world, options(), network)
    assert torch.equal(solver.holding.objective.vector.values, before)
    solver.step(classified())
    assert not torch.equal(solver.holding.objective.vector.values, before)
    assert torch.equal(flat(network.parameters()), solver.holding.objective.vector.values)
    assert list(network.state_dict()) == names
    base = solver.holding.objective.vector.values.data_ptr()
    sizes = [parameter.numel() * parameter.element_size() for parameter in network.parameters()]
    places = [base + sum(sizes[:index]) for index in range(len(sizes))]
    assert [parameter.data_ptr() for parameter in network.parameters()] == places
    solver.holding.objective.vector.values.zero_()
    assert (network[0].weight == 0.0).all()


@pytest.mark.mpi
def test_network_gives_the_loss_that_the_solver_reports(world):
    network = classifier()
    solver = make_solver(world, options(initial_radius=0.1), network)
    judged = solver.step(classified()).schwarz
    assert judged.accepted
    loss = loss_and_gradient(network, cross_entropy, classified())[0]
    assert loss == pytest.approx(judged.trial_loss, rel=1e-13)


@pytest.mark.mpi
@pytest.mark.parametrize(
    "between",
    [
        lambda network: network.zero_grad(),
        lambda network: network[4].zero_grad(),
        lambda network: network.zero_grad(set_to_none=False),
        lambda network: [parameter.grad.fill_(7.0) for parameter in network.parameters()],
        lambda network: network.load_state_dict(network.state_dict()),
        lambda network: copy.deepcopy(network),
        lambda network: network.eval()(classified(5)[0]) is network.train(),
    ],
    ids="zero_grad,zero_grad of one layer,zero_grad in place,other gradients,load_state_dict,deepcopy,call".split(","),
)
def test_use_between_steps_changes_nothing(world, undisturbed, between):
    assert_same_run(run(world, between), undisturbed)


@pytest.mark.mpi
@pytest.mark.parametrize("set_to_none", [True, False])
def test_backward_pass_of_the_users_on_one_rank_alone(world, undisturbed, set_to_none):
    """It must neither send anything nor leave a trace in the next gradient."""

    def between(network):
        if world.rank == world.size - 1:
            network.zero_grad(set_to_none=set_to_none)
            cross_entropy(network(classified(5)[0]), classified(5)[1]).backward()
            assert network[0].weight.grad.norm() > 0.0

    assert_same_run(run(world, between), undisturbed)


@pytest.mark.mpi
def test_loaded_parameters_are_where_the_next_step_starts(world):
    network, other = classifier(seed=0), classifier(seed=1)
    solver = make_solver(world, options(initial_radius=0.1), network)
    solver.step(classified())
    network.load_state_dict(other.state_dict())
    result = solver.step(classified())
    loss, gradient = loss_and_gradient(other, cross_entropy, classified())
    assert result.schwarz.loss == pytest.approx(loss, rel=1e-13)
    assert result.schwarz.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-12)


@pytest.mark.mpi
@pytest.mark.parametrize("radius", [0.05, 100.0], ids=["accepted", "rejected"])
def test_loaded_parameters_are_noticed_when_a_batch_is_repeated(world, radius):
    """What the solver knows of the point before, and does not compute again, is no longer true."""
    network, other = classifier(seed=0), classifier(seed=1)
    solver = make_solver(world, options(initial_radius=radius), network)
    solver.step(classified())
    assert solver.step().accepted == (radius < 1.0)
    network.load_state_dict(other.state_dict())
    judged = solver.step().schwarz
    loss, gradient = loss_and_gradient(other, cross_entropy, classified())
    assert judged.loss == pytest.approx(loss, rel=1e-13)
    assert judged.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-12)


@pytest.mark.mpi
def test_saved_and_loaded_into_another_network(world, tmp_path):
    _, network = run(world, lambda network: None)
    torch.save(network.state_dict(), tmp_path / "network.pt")
    other = classifier(seed=9)
    other.load_state_dict(torch.load(tmp_path / "network.pt"))
    inputs = classified()[0]
    assert torch.equal(other(inputs), network(inputs))


@pytest.mark.mpi
@pytest.mark.parametrize("move", [lambda network: network.float(), lambda network: network[4].half()])
def test_moved_parameters_are_refused_on_every_rank(world, move):
    network = classifier()
    solver = make_solver(world, options(), network)
    solver.step(classified())
    move(network)
    with pytest.raises(InvalidInput, match=r"network: its parameters were replaced .* convert the network first"):
        solver.step(classified())


@pytest.mark.mpi
def test_frozen_parameters_stay(world):
    network = classifier()
    network[0].weight.requires_grad_(False)
    network[4].requires_grad_(False)
    frozen = [network[0].weight.clone(), network[4].weight.clone(), network[4].bias.clone()]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    before = flat(trained)
    solver = make_solver(world, options(subdomains=3, variant="inexact", iterations=2), network)
    assert solver.step(classified()).accepted
    assert all(map(torch.equal, frozen, [network[0].weight, network[4].weight, network[4].bias]))
    assert len(solver.holding.objective.vector.values) == len(before) and not torch.equal(flat(trained), before)


class Residual(nn.Module):
    """Not a Sequential: its layers can not be left out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first, self.inner, self.last = nn.Linear(10, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.double()

    def forward(self, inputs):
        hidden = self.first(inputs).tanh()
        return self.last(hidden + self.inner(hidden).tanh())


@pytest.mark.mpi
@pytest.mark.parametrize("variant", ["exact", "inexact"])
@pytest.mark.parametrize("partition", ["layer", "index"])
def test_any_module_can_be_trained(world, variant, partition):
    network = Residual()
    chosen = options(subdomains=3, variant=variant, partition=partition, solver="tr", iterations=3)
    solver = make_solver(world, chosen, network)
    losses = [solver.step(classified()).schwarz.loss for _ in range(10)]
    assert losses[0] == pytest.approx(loss_and_gradient(Residual(), cross_entropy, classified())[0], rel=1e-13)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.mpi
def test_tensor_used_by_two_layers(world):
    """Its gradient has both parts."""
    network = classifier()
    network[4].weight = network[2].weight
    twin = copy.deepcopy(network)
    solver = make_solver(world, options(subdomains=5, variant="inexact", solver="tr", iterations=2), network)
    result = solver.step(classified())
    loss, gradient = loss_and_gradient(twin, cross_entropy, classified())
    assert result.schwarz.loss == pytest.approx(loss, rel=1e-13)
    assert result.schwarz.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-12)
    assert result.accepted and network[4].weight is network[2].weight


def derivative(network, inputs):
    """Of the outputs with respect to the inputs."""
    inputs = inputs.clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(network(inputs).sum(), inputs, create_graph=True)[0]


def potential():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 1)).double()


@pytest.mark.mpi
def test_forward_function_of_the_users(world):
    """For a loss that needs more of a network than its values."""
    network, inputs = potential(), classified()[0][:, :3]
    expected = squared_error(derivative(network, inputs), inputs.cos()).item()
    chosen = options(subdomains=2, variant="exact", solver="tr", iterations=2)
    solver = APTS(network, squared_error, comm=world, options=chosen, forward=derivative)
    losses = [solver.step((inputs, inputs.cos())).schwarz.loss for _ in range(15)]
    assert losses[0] == pytest.approx(expected, rel=1e-13)
    assert losses[-1] < 0.7 * losses[0]


def as_most_programs(network, inputs):
    """The same without a thought of what happens around it."""
    inputs.requires_grad_()
    return torch.autograd.grad(network(inputs).sum(), inputs, create_graph=True)[0]


def by_transforms(network, inputs):
    """The same, which the solver can differentiate sample by sample and in forward mode."""
    return torch.func.grad(lambda points: network(points).sum())(inputs)


@pytest.mark.mpi
@pytest.mark.parametrize("solver", ["auto", "tr", "lsr1", "steihaug"])
@pytest.mark.parametrize("forward", [derivative, as_most_programs])
def test_derivatives_by_autograd_are_as_good_as_those_by_transforms(world, forward, solver):
    """With the coarse level on, and dense Gauss-Newton as the automatic local solver."""
    inputs = classified()[0][:, :3]
    losses = []
    for function in (forward, by_transforms):
        chosen = APTSOptions(subdomains=2, local=LocalOptions(solver=solver))
        own = inputs.clone()
        network = APTS(potential(), squared_error, comm=world, options=chosen, forward=function)
        losses.append([network.step((own, inputs.cos())).schwarz.loss for _ in range(4)])
        assert torch.equal(own, inputs) and not own.requires_grad
    assert losses[0] == pytest.approx(losses[1], rel=1e-8)  # rounding, magnified by the last small eigenvalues
    assert losses[0][-1] < 0.7 * losses[0][0]


@pytest.mark.mpi
def test_forward_function_leaves_nothing_inexact(world):
    with pytest.raises(InvalidInput, match="schwarz.variant: 'inexact' .* choose exact"):
        APTS(
            potential(), squared_error, comm=world, options=options(subdomains=2, variant="inexact"), forward=derivative
        )


@pytest.mark.mpi
def test_second_solver_on_the_same_network(world):
    """The first one must do nothing any more."""
    network = classifier()
    first = make_solver(world, options(initial_radius=0.1), network)
    first.step(classified())
    after = copy.deepcopy(network)
    second = make_solver(world, options(initial_radius=0.1), network)
    del first
    expected = loss_and_gradient(after, cross_entropy, classified())[0]
    assert second.step(classified()).schwarz.loss == pytest.approx(expected, rel=1e-13)


@pytest.mark.mpi
def test_description_tells_the_subdomains_and_the_options(world):
    solver = make_solver(world, options(subdomains=6, overlap=1, variant="exact", replicas=1))
    text = solver.describe()
    assert str(len(solver.holding.objective.vector.values)) in text and f"{world.size}" in text
    assert re.search(r"\* overlap +1 \(default: 0\)", text) and re.search(r"\* variant +exact", text)
    assert re.search(r" {6}eta2 +0.75\n", text) and re.search(r" {6}refresh +5 \(for null\)", text)
    assert all(len(line) <= 80 for line in text.splitlines())
    for subdomain in solver.holding.decomposition.subdomains:
        assert f"subdomain {subdomain.index}: parameters {subdomain.start} to {subdomain.stop}" in text


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subdomains": 7}, r"subdomains: 7 is too many.* at most 6; --schwarz.partition index makes more"),
        ({"replicas": 5}, r"replicas: 5 does not divide the \d ranks"),
    ],
)
def test_options_that_do_not_fit_are_refused_on_every_rank(world, change, message):
    with pytest.raises(InvalidInput, match=message):
        make_solver(world, options(**change))


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "no trainable parameter"),
        (lambda: classifier().half(), "0.weight has dtype torch.float16.* network.float"),
        (lambda: classifier().bfloat16(), "0.weight has dtype torch.bfloat16"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "1.weight is torch.float64"),
    ],
)
def test_networks_that_cannot_be_reduced_are_refused(world, network, message):
    with pytest.raises(InvalidInput, match=message):
        make_solver(world, options(subdomains=1), network())


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_network_that_is_wrong_on_one_rank_is_refused_on_all(world):
    network = classifier().half() if world.rank == 1 else classifier()
    with pytest.raises(InvalidInput, match="rank 1: network: parameter 0.weight has dtype torch.float16"):
        make_solver(world, options(), network)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_batches_that_cannot_be_cut_are_refused_on_every_rank(world):
    solver = make_solver(world, options(subdomains=6))
    inputs, targets = classified()
    with pytest.raises(InvalidInput, match="121 inputs but 120 targets"):
        solver.step((inputs, targets[:-1]))
    with pytest.raises(InvalidInput, match="batch_size: the batch has 5 samples.* 6 subdomains need"):
        solver.step((inputs[:5], targets[:5]))
    assert solver.step((inputs, targets)).iteration == 1  # and it still works


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_shard_that_is_wrong_on_one_rank_is_refused_on_all(world):
    solver = make_solver(world, options(subdomains=6, batch="shard"))
    inputs, targets = classified(12)
    if world.rank == 1:
        targets = targets[:-1]
    with pytest.raises(InvalidInput, match="rank 1: batch: 12 inputs but 11 targets"):
        solver.step((inputs, targets))


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_number_of_subdomains_by_default(world):
    """One a rank of a replica, or as many as there are layers."""
    solver = make_solver(world, options(subdomains=None))
    assert len(solver.holding.decomposition.subdomains) == min(world.size, 6)
    solver = make_solver(world, options(subdomains=None, partition="index", replicas=world.size))
    assert len(solver.holding.decomposition.subdomains) == 1
