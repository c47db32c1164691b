"""The optimizer beside formulas, beside the solver of the package, and as loops of torch use it."""

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import apts_mpi
from apts_mpi import APTSOptions, InvalidInput, LocalOptions, TrustRegionOptions
from apts_mpi.optim import APTS
from apts_mpi.problems import build

ALONE = MPI.COMM_SELF


def make_network(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)
    return nn.Sequential(*layers).double()


MAKERS = {
    "layers": lambda network, **others: APTS(network, **others),
    "parameters": lambda network, **others: APTS(network.parameters(), **others),
    "differences": lambda network, **others: APTS(network.parameters(), local=LocalOptions(solver="kfac"), **others),
}


def batches(count, size=24, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, size, 5, generator=generator, dtype=torch.float64)
    return list(zip(inputs, inputs[..., :3].argmax(dim=-1), strict=True))


def closure_of(network, optimizer, batch, loss=cross_entropy):
    def closure():
        optimizer.zero_grad()
        value = loss(network(batch[0]), batch[1])
        value.backward()
        return value

    return closure


def train(network, optimizer, data):
    return [optimizer.step(closure_of(network, optimizer, batch)).item() for batch in data]


def flat(network):
    return nn.utils.parameters_to_vector(network.parameters()).detach().clone()


def test_without_curvature_a_step_is_the_normalised_gradient():
    torch.manual_seed(0)
    network = nn.Linear(5, 3).double()
    # So much damping leaves of the factors a multiple of the identity, to a part in 1e4 or so, and short directions.
    local = LocalOptions(damping=1e8, momentum=0.0)
    optimizer = APTS(network, comm=ALONE, local=local, initial_radius=1e-8)
    before, batch = flat(network), batches(1)[0]
    train(network, optimizer, [batch])
    gradient = torch.cat([value.grad.flatten() for value in network.parameters()])
    torch.testing.assert_close(flat(network) - before, -1e-8 * gradient / gradient.norm(), rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("subdomains", [1, 3])
def test_steps_are_those_of_the_solver_on_noisy_batches(subdomains):
    """No step raises the loss of its own batch here, which the solver alone would reject."""
    data = batches(40)
    theirs, ours = make_network(), make_network()
    trust_region = TrustRegionOptions(initial_radius=0.05, pull=0.2)
    options = APTSOptions(noise="batches", subdomains=subdomains, trust_region=trust_region)
    solver = apts_mpi.APTS(theirs, cross_entropy, comm=ALONE, options=options)
    solver.state.starting = False  # an optimizer has no fast start
    results = [solver.step(batch) for batch in data]
    assert all(result.accepted for result in results)
    losses = train(ours, APTS(ours, weight_decay=0.2, comm=ALONE, initial_radius=0.05), data)
    np.testing.assert_allclose(losses, [result.schwarz.loss for result in results], rtol=1e-9)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-10)


def make_words():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 5), nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def words(count, size=24):
    rows = torch.randint(7, (count, size, 4), generator=torch.Generator().manual_seed(1))
    return list(zip(rows, rows.sum(dim=-1) % 3, strict=True))


def test_networks_with_embeddings_have_the_steps_of_the_solver_that_takes_muon_there():
    data, theirs, ours = words(30), make_words(), make_words()
    trust_region = TrustRegionOptions(initial_radius=0.05, pull=0.2)
    options = APTSOptions(noise="batches", subdomains=2, trust_region=trust_region)
    solver = apts_mpi.APTS(theirs, cross_entropy, comm=ALONE, options=options)
    assert solver.options.local.solver == "muon"
    solver.state.starting = False
    for batch in data:
        assert solver.step(batch).accepted
    train(ours, APTS(ours, weight_decay=0.2, comm=ALONE, initial_radius=0.05), data)
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-10)


def test_states_without_squares_are_those_of_kfac():
    """As versions wrote them that had no muon."""
    data, network, other = words(30), make_words(), make_words()
    optimizer = APTS(network, comm=ALONE, local=LocalOptions(solver="kfac"))
    train(network, optimizer, data[:9])
    saved = optimizer.state_dict()
    for kept in saved["state"].values():
        kept.get("subdomain", {}).pop("squares", None)
    other.load_state_dict(network.state_dict())
    resumed = APTS(other, comm=ALONE)
    resumed.load_state_dict(saved)
    assert train(other, resumed, data[9:]) == train(network, optimizer, data[9:])


