"""Where a network is cut, what a rank makes of it, and schedules: no communication but for the last tests."""

import pytest
import torch
from networks import options
from staged_networks import NETWORKS, built, mlp, staged
from torch import nn

from apts_mpi import APTSOptions, InvalidInput, PipelineOptions, StagedAPTS
from apts_mpi.staged.build import build_stage
from apts_mpi.staged.deferred_init import with_parameters, without_memory
from apts_mpi.staged.schedules import SCHEDULES, ideal_bubble, most_in_flight
from apts_mpi.staged.stages import Elsewhere, cut, keep_stage, multiplications, places_of, stages_of


def cuts_of(network, stages, costs=None, **pipeline):
    return [stage.names for stage in cut(places_of(network), stages, PipelineOptions(**pipeline), costs)]


def test_nested_sequences_are_flattened():
    assert [place.name for place in places_of(mlp())][:4] == ["0", "1.0", "1.1", "2.0"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
def test_every_module_belongs_to_one_stage_and_every_stage_has_parameters(name, stages):
    network = built(NETWORKS[name][0])
    places = places_of(network)
    found = cut(places, stages, PipelineOptions(), None)
    assert [found[0].start, *[stage.stop for stage in found]] == [*[stage.start for stage in found], len(places)]
    for stage in found:
        assert any(True for place in places[stage.start : stage.stop] for _ in place.module.parameters())
        # Modules without parameters go with the one before.
        assert stage.index == 0 or next(places[stage.start].module.parameters(), None) is not None


def test_balanced_by_parameters_or_by_cost():
    """A convolution has few parameters and much work, a linear layer behind it many and little."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 40), nn.Linear(40, 2)
    )
    assert cuts_of(network, 2) == [("0", "2"), ("3", "4")]
    costs = multiplications(places_of(network), torch.zeros(4, 1, 8, 8))
    # By hand, a sample: 64 positions times 9 inputs times 4 channels, and so on.
    work = [64 * 9 * 4, 64 * 36 * 4, 0, 256 * 40, 80]
    torch.testing.assert_close(costs, [count / sum(work) for count in work], rtol=1e-12, atol=0.0)
    assert cuts_of(network, 2, costs) == [("0", "2"), ("3", "4")]
    assert cuts_of(network, 3, costs) == [("0", "0"), ("1", "2"), ("3", "4")]
    assert cuts_of(network, 3) == [("0", "2"), ("3", "3"), ("4", "4")] or cuts_of(network, 3)[2] == ("4", "4")


def test_cost_of_a_network_without_memory():
    with torch.device("meta"):
        network = nn.Sequential(nn.Linear(10**6, 10**6), nn.ReLU(), nn.Linear(10**6, 3))
    costs = multiplications(places_of(network), torch.zeros(1, 10**6))
    torch.testing.assert_close(costs, [1e12 / (1e12 + 3e6), 0.0, 3e6 / (1e12 + 3e6)])


def test_named_cuts():
    assert cuts_of(mlp(), 3, cuts="3.0,8.0") == [("0", "2.1"), ("3.0", "7.1"), ("8.0", "9")]


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ("3.0", "cuts: 1 names are given, but 3 stages need 2"),
        ("3.0,x", "cuts: 'x' is no module of the sequence; choose from 0, 1.0,"),
        ("8.0,3.0", "in the order of the sequence"),
        ("3.1,4.0", "without trainable parameters from '3.1'"),
    ],
)
def test_cuts_that_cannot_be(cuts, message):
    with pytest.raises(InvalidInput, match=message):
        cuts_of(mlp(), 3, cuts=cuts)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, inputs):
        return self.linear(inputs)


@pytest.mark.parametrize(
    ("network", "stages", "message"),
    [
        (Block(), 2, "an nn.Sequential, .* this one is a Block; write it as one, or give --layout replicated"),
        (nn.Sequential(nn.Linear(3, 3), nn.ReLU()), 2, "2 stages needs as many modules .* the network has 1"),
    ],
)
def test_networks_that_cannot_be_cut(network, stages, message):
    with pytest.raises(InvalidInput, match=message):
        cut(places_of(network), stages, PipelineOptions(), None)


def test_tied_weights_between_stages():
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False))
    network[2].weight = network[0].weight
    message = "0.weight of stage 0 is 2.weight of stage [12]; put both into one stage with --cuts"
    for stages in (2, 3):
        with pytest.raises(InvalidInput, match=message):
            cuts_of(network, stages)
    assert len(cuts_of(network, 1)) == 1
    twice = nn.Sequential(network[1], nn.ReLU(), network[1], nn.Linear(4, 4))
    with pytest.raises(InvalidInput, match="0.weight of stage 0 is 2.weight of stage 1"):
        cuts_of(twice, 2, cuts="2")


def test_a_rank_keeps_its_stage_and_its_names():
    network = built(mlp)
    whole = dict(network.state_dict())
    places = places_of(network)
    found = cut(places, 3, PipelineOptions(), None)
    segments = keep_stage(places, found, found[1]).segments
    assert len(segments) == found[1].stop - found[1].start
    state = network.state_dict()
    assert state and all(torch.equal(value, whole[name]) for name, value in state.items())
    assert sum(map(torch.numel, state.values())) == sum(
        value.numel() for segment in segments for value in segment.state_dict().values()
    )
    assert isinstance(network[0], Elsewhere)
    assert stages_of(places_of(network)) == found
    with pytest.raises(RuntimeError, match="belongs to stage 0 .modules 0 to 3.1., which another rank holds"):
        network(torch.zeros(1, 10))


class Odd(nn.Module):
    """Initialised in ways that draw numbers in loops, into temporary tensors, and past the parameter."""

    def __init__(self):
        super().__init__()
        self.orthogonal = nn.Parameter(torch.empty(5, 5))
        nn.init.orthogonal_(self.orthogonal)
        self.drawn = nn.Parameter(torch.randn(5))
        self.linear = nn.Linear(5, 5)
        self.linear.weight.data.normal_()
        nn.init.trunc_normal_(self.linear.bias)

    def forward(self, inputs):
        return self.linear(inputs) @ self.orthogonal + self.drawn


def odd():
    before = torch.rand(3)
    network = nn.Sequential(*[Odd() for _ in range(4)])
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return network.double(), before, torch.randperm(7)


@pytest.mark.parametrize("kept", [range(0), range(5, 15), range(20)])
def test_parameters_and_data_have_the_values_of_one_process(kept):
    torch.manual_seed(3)
    expected = odd()
    after = torch.rand(1)
    torch.manual_seed(3)
    skeleton, registrations = without_memory(odd)
    assert all(parameter.is_meta for parameter in skeleton[0].parameters())
    assert len(registrations.parameters) == 16
    made, found = with_parameters(odd, kept, 25)
    assert torch.equal(torch.rand(1), after)
    names = {found.number_of(parameter): name for name, parameter in made[0].named_parameters()}
    for number, name in names.items():
        parameter = made[0].get_parameter(name)
        assert parameter.dtype == torch.float64
        if number in kept:
            assert torch.equal(parameter, expected[0].get_parameter(name))
    shared = {
        parameter.untyped_storage().data_ptr()
        for number, name in names.items()
        if number not in kept and (parameter := made[0].get_parameter(name)) is not None
    }
    assert len(shared) == (1 if len(kept) < 16 else 0)  # one memory for all
    assert torch.equal(made[1], expected[1]) and torch.equal(made[2], expected[2])


def test_network_whose_shapes_are_not_known():
    with pytest.raises(InvalidInput, match="LazyLinear, whose shapes are not known"):
        without_memory(lambda: nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3)))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("stages", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 5, 9])
def test_schedules_run_to_the_end(name, stages, micro_batches):
    """Played by hand: a stage goes on when what it waits for is there; all passes are done, in order."""
    actions = [SCHEDULES[name](stage, stages, micro_batches) for stage in range(stages)]
    for own in actions:
        for direction in ("forward", "backward"):
            numbers = [action.micro_batch for action in own if action.direction == direction]
            assert numbers == list(range(micro_batches))
    places, done, time = [0] * stages, set(), 0
    while any(place < 2 * micro_batches for place in places):
        ready = []
        for stage in range(stages):
            if places[stage] == 2 * micro_batches:
                continue
            action = actions[stage][places[stage]]
            if action.direction == "forward":
                needed = (stage - 1, action) if stage else None
            else:
                needed = (stage + 1, action) if stage < stages - 1 else None
            if needed is None or needed in done:
                ready.append((stage, action))
        assert ready, "the stages wait for each other"
        for stage, action in ready:
            done.add((stage, action))
            places[stage] += 1
        time += 1
    # Forward and backward passes of one length: the ideal bubble.
    assert 1.0 - 2 * micro_batches / time == pytest.approx(ideal_bubble(stages, micro_batches))
    for stage, own in enumerate(actions):
        most = micro_batches if name == "gpipe" else min(stages - stage, micro_batches)
        assert most_in_flight(own) == most


@pytest.mark.mpi
@pytest.mark.all_sizes(name="mlp")
@pytest.mark.parametrize("name", ["mlp", "gpt"])
def test_a_rank_makes_its_stage_alone(world, name):
    builder, batches, loss = NETWORKS[name]
    expected = built(builder).state_dict()
    chosen = staged(options(subdomains=None), micro_batches=2)
    made = build_stage(lambda: built(builder), comm=world, options=chosen, parts=lambda network: (network, None))
    own = dict(made.state_dict())
    assert own and all(torch.equal(value, expected[name]) for name, value in own.items())
    assert sum(world.allgather(len(own))) == len(expected)
    solver = StagedAPTS(made, loss, comm=world, options=chosen)
    result = solver.step(batches[0])
    again = StagedAPTS(built(builder), loss, comm=world, options=chosen).step(batches[0])
    assert result.schwarz == again.schwarz


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_network_that_was_cut_for_other_ranks(world):
    chosen = staged(options(subdomains=None))
    made = build_stage(lambda: built(mlp), comm=world, options=chosen, parts=lambda network: (network, None))
    with pytest.raises(InvalidInput, match="it was cut into .* stages before; make it again for 1 ranks"):
        StagedAPTS(made, torch.nn.functional.cross_entropy, comm=type(world).Split(world, world.rank), options=chosen)


REFUSED = [
    ({"schwarz": {"decomposition": "data"}}, "schwarz.decomposition: 'data' is not for layout staged"),
    ({"schwarz": {"variant": "exact"}}, "schwarz.variant: 'exact'"),
    ({"schwarz": {"partition": "index"}}, "schwarz.partition: 'index'"),
    ({"schwarz": {"partition": "adaptive"}}, "schwarz.partition: 'adaptive' .* choose layer"),
    ({"schwarz": {"overlap": 1}}, "schwarz.overlap: 1"),
    ({"schwarz": {"local_data": "shard"}}, "schwarz.local_data: 'shard'"),
    ({"local": {"solver": "gauss-newton", "iterations": 2}}, "local.iterations: 2 is not for layout staged"),
    ({"local": {"solver": "steihaug"}}, "local.product: 'gauss-newton'"),
    ({"pipeline": {"balance": "cost"}}, "balance: 'cost' needs a sample"),
]


@pytest.mark.mpi
@pytest.mark.parametrize(("groups", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_options_that_stages_cannot_have(world, groups, message):
    plain = APTSOptions(layout="staged")
    chosen = {name: type(getattr(plain, name))(**values) for name, values in groups.items()}
    with pytest.raises(InvalidInput, match=message):
        StagedAPTS(built(mlp), nn.functional.cross_entropy, comm=world, options=APTSOptions(layout="staged", **chosen))


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_too_many_subdomains_or_too_few_samples(world):
    chosen = staged(options(subdomains=1000))
    with pytest.raises(InvalidInput, match="subdomains: 1000 on .* layers with parameters; give fewer"):
        StagedAPTS(built(mlp), nn.functional.cross_entropy, comm=world, options=chosen)
    solver = StagedAPTS(
        built(mlp), nn.functional.cross_entropy, comm=world, options=staged(options(subdomains=None), micro_batches=5)
    )
    inputs, targets = NETWORKS["mlp"][1][0]
    with pytest.raises(InvalidInput, match="batch_size: 4 samples do not make 5 micro-batches"):
        solver.step((inputs[:4], targets[:4]))
    with pytest.raises(InvalidInput, match="batch: 30 inputs but 29 targets"):
        solver.step((inputs[:30], targets[:29]))
