"""Messages between ranks."""

import math

import numpy as np
import pytest
import torch
from mpi4py import MPI

from apts_mpi import InvalidInput
from apts_mpi.errors import SharedInvalidInput
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.transport import Mirror
from apts_mpi.tools.events import Events

pytestmark = pytest.mark.all_sizes


@pytest.fixture
def comm(world):
    return Communicator(world, Events())


@pytest.mark.mpi
def test_sum_of_a_part(world, comm):
    tensor = torch.arange(7.0, dtype=torch.float64) + world.rank
    before, mirror = tensor.clone(), Mirror(tensor)
    pending = comm.pending()
    comm.start_sum(pending, mirror, mirror, 2, 5)
    pending.wait()
    ranks = sum(range(world.size))
    assert tensor[2:5].tolist() == [world.size * index + ranks for index in (2, 3, 4)]
    assert torch.equal(tensor[:2], before[:2]) and torch.equal(tensor[5:], before[5:])


@pytest.mark.mpi
def test_sum_into_another_tensor_leaves_the_first_alone(world, comm):
    send, receive = torch.full((3,), 1.0 + world.rank), torch.zeros(3)
    pending = comm.pending()
    comm.start_sum(pending, Mirror(send), Mirror(receive), 0, 3)
    pending.progress()
    pending.wait()
    assert send.tolist() == [1.0 + world.rank] * 3
    assert receive.tolist() == [sum(range(1, world.size + 1))] * 3


@pytest.mark.mpi
def test_several_sums_under_way_at_once(world, comm):
    mirrors = [Mirror(torch.full((5,), float(number))) for number in range(4)]
    pending = comm.pending()
    for mirror in mirrors:
        comm.start_sum(pending, mirror, mirror, 0, 5)
    pending.wait()
    for number, mirror in enumerate(mirrors):
        assert mirror.tensor.tolist() == [world.size * number] * 5


@pytest.mark.mpi
def test_gather_of_uneven_and_empty_ranges(world, comm):
    """Rank r holds r elements; rank 0 none."""
    edges = [rank * (rank - 1) // 2 for rank in range(world.size + 1)]
    ranges = [(edges[rank], edges[rank + 1]) for rank in range(world.size)]
    tensor = torch.full((edges[-1],), math.nan, dtype=torch.float64)
    start, stop = ranges[world.rank]
    tensor[start:stop] = world.rank
    pending = comm.pending()
    comm.start_gather(pending, Mirror(tensor), ranges)
    pending.wait()
    assert tensor.tolist() == [rank for rank in range(world.size) for _ in range(rank)]


@pytest.mark.mpi
def test_agree_decides_on_rank_0_from_the_values_of_all(world, comm):
    called = []

    def decide(table):
        called.append(table.copy())
        return [table[:, 0].sum(), table[-1, 1], True]

    record = comm.agree([world.rank, 10.0 * world.rank], decide)
    assert record == (sum(range(world.size)), 10.0 * (world.size - 1), 1.0)
    assert len(called) == (world.rank == 0)
    if called:
        assert called[0].tolist() == [[rank, 10.0 * rank] for rank in range(world.size)]


@pytest.mark.mpi
def test_agree_passes_on_what_is_not_finite(world, comm):
    record = comm.agree([math.nan if world.rank == 0 else math.inf], lambda table: [*table[:1, 0], -math.inf])
    assert math.isnan(record[0]) and record[1] == -math.inf


@pytest.mark.mpi
def test_sum_on_root(world, comm):
    total = comm.sum_on_root(np.full((2, 3), 1.0 + world.rank))
    assert (total is not None) == (world.rank == 0)
    if total is not None:
        assert total.tolist() == [[sum(range(1, world.size + 1))] * 3] * 2


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_sum_of_part(world, comm):
    """Parts of 0, 1, 2, ... numbers."""
    counts = list(range(world.size))
    part = comm.sum_of_part(np.arange(sum(counts)) * (1.0 + world.rank), counts)
    first = sum(counts[: world.rank])
    assert part.tolist() == [number * sum(range(1, world.size + 1)) for number in range(first, first + world.rank)]


@pytest.mark.mpi
def test_rank_0_shares_tensors_of_any_type(world, comm):
    tensors = [torch.full((2, 2), float(world.rank)), torch.tensor(5 + world.rank), torch.tensor([world.rank == 0])]
    comm.share_tensors(tensors)
    assert tensors[0].tolist() == [[0.0, 0.0]] * 2 and tensors[1] == 5 and tensors[2].tolist() == [True]
    assert comm.agree_on_text(f"rank {world.rank}") == "rank 0"
    assert comm.total(world.rank) == sum(range(world.size))


@pytest.mark.mpi
def test_groups(world, comm):
    group = comm.group(world.rank % 3)
    mates = [rank for rank in range(world.size) if rank % 3 == world.rank % 3]
    assert (group.rank, group.size) == (mates.index(world.rank), len(mates))
    assert group.total(world.rank) == sum(mates)


@pytest.mark.mpi
def test_local_rank_counts_the_ranks_of_a_host(world, comm):
    """All are on one here."""
    names = world.allgather(MPI.Get_processor_name())
    assert comm.local_rank() == names[: world.rank].count(names[world.rank])


def test_thousands_of_solvers_do_not_use_up_communicators():
    """A library has room for some two thousand; a user's communicator is duplicated once."""
    for _ in range(5000):
        Communicator(MPI.COMM_SELF, Events()).group(0)
    assert Communicator(MPI.COMM_SELF, Events()).group(0).total(1) == 1


@pytest.mark.mpi
def test_communicators_of_the_users_can_be_freed(world):
    for _ in range(3):
        own = world.Dup()
        assert Communicator(own, Events()).group(0).total(1) == world.size
        own.Free()


@pytest.mark.mpi
def test_shared_errors_without_an_error(comm):
    with comm.shared_errors():
        pass


@pytest.mark.mpi
def test_error_on_all_ranks_is_told_once(comm):
    with pytest.raises(SharedInvalidInput) as caught, comm.shared_errors():
        raise InvalidInput("radius: give more")
    assert str(caught.value) == "radius: give more"


@pytest.mark.mpi
def test_error_on_one_rank_is_raised_on_all(world, comm):
    last = world.size - 1
    with pytest.raises(SharedInvalidInput) as caught, comm.shared_errors():
        if world.rank == last:
            raise InvalidInput("radius: give more")
    assert str(caught.value) == ("radius: give more" if last == 0 else f"rank {last}: radius: give more")


@pytest.mark.mpi
def test_unexpected_error_is_raised_as_it_is_where_it_happened(world, comm):
    """With its traceback; the others learn of it."""
    last = world.size - 1
    kind, message = (KeyError, "odd") if world.rank == last else (SharedInvalidInput, f"rank {last}: KeyError: 'odd'")
    with pytest.raises(kind, match=message), comm.shared_errors():
        if world.rank == last:
            raise KeyError("odd")


@pytest.mark.mpi
def test_messages_are_counted(world):
    events = Events()
    comm = Communicator(world, events)
    comm.sum(Mirror(torch.zeros(10, dtype=torch.float64)))
    comm.agree([1.0, 2.0], lambda table: [0.0])
    assert (events.operations["sum"].messages, events.operations["sum"].bytes) == (1, 80)
    assert (events.operations["agree"].messages, events.operations["agree"].bytes) == (1, 16)
    assert events.totals["wait"].calls == 3 and events.totals["wait"].seconds > 0.0