def test_a_state_says_which_local_solver_goes_on():
    """All subdomains have one, as the lengths of their directions have different units."""
    network, other = make_words(), make_words()
    optimizer = APTS(network, comm=ALONE, local=LocalOptions(solver="kfac"))
    network[0].weight.requires_grad_(False)  # no state of it
    data = words(12)
    train(network, optimizer, data[:4])
    resumed = APTS(other, comm=ALONE)
    resumed.load_state_dict(optimizer.state_dict())
    other.load_state_dict(network.state_dict())
    train(other, resumed, data[4:])
    parts = [kept["subdomain"] for kept in resumed.state_dict()["state"].values() if "subdomain" in kept]
    assert len(parts) == 3
    assert all(part["squares"] is None for part in parts)
    with pytest.raises(InvalidInput, match="local.solver kfac, not muon; leave that out, or give kfac"):
        APTS(make_words(), comm=ALONE, local=LocalOptions(solver="muon")).load_state_dict(optimizer.state_dict())


def test_matrices_are_those_given_whatever_is_frozen():
    """Of a bias that rests, and of weights without their biases: the steps of the weights are the same."""
    found = []
    for kind in ("frozen", "weights"):
        network = make_network()
        weights = [value for value in network.parameters() if value.dim() > 1]
        for value in network.parameters():
            value.requires_grad_(value.dim() > 1)
        given = network if kind == "frozen" else weights
        local = LocalOptions(solver="muon")
        train(network, APTS(given, network=network, local=local, comm=ALONE, initial_radius=0.1), batches(6))
        found.append(flat(network))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def test_a_frozen_embedding_decides_nothing():
    network = make_words()
    network[0].weight.requires_grad_(False)
    ours, data = APTS(network, comm=ALONE, initial_radius=0.05), words(6)
    theirs = make_words()
    theirs[0].weight.requires_grad_(False)
    asked = LocalOptions(solver="kfac")
    assert train(network, ours, data) == train(theirs, APTS(theirs, comm=ALONE, initial_radius=0.05, local=asked), data)


def test_without_a_closure_it_takes_the_gradients_that_are_there():
    data, one, other = batches(25), make_network(), make_network()
    train(one, APTS(one, comm=ALONE), data)
    optimizer = APTS(other, comm=ALONE)
    for inputs, targets in data:
        optimizer.zero_grad()
        cross_entropy(other(inputs), targets).backward()
        assert optimizer.step() is None
    assert torch.equal(flat(one), flat(other))


def test_gradients_may_be_accumulated():
    data, one, other = batches(25), make_network(), make_network()
    train(one, APTS(one, comm=ALONE), data)
    optimizer = APTS(other, comm=ALONE)
    for inputs, targets in data:
        optimizer.zero_grad()
        for half in (slice(0, 12), slice(12, 24)):
            (cross_entropy(other(inputs[half]), targets[half]) / 2).backward()
        optimizer.step()
    torch.testing.assert_close(flat(one), flat(other), rtol=1e-9, atol=1e-11)


def test_evaluations_between_steps_change_nothing():
    data, one, other = batches(10), make_network(), make_network()
    train(one, APTS(one, comm=ALONE), data)
    optimizer = APTS(other, comm=ALONE)
    for inputs, targets in data:
        cross_entropy(other(2.0 * inputs), targets).backward()  # its gradients are thrown away
        optimizer.zero_grad()
        with torch.no_grad():
            other(3.0 * inputs)
        other(4.0 * inputs)  # without a backward pass
        cross_entropy(other(inputs), targets).backward()
        optimizer.step()
    torch.testing.assert_close(flat(one), flat(other), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 23])
def test_a_state_that_was_saved_leads_to_the_same_bits(make, steps):
    def start():
        network = make_network()
        return network, MAKERS[make](network, weight_decay=0.1, comm=ALONE)

    data = batches(steps + 25)
    network, optimizer = start()
    train(network, optimizer, data[:steps])
    file = io.BytesIO()
    torch.save([network.state_dict(), optimizer.state_dict()], file)
    other, resumed = start()
    train(other, resumed, data[:3])  # what it knew is forgotten
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert train(other, resumed, data[steps:]) == train(network, optimizer, data[steps:])
    assert torch.equal(flat(other), flat(network))


