"""The iterates depend on the subdomains and the batch, not on the ranks that carry them.

Sums over ranks are formed in another order than in one process, so numbers agree to rounding, not to the bit:
1e-16 a sum, which a few iterations and the subtraction in rho make 1e-12 or so; 1e-10 is asked for.
"""

from typing import NamedTuple

import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy, flat, loss_and_gradient, make_solver, numbers, options
from torch import nn

TOLERANCE = 1e-10


def trace(solver, batches):
    """Numbers of five iterations: a batch, twice more the same one, another one, and the first again."""
    results = [solver.step(batches[0]), solver.step(), solver.step(), solver.step(batches[1]), solver.step(batches[0])]
    return [judged for result in results for judged in numbers(result)]


def assert_same(traces, networks):
    torch.testing.assert_close(*map(torch.tensor, traces), rtol=TOLERANCE, atol=TOLERANCE)
    states = [network.state_dict() for network in networks]
    torch.testing.assert_close(*states, rtol=TOLERANCE, atol=TOLERANCE)


def compare_with_one_rank(world, chosen, build=classifier, batches=None, loss=cross_entropy, serial=None):
    """Run on all ranks, and on rank 0 alone; return the numbers."""
    batches = batches or (classified(), classified(97, seed=2))
    network = build()
    found = trace(make_solver(world, chosen, network, loss), batches)
    # All ranks stand at the same point: a decision taken apart would show.
    values = flat(network.parameters())
    assert not torch.equal(values, flat(build().parameters()))
    torch.testing.assert_close(values, torch.from_numpy(world.bcast(values.numpy())), rtol=1e-13, atol=1e-13)
    assert world.bcast(found) == found
    if world.rank == 0:
        alone = build()
        assert_same(
            (found, trace(make_solver(MPI.COMM_SELF, serial or chosen, alone, loss), batches)), (network, alone)
        )
    return found


class Combination(NamedTuple):
    variant: str
    partition: str
    solver: str
    iterations: int
    local_data: str
    overlap: int
    type: str
    norm: str
    global_step: str
    initial_radius: float
    window: int
    damping: float


# Each value of each option meets each value of every other one. The larger radius, first rejected, is less in the
# maximum norm: where tanh saturates a gradient is zero up to rounding, whose sign would count.
COMBINATIONS = [
    Combination("exact", "index", "adam", 3, "shard", 1, "basic", "2", "none", 0.3, 0, 0.5),
    Combination("inexact", "layer", "tr", 3, "full", 0, "restrict", "inf", "first-order", 0.3, 3, 1.0),
    Combination("exact", "layer", "adam", 1, "full", 2, "restrict", "inf", "none", 1.0, 0, 0.5),
    Combination("inexact", "layer", "adam", 3, "shard", 2, "restrict", "2", "first-order", 20.0, 3, 1.0),
    Combination("inexact", "index", "tr", 1, "full", 1, "basic", "2", "first-order", 20.0, 3, 0.5),
    Combination("inexact", "index", "adam", 1, "shard", 0, "restrict", "2", "none", 20.0, 0, 1.0),
    Combination("exact", "index", "tr", 3, "shard", 2, "restrict", "inf", "first-order", 1.0, 0, 1.0),
    Combination("exact", "layer", "sgd", 2, "full", 1, "basic", "inf", "none", 1.0, 0, 1.0),
    Combination("exact", "layer", "tr", 1, "shard", 0, "restrict", "inf", "none", 1.0, 0, 0.5),
    Combination("inexact", "index", "sgd", 2, "shard", 2, "restrict", "2", "first-order", 0.3, 3, 0.5),
    Combination("exact", "layer", "adam", 1, "full", 1, "basic", "2", "first-order", 0.3, 3, 1.0),
    Combination("exact", "index", "tr", 1, "shard", 2, "restrict", "2", "none", 0.3, 3, 1.0),
    Combination("inexact", "layer", "tr", 3, "shard", 1, "basic", "2", "none", 20.0, 3, 0.5),
    Combination("inexact", "layer", "adam", 3, "full", 0, "restrict", "inf", "first-order", 1.0, 3, 0.5),
    Combination("inexact", "index", "sgd", 2, "shard", 0, "restrict", "inf", "first-order", 0.3, 0, 0.5),
]


@pytest.mark.mpi
@pytest.mark.all_sizes(combination=COMBINATIONS[0])
@pytest.mark.all_sizes(combination=COMBINATIONS[3])
@pytest.mark.parametrize(
    "combination", COMBINATIONS, ids=lambda combination: "-".join(map(str, combination)).replace(" ", "")
)
def test_six_subdomains_on_any_number_of_ranks(world, combination):
    compare_with_one_rank(world, options(subdomains=6, **combination._asdict()))


@pytest.mark.mpi
@pytest.mark.all_sizes(solver="tr")
@pytest.mark.parametrize("solver", ["sgd", "adam", "tr"])
def test_subdomains_of_data(world, solver):
    """Each has all parameters and a sixth of the batch."""
    chosen = options(subdomains=6, decomposition="data", solver=solver, iterations=3, initial_radius=5.0)
    compare_with_one_rank(world, chosen)