def test_a_state_dict_is_a_copy():
    network = make_network()
    optimizer = APTS(network, comm=ALONE)
    train(network, optimizer, batches(8))
    kept = copy.deepcopy(optimizer.state_dict())
    other = make_network()
    other.load_state_dict(network.state_dict())
    resumed = APTS(other, comm=ALONE)
    resumed.load_state_dict(kept)
    before = copy.deepcopy(kept)
    train(other, resumed, batches(8))
    torch.testing.assert_close(kept, before, rtol=0.0, atol=0.0)


def test_decay_goes_towards_the_origin_by_a_share_of_the_step():
    steps, radius = {}, 0.1
    for decay in (0.0, 0.3):
        network = make_network()
        start = flat(network)
        groups = [{"params": network[3].parameters(), "weight_decay": decay}, {"params": network[:3].parameters()}]
        train(network, APTS(groups, network=network, comm=ALONE, initial_radius=radius), batches(1))
        steps[decay] = flat(network) - start
    # The biases stay out of it.
    weights = torch.cat([value.detach().flatten() * (value.dim() > 1) for value in make_network().parameters()])
    last = sum(value.numel() for value in network[3].parameters())
    decays = torch.cat([torch.zeros(len(start) - last), torch.full((last,), 0.3)]).double()
    pulled = steps[0.0] - decays * steps[0.0].norm() / weights.norm() * weights
    torch.testing.assert_close(steps[0.3], pulled * min(1.0, radius / pulled.norm().item()))


def test_groups_have_factors_of_their_own():
    steps = []
    for factors in ((1.0, 1.0), (0.5, 0.0)):
        network = make_network()
        start = flat(network)
        groups = [
            {"params": [*network[part].parameters()], "lr": factor}
            for part, factor in zip((3, 0), factors, strict=True)
        ]
        train(network, APTS(groups, network=network, comm=ALONE, initial_radius=0.1), batches(1))
        steps.append(flat(network) - start)
    first, norm, last = (sum(value.numel() for value in make_network()[part].parameters()) for part in (0, 1, 3))
    torch.testing.assert_close(steps[1][-last:], 0.5 * steps[0][-last:])
    assert not steps[1][: first + norm].any()


def test_frozen_parameters_and_those_without_gradients_keep_their_bits():
    network = make_network()
    unused = nn.Parameter(torch.randn(4, dtype=torch.float64))
    optimizer = APTS([*network.parameters(), unused], weight_decay=0.1, network=network, comm=ALONE)
    for frozen in (False, True, False, True):
        network[0].bias.requires_grad_(not frozen)
        network[3].requires_grad_(not frozen)
        before = {name: value.detach().clone() for name, value in network.named_parameters()}, unused.detach().clone()
        train(network, optimizer, batches(6))
        moved = {name for name, value in network.named_parameters() if not torch.equal(value, before[0][name])}
        still = {"0.bias", "3.weight", "3.bias"} if frozen else set()
        assert moved == set(before[0]) - still
        assert torch.equal(unused, before[1])


def test_a_group_may_be_added_while_it_trains():
    network = make_network()
    network[0].requires_grad_(False)
    optimizer = APTS([*network[1:].parameters()], network=network, comm=ALONE)
    train(network, optimizer, batches(6))
    before = flat(network)
    network[0].requires_grad_(True)
    optimizer.add_param_group({"params": network[0].parameters(), "weight_decay": 0.1})
    losses = train(network, optimizer, batches(60))
    assert (flat(network) - before)[:48].abs().min() > 0.0
    assert losses[-1] < 0.5 * losses[0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]


def test_schedulers_move_the_factor_and_the_radius_waits():
    network, data = make_network(), batches(30)
    optimizer = APTS(network, comm=ALONE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / 30)
    radii, lengths = [], []
    for batch in data:
        before = flat(network)
        train(network, optimizer, [batch])
        radii.append(optimizer.state_dict()["state"][0]["ball"]["radius"])
        lengths.append((flat(network) - before).norm().item())
        scheduler.step()
    assert len(set(radii[:13])) > 5 and len(set(radii[13:])) == 1
    assert lengths[-1] == pytest.approx(radii[-1] / 30)


def test_hooks_of_optimizers_are_called():
    network, called = make_network(), []
    optimizer = APTS(network, comm=ALONE)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda *_: called.append("saved"))
    train(network, optimizer, batches(2))
    optimizer.state_dict()
    assert called == ["before", "after"] * 2 + ["saved"]


def test_nothing_stays_on_the_network():
    network = make_network()
    optimizer = APTS(network, comm=ALONE)
    for batch in [None, *batches(2)]:
        if batch is not None:
            train(network, optimizer, [batch])
        assert not any(module._forward_hooks or module._backward_hooks for module in network.modules())
        assert not any(value._backward_hooks or value._post_accumulate_grad_hooks for value in network.parameters())
        pickle.loads(pickle.dumps(network))
        torch.save(network, io.BytesIO())
        copy.deepcopy(network)
        assert network[0].weight.untyped_storage().nbytes() == 40 * 8


def test_an_optimizer_that_is_dropped_listens_no_more():
    hooks = torch.nn.modules.module._global_forward_hooks
    gc.collect()
    before, network = len(hooks), make_network()
    optimizer = APTS(network, comm=ALONE)
    assert len(hooks) == before + 1
    train(network, optimizer, batches(1))
    del optimizer
    gc.collect()
    assert len(hooks) == before


@pytest.mark.parametrize("first", ["network", "optimizer"])
@pytest.mark.filterwarnings("ignore:Using `torch.compile:UserWarning")  # of torch, of hooks that are gone then
def test_a_compiled_network_keeps_its_graph_and_learns(first):
    torch.compiler.reset()
    network, data = make_network(), batches(60)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=backend)
    losses = train(compiled, APTS(compiled if first == "network" else network, comm=ALONE), data)
    # A hook that was there when torch compiled is one of the reasons to compile again, once.
    assert len(graphs) == (1 if first == "network" else 2)
    assert losses[-1] < 0.5 * losses[0]