@pytest.mark.mpi
@pytest.mark.all_sizes(solver="tr", initial_radius=20.0)
@pytest.mark.parametrize("initial_radius", [0.3, 20.0])
@pytest.mark.parametrize("solver", ["sgd", "adam", "tr"])
def test_one_subdomain_shared_by_all_ranks(world, solver, initial_radius):
    """Local iterations are then collective over a team."""
    chosen = options(subdomains=1, solver=solver, iterations=3, initial_radius=initial_radius)
    compare_with_one_rank(world, chosen)


@pytest.mark.mpi
@pytest.mark.all_sizes(choice={"overlap": 1, "type": "basic"})
@pytest.mark.parametrize(
    "choice",
    [{"overlap": 1, "type": "basic"}, {"overlap": 1, "type": "restrict"}, {"decomposition": "data"}],
    ids=lambda choice: "-".join(map(str, choice.values())),
)
def test_two_subdomains_shared_by_all_ranks(world, choice):
    """A correction counts once, however many ranks share its subdomain."""
    compare_with_one_rank(world, options(subdomains=2, solver="adam", iterations=2, **choice))


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_automatic_radius(world):
    found = compare_with_one_rank(world, options(subdomains=6, initial_radius=None))
    assert found[0][5]  # accepted


@pytest.mark.mpi
@pytest.mark.all_sizes(variant="inexact", partition="layer")
@pytest.mark.parametrize("variant", ["exact", "inexact"])
@pytest.mark.parametrize("partition", ["layer", "index"])
def test_batch_normalisation_and_dropout_belong_to_the_shards(world, variant, partition):
    """Statistics and masks of a shard are the same on whichever rank it lies, while no two ranks share a shard.

    Not with Adam, nor in the maximum norm: the bias before a normalisation has a gradient of zero up to rounding,
    whose sign would count.
    """

    def build():
        return classifier(batch_norm=True, dropout=0.2)

    chosen = options(subdomains=8, variant=variant, partition=partition, solver="tr", iterations=3)
    compare_with_one_rank(world, chosen, build)