def test_autocast_in_bfloat16_works():
    network = make_network().float()
    optimizer = APTS(network, comm=ALONE)

    def closure(batch):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = cross_entropy(network(batch[0].float()), batch[1])
        value.backward()
        return value

    losses = [optimizer.step(lambda batch=batch: closure(batch)).item() for batch in batches(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_step_that_leads_out_of_the_numbers_is_undone():
    network, data = make_network(), batches(4)
    optimizer = APTS(network, comm=ALONE)
    train(network, optimizer, data)
    before = flat(network)
    train(network, optimizer, data[:1])
    after = flat(network)
    bad = torch.full_like(data[0][0], torch.nan), data[0][1]
    train(network, optimizer, [bad])
    assert torch.equal(flat(network), after)  # it may be the batch
    with pytest.warns(UserWarning, match="2 batches in a row are not finite, the last step is undone"):
        train(network, optimizer, [bad])
    torch.testing.assert_close(flat(network), before)
    assert all(np.isfinite(train(network, optimizer, data)))


def test_a_bias_before_batch_normalisation_does_not_take_the_ball():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    data = [(inputs.float(), targets) for inputs, targets in batches(60)]
    losses = train(network, APTS(network.parameters(), comm=ALONE), data)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("make", MAKERS)
def test_one_batch_again_and_again_has_no_noise_and_is_fitted(make):
    network, data = make_network(), batches(1)
    losses = train(network, MAKERS[make](network, comm=ALONE), 80 * data)
    assert losses[-1] < 0.1 * losses[0]


def test_it_leads_lower_than_adam_without_an_option():
    problem = build("digits")
    inputs, targets = problem.train
    found = {}
    for name, make in {
        "apts": lambda network: APTS(network, comm=ALONE),
        "parameters": lambda network: APTS(network.parameters(), comm=ALONE),
        "1e-3": lambda network: torch.optim.Adam(network.parameters(), lr=1e-3),
        "3e-3": lambda network: torch.optim.Adam(network.parameters(), lr=3e-3),
    }.items():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer, generator = make(network), torch.Generator().manual_seed(1)
        for _ in range(10):
            for rows in torch.randperm(len(inputs), generator=generator).split(128):
                train(network, optimizer, [(inputs[rows].flatten(1), targets[rows])])
        found[name] = cross_entropy(network(inputs.flatten(1)), targets).item()
    assert max(found["apts"], found["parameters"]) < min(found["1e-3"], found["3e-3"])


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
@pytest.mark.parametrize("make", MAKERS)
def test_ranks_step_as_one_process_does_on_all_samples(make):
    comm = MPI.COMM_WORLD
    data, alone, shared = batches(25, size=4 * comm.size), make_network(), make_network(seed=comm.rank)
    train(alone, MAKERS[make](alone, weight_decay=0.1, comm=ALONE), data)
    optimizer = MAKERS[make](shared, weight_decay=0.1)
    # Rank 0 alone begins with the parameters of the other network.
    shard = slice(4 * comm.rank, 4 * (comm.rank + 1))
    train(shared, optimizer, [(inputs[shard], targets[shard]) for inputs, targets in data])
    if make != "differences":  # the noise of gradients is that of other batches
        torch.testing.assert_close(flat(shared), flat(alone), rtol=1e-10, atol=1e-10)
    everywhere = comm.allgather(flat(shared).numpy().tobytes())
    assert len(set(everywhere)) == 1


@pytest.mark.mpi(min_size=2)
def test_layers_that_one_rank_alone_reaches_do_not_part_the_ranks():
    comm = MPI.COMM_WORLD
    network = make_network()
    rare = nn.Linear(5, 3).double()
    both = nn.ModuleList([network, rare])
    optimizer = APTS(both)
    for step, (inputs, targets) in enumerate(batches(12)):
        optimizer.zero_grad()
        outputs = network(inputs) + (rare(inputs) if comm.rank == 1 and step % 3 else 0.0)
        cross_entropy(outputs, targets).backward()
        optimizer.step()
    assert len(set(comm.allgather(flat(both).numpy().tobytes()))) == 1


@pytest.mark.mpi(min_size=2)
def test_another_network_on_a_rank_is_named_on_all():
    with pytest.raises(InvalidInput, match="params: rank 1 has another list of parameters"):
        APTS(nn.Linear(3 + (MPI.COMM_WORLD.rank == 1), 2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda net: APTS(net, lr=-1.0), "lr: -1.0 is not allowed; give a number of 0 or more"),
        (lambda net: APTS(net, weight_decay=1.0), "weight_decay: 1.0 is not allowed; give a number of 0 or more"),
        (lambda net: APTS(net, initial_radius=0.0), "initial_radius: 0.0 is not allowed; give a number above 0"),
        (lambda net: APTS(net, local=LocalOptions(solver="adam")), "local.solver: 'adam' is not allowed"),
        (lambda net: APTS(net, local=LocalOptions(iterations=2)), "local.iterations: 2 is not allowed"),
        (lambda net: APTS(net.bfloat16()), "bfloat16, which MPI cannot reduce; convert the network"),
        (
            lambda net: APTS([net[0].weight, nn.Parameter(torch.zeros(3))]),
            "float32 on cpu, the first one torch.float64",
        ),
        (lambda net: APTS([net[0].weight, net[0].weight]), "a parameter is in it twice; give each once"),
        (lambda net: APTS([nn.UninitializedParameter()]), "has no shape yet"),
        (lambda net: copy.deepcopy(APTS(net)), "save or copy its state_dict"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_what_cannot_be_used_is_named(make, words):
    with pytest.raises(InvalidInput, match=words.replace("(", r"\(")):
        make(make_network())


def test_a_parameter_in_two_groups_is_refused():
    network = make_network()
    with pytest.raises(ValueError, match="more than one parameter group"):
        APTS([{"params": network.parameters()}, {"params": network[0].parameters()}], comm=ALONE)


def test_a_group_that_is_refused_leaves_no_trace():
    network = make_network()
    optimizer = APTS(network, comm=ALONE)
    with pytest.raises(InvalidInput, match="float32"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1
    train(network, optimizer, batches(2))


def test_a_gradient_scaler_is_refused():
    network = nn.Linear(5, 3)
    optimizer, scaler = APTS(network, comm=ALONE), torch.amp.GradScaler("cpu")
    scaler.scale(mse_loss(network(torch.ones(4, 5)), torch.ones(4, 3))).backward()
    with pytest.raises(InvalidInput, match="a GradScaler has scaled the loss"):
        scaler.step(optimizer)


def test_the_state_of_another_optimizer_is_refused():
    network = make_network()
    adam = torch.optim.Adam(network.parameters())
    train(network, adam, batches(1))
    with pytest.raises(InvalidInput, match="is the state of another optimizer"):
        APTS(network, comm=ALONE).load_state_dict(adam.state_dict())


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_ranks_share_the_factorisations(world):
    torch.manual_seed(0)
    network = nn.Sequential(*(module for _ in range(2 * world.size) for module in (nn.Linear(8, 8), nn.Tanh())))
    optimizer = APTS(network, comm=world)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(network(torch.randn(16, 8)), torch.zeros(16, 8)).backward()
        optimizer.step()
    own = [hasattr(part.solver.layers[0].curvature, "_inverse_inputs") for part in optimizer._subdomains]
    assert sum(own) == 2
    assert all(sum(flags) == 1 for flags in zip(*world.allgather(own), strict=True))