@pytest.mark.mpi
@pytest.mark.all_sizes(local_data="shard")
@pytest.mark.parametrize("local_data", ["shard", "full"])
def test_convolutional_network_with_squared_error(world, local_data):
    def build():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.AvgPool2d(2)),
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()),
            nn.Flatten(),
            nn.Linear(16, 5),
        ).double()

    def batch(samples, seed):
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(samples, *shape, generator=generator).double() for shape in ((1, 6, 6), (5,)))

    chosen = options(subdomains=3, variant="inexact", solver="tr", iterations=2, local_data=local_data)
    compare_with_one_rank(world, chosen, build, (batch(61, 1), batch(50, 2)), nn.functional.mse_loss)


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes(local_data="shard", iterations=3)
@pytest.mark.parametrize("local_data", ["shard", "full"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_two_replicas(world, local_data, iterations):
    """Two replicas that share each batch are one that has it alone."""
    if world.size % 2:
        pytest.skip("needs an even number of ranks")
    count = world.size // 2
    chosen = {"subdomains": count, "local_data": local_data, "iterations": iterations, "solver": "sgd"}
    compare_with_one_rank(world, options(replicas=2, **chosen), serial=options(replicas=1, **chosen))


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_two_replicas_that_are_each_given_half_a_batch(world):
    if world.size % 2:
        pytest.skip("needs an even number of ranks")
    count = world.size // 2
    inputs, targets = classified(2 * 8 * count)
    # One subdomain a team of two ranks; its shard is 16 samples, of which each has eight.
    own = slice(8 * world.rank, 8 * world.rank + 8)
    network, alone = classifier(), classifier()
    shared = make_solver(world, options(subdomains=count, replicas=2, batch="shard", iterations=2), network)
    found = trace(shared, [(inputs[own], targets[own])] * 2)
    if world.rank == 0:
        one = make_solver(MPI.COMM_SELF, options(subdomains=count, iterations=2), alone)
        assert_same((found, trace(one, [(inputs, targets)] * 2)), (network, alone))


def with_noise_around(batch, seed=5):
    """A larger set of samples, and the rows that make the batch."""
    generator = torch.Generator().manual_seed(seed)
    count = len(batch[0])
    order = torch.randperm(3 * count, generator=generator)
    inputs = torch.full((3 * count, *batch[0].shape[1:]), torch.nan, dtype=batch[0].dtype)
    targets = torch.zeros(3 * count, dtype=batch[1].dtype)
    rows = order[:count]
    inputs[rows], targets[rows] = batch
    return (inputs, targets), rows


def two_steps(world, chosen, arguments):
    network = classifier()
    solver = make_solver(world, chosen, network)
    results = [solver.step(*arguments(solver)), solver.step(*arguments(solver))]
    return [judged for result in results for judged in numbers(result)], network


@pytest.mark.mpi
@pytest.mark.all_sizes(local_data="shard")
@pytest.mark.parametrize("local_data", ["shard", "full"])
def test_whole_batch_or_rows_or_own_shard(world, local_data):
    """Three ways of giving a batch; bitwise the same, as each rank sees the same samples."""
    batch = classified()
    around, rows = with_noise_around(batch)

    def own(solver):
        ranges = solver.holding.decomposition.teams.shards(world.rank, len(batch[0]), local_data)
        return slice(ranges[0][0], ranges[-1][1])

    chosen = {"subdomains": 6, "variant": "exact", "local_data": local_data, "iterations": 2}
    ways = [
        two_steps(world, options(**chosen), lambda solver: (batch,)),
        two_steps(world, options(**chosen), lambda solver: (around, rows)),
        two_steps(
            world, options(batch="shard", **chosen), lambda solver: (tuple(part[own(solver)] for part in batch),)
        ),
        two_steps(world, options(batch="shard", **chosen), lambda solver: (around, rows[own(solver)])),
    ]
    for found, network in ways[1:]:
        assert found == ways[0][0]
        assert torch.equal(flat(network.parameters()), flat(ways[0][1].parameters()))


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_uneven_shards_count_by_their_samples(world):
    """Whatever the shards, the loss is the mean over all samples."""
    counts = [6 + 5 * rank for rank in range(world.size)]
    inputs, targets = classified(sum(counts))
    start = sum(counts[: world.rank])
    own = slice(start, start + counts[world.rank])
    network = classifier()
    solver = make_solver(world, options(batch="shard", subdomains=6), network)
    loss, gradient = loss_and_gradient(network, cross_entropy, (inputs, targets))
    judged = solver.step((inputs[own], targets[own])).schwarz
    assert judged.loss == pytest.approx(loss, rel=1e-13)
    assert judged.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-12)


@pytest.mark.mpi
def test_equal_runs_are_equal_to_the_bit(world):
    """Same seed, same ranks: same bits."""
    runs = []
    for _ in range(2):
        network = classifier(batch_norm=True, dropout=0.3)
        solver = make_solver(world, options(subdomains=6, solver="adam", iterations=2, variant="inexact"), network)
        runs.append((trace(solver, (classified(), classified(97))), flat(network.state_dict().values())))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_split_communicator(world):
    """Two groups of ranks train different networks for different numbers of steps at the same time."""
    color = world.rank % 2
    group = world.Split(color)
    networks = classifier(seed=color), classifier(seed=color)
    batch = classified(90 + 13 * color, seed=color)
    shared, alone = (
        make_solver(comm, options(subdomains=4, iterations=2), network)
        for comm, network in zip((group, MPI.COMM_SELF), networks, strict=True)
    )
    traces = [[numbers(solver.step(batch))[0] for _ in range(2 + 2 * color)] for solver in (shared, alone)]
    assert_same(traces, networks)
    del shared
    group.Free()


@pytest.mark.mpi
def test_every_rank_alone_at_its_own_pace(world):
    network = classifier(seed=world.rank)
    solver = make_solver(MPI.COMM_SELF, options(subdomains=3), network)
    losses = [solver.step(classified(60, seed=world.rank)).schwarz.loss for _ in range(1 + world.rank)]
    assert losses[-1] < losses[0] or len(losses) == 1


@pytest.mark.mpi
def test_two_solvers_take_turns(world):
    """Two solvers on one communicator, each with its own network, do not see each other's messages or state."""
    networks = [classifier(seed=seed) for seed in (0, 1, 0, 1)]
    solvers = [make_solver(world, options(subdomains=6, solver="adam"), network) for network in networks]
    batch = classified()
    for _ in range(3):
        solvers[0].step(batch)
        solvers[1].step(batch)
    for solver in solvers[2:]:
        for _ in range(3):
            solver.step(batch)
    for ours, theirs in zip(networks[:2], networks[2:], strict=True):
        assert torch.equal(flat(ours.parameters()), flat(theirs.parameters()))


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_messages_of_the_user_do_not_meet_the_solvers(world):
    """A collective of the user's that is under way on the same communicator during a step."""
    solver = make_solver(world, options(subdomains=6), classifier())
    own, total = torch.full((3,), float(world.rank)).numpy(), torch.zeros(3).numpy()
    early = world.rank % 2 == 0
    request = world.Iallreduce(own, total) if early else None
    loss = solver.step(classified()).schwarz.loss
    if not early:
        request = world.Iallreduce(own, total)
    request.Wait()
    assert total.tolist() == [sum(range(world.size))] * 3
    assert loss == pytest.approx(loss_and_gradient(classifier(), cross_entropy, classified())[0], rel=1e-13)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_rank_0_gives_its_network_to_all(world):
    network = classifier(seed=world.rank, batch_norm=True)
    network[1].running_mean.fill_(world.rank)
    make_solver(world, options(subdomains=6), network)
    expected = classifier(seed=0, batch_norm=True)
    expected[1].running_mean.fill_(0.0)
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=0, atol=0)
