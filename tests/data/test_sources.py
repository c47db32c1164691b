"""Samples that are read as they are asked for: the right ones, once, and the same whoever reads them."""

import random

import h5py
import numpy as np
import pytest
import torch
from sampled_data import COUNT, LOADERS, Noisy, Sharded, Stream, network, weighted
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from apts_mpi.data import Half, take_over
from apts_mpi.data.hdf5 import FileRows
from apts_mpi.data.source import Epoch
from apts_mpi.errors import InvalidInput
from apts_mpi.problems import Problem

ROWS = torch.tensor([5, 3, 4, 3, 11])


def numbers(dtype=np.float32):
    return (np.arange(24 * 3).reshape(24, 3) % 50).astype(dtype), (np.arange(24) % 3).astype(np.int32)


def in_memory(directory):
    return numbers()


def in_map(directory):
    arrays = numbers()
    maps = []
    for place, array in enumerate(arrays):
        path = directory / f"{place}.bin"
        array.tofile(path)
        maps.append(np.memmap(path, array.dtype, "r", shape=array.shape))
    return tuple(maps)


def in_file(directory):
    file = h5py.File(directory / "data.h5", "w")
    return tuple(file.create_dataset(str(place), data=array) for place, array in enumerate(numbers()))


def in_big_endian(directory):
    inputs, targets = numbers()
    return inputs.astype(">f4")[::-1][::-1], targets.astype(">i2")


def in_doubles(directory):
    inputs, targets = numbers(np.float64)
    return inputs, targets.astype(np.uint8)


@pytest.mark.parametrize("place", [in_memory, in_map, in_file, in_big_endian, in_doubles])
def test_arrays_give_the_rows_that_are_asked_for(place, tmp_path):
    arrays = place(tmp_path)
    problem = Problem(name="arrays", network=nn.Linear(3, 3), loss=cross_entropy, train=arrays, accuracy=True)
    expected = [torch.from_numpy(array) for array in numbers()]
    inputs, targets = problem.train
    for index in (ROWS, slice(2, 9), slice(0, 24)):
        torch.testing.assert_close(inputs[index], expected[0][index], rtol=0, atol=0)
        torch.testing.assert_close(targets[index], expected[1][index].long(), rtol=0, atol=0)
    assert len(inputs) == len(targets) == 24


@pytest.mark.parametrize("place", [in_map, in_file])
def test_what_is_in_a_file_stays_there(place, tmp_path):
    inputs, _ = Problem(name="a", network=nn.Linear(3, 3), loss=cross_entropy, train=place(tmp_path)).train
    assert isinstance(inputs, Half)


def test_neighbouring_rows_of_a_file_are_read_together_and_none_twice(tmp_path):
    class Counting:
        def __init__(self, dataset):
            self.dataset, self.shape, self.dtype, self.reads = dataset, dataset.shape, dataset.dtype, []

        def read_direct(self, found, source, place):
            self.reads.append((source.start, source.stop))
            self.dataset.read_direct(found, source, place)

    with h5py.File(tmp_path / "data.h5", "w") as file:
        counting = Counting(file.create_dataset("x", data=np.arange(40)))
        rows = np.array([9, 3, 4, 5, 3, 30])
        assert FileRows(counting).read(rows).tolist() == rows.tolist()
        assert counting.reads == [(3, 6), (9, 10), (30, 31)]


def draw(loader, rows, epoch):
    pair = take_over("train", LOADERS[loader](), torch.float64).pair
    return pair[0].samples.source.take(rows, epoch)


@pytest.mark.parametrize("loader", ["shuffled", "stream"])
def test_what_is_drawn_depends_on_seed_epoch_and_sample_alone(loader):
    random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), torch.get_rng_state()
    first = draw(loader, ROWS, Epoch(3, 2))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    alone = draw(loader, ROWS[4:], Epoch(3, 2))
    torch.testing.assert_close(alone[0], first[0][4:], rtol=0, atol=0)
    torch.testing.assert_close(first[0][1], first[0][3], rtol=0, atol=0)
    for other in (Epoch(3, 1), Epoch(4, 2)):
        assert not torch.equal(draw(loader, ROWS, other)[0], first[0])


@pytest.mark.processes
@pytest.mark.parametrize("loader", ["shuffled", "stream", "shards", "telling"])
def test_workers_read_what_is_asked_for_in_its_order(loader):
    pair = take_over("train", LOADERS[loader](num_workers=2), torch.float64).pair
    source = pair[0].samples.source
    requests = [(torch.arange(start, start + 7), Epoch(0, 1)) for start in (0, 14, 28)]
    for _ in range(2):
        state = torch.get_rng_state()
        found = list(source.ahead(requests))
        assert torch.equal(state, torch.get_rng_state())
        for (rows, epoch), (inputs, targets) in zip(requests, found, strict=True):
            expected = draw(loader, rows, epoch)
            torch.testing.assert_close(inputs, expected[0], rtol=0, atol=0)
            assert torch.equal(targets, expected[1])


def test_a_rank_reads_few_shards_and_all_samples_come_once_an_epoch():
    stream = LOADERS["shards"]()
    taken = take_over("train", stream, torch.float64)
    source = taken.pair[0].samples.source
    batches = taken.order.batches(COUNT, 20, 0, 1)
    assert sorted(torch.cat(batches).tolist()) == list(range(COUNT))
    # The second of four ranks.
    own = [rows[5:10] for rows in batches]
    stream.dataset.read.clear()
    for rows in own:
        source.take(rows, Epoch(0, 1))
    assert max(stream.dataset.read) < 14 + 15 + 16, "it reads nothing of the last shard"
    assert len(stream.dataset.read) == len(set(stream.dataset.read))


@pytest.mark.parametrize("loader", ["telling"])
def test_a_stream_goes_on_where_it_was(loader):
    given, later = LOADERS[loader](), LOADERS[loader]()
    source, other = (take_over("train", each, torch.float64).pair[0].samples.source for each in (given, later))
    source.take(torch.arange(10, 20), Epoch(0, 1))
    (position,) = source.positions
    assert position[:4] == (0, 0, 1, 20) and position.state == {"place": 20}
    later.dataset.read.clear()
    other.go_on([position])
    rows = torch.arange(25, 30)
    found = other.take(rows, Epoch(0, 1))
    assert later.dataset.read == list(range(20, 30)), "what is behind is not read again"
    torch.testing.assert_close(found[0], draw(loader, rows, Epoch(0, 1))[0], rtol=0, atol=0)
    # What is behind the position, or in another epoch, is read from the beginning.
    for rows, epoch in ((torch.arange(3), Epoch(0, 1)), (torch.arange(25, 30), Epoch(0, 2))):
        torch.testing.assert_close(other.take(rows, epoch)[0], draw(loader, rows, epoch)[0], rtol=0, atol=0)


def order_of(loader):
    return take_over("train", loader, torch.float64).order


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (SequentialSampler(Noisy()), "InOrder"),
        (RandomSampler(Noisy()), "Shuffled"),
        (RandomSampler(Noisy(), replacement=True), "Sampled"),
        (RandomSampler(Noisy(), num_samples=7), "Sampled"),
        (DistributedSampler(Noisy(), 4, 1), "Shuffled"),
        (DistributedSampler(Noisy(), 4, 1, shuffle=False), "InOrder"),
        (weighted(), "Sampled"),
    ],
)
def test_samplers_of_a_loader(sampler, expected):
    assert type(order_of(DataLoader(Noisy(), batch_size=5, sampler=sampler))).__name__ == expected
    given = DataLoader(Noisy(), batch_sampler=BatchSampler(sampler, 9, False))
    taken = take_over("train", given, torch.float64)
    assert (type(taken.order).__name__, taken.batch_size) == (expected, 9)


def test_batches_of_a_sampler_repeat_by_seed_and_epoch():
    order = order_of(LOADERS["weighted"]())
    assert order.count(COUNT, 20) == 2
    first, again, other = (order.batches(COUNT, 20, 5, epoch) for epoch in (1, 1, 2))
    assert [rows.tolist() for rows in first] == [rows.tolist() for rows in again]
    assert [rows.tolist() for rows in first] != [rows.tolist() for rows in other]
    assert [len(rows) for rows in first] == [20, 20]


def test_batches_of_uneven_sizes():
    sizes = [[0, 1, 2], [3, 4, 5, 6, 7], [8]]
    order = order_of(DataLoader(Noisy(), batch_sampler=sizes))
    assert [rows.tolist() for rows in order.batches(COUNT, 1, 0, 1)] == sizes


def test_tensors_of_a_loader_stay_in_memory():
    tensors = torch.zeros(6, 2), torch.arange(6)
    taken = take_over("train", DataLoader(TensorDataset(*tensors), batch_size=3), torch.float64)
    assert [part.dtype for part in taken.pair] == [torch.float64, torch.int64]
    assert taken.batch_size == 3 and all(isinstance(part, torch.Tensor) for part in taken.pair)


def test_bytes_are_prepared_where_they_are_used():
    images = torch.arange(4 * 9, dtype=torch.uint8).reshape(4, 9)
    problem = Problem(
        name="bytes",
        network=nn.Linear(9, 2),
        loss=mse_loss,
        train=(images, torch.zeros(4, 2)),
        prepare=lambda images: images / 255,
    )
    inputs, _ = problem.train
    assert inputs.samples.source.take(ROWS[1:2], Epoch(0, 0))[0].dtype == torch.uint8
    torch.testing.assert_close(inputs[1:3], images[1:3].float() / 255)


def test_a_collate_function_makes_the_batch():
    class Words(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            return torch.ones(index + 1), index

    def padded(samples):
        inputs, targets = zip(*samples, strict=True)
        return nn.utils.rnn.pad_sequence(inputs, batch_first=True), torch.tensor(targets)

    plain = {"name": "words", "network": network(), "loss": cross_entropy}
    given = Problem(**plain, train=Words(), collate_fn=padded).train
    of_loader = Problem(**plain, train=DataLoader(Words(), collate_fn=padded)).train
    for inputs, targets in (given, of_loader):
        rows = torch.tensor([0, 2])
        assert inputs[rows].tolist() == [[1, 0, 0], [1, 1, 1]] and targets[rows].tolist() == [0, 2]
    with pytest.raises(InvalidInput, match="5 samples do not make a batch .*give a collate_fn"):
        Problem(**plain, train=Words()).train[0][:]


class Endless(Stream):
    def __iter__(self):
        while True:
            yield torch.zeros(2), 0


class Short(Stream):
    def __len__(self):
        return COUNT + 1


class Repeated(Sharded):
    def __iter__(self):
        return (self.points[index] for index in range(COUNT))


class Uneven(Sharded):
    shard_lengths = (60,)


class Single(Noisy):
    def __getitem__(self, index):
        return self.points[index]


WRONG = {
    "one array": (np.zeros((4, 3)), "train: ndarray is not allowed; give a tuple of tensors or arrays"),
    "lists": (([1], [2]), r"train inputs\[0\]: int 1 is not allowed"),
    "a mapping": ({"inputs": 1}, "train: dict is not allowed"),
    "words": ((np.array(["a"]), np.array([1])), "train inputs: numbers of type <U1 are not allowed"),
    "counts": ((np.zeros((4, 3), np.float32), np.zeros(5)), "train: '4 inputs and 5 targets'"),
    "empty": ((np.zeros((0, 3), np.float32), np.zeros(0)), "shape of train inputs"),
    "no samples": (Noisy(0), "the data set has no samples"),
    "no pair": (Single(), "a batch of the data set is a Tensor; .*a pair"),
    "no batches": (DataLoader(Noisy(), batch_size=None), "the DataLoader makes no batches"),
    "repeated": (Repeated(), "Repeated has 4 shards, and gives the same samples for each"),
    "shards": (Uneven(), r"Uneven has 4 shards and the shard_lengths \[60\]"),
    "endless": (Endless(), "Endless does not say how many samples it has"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_read_is_named(name, monkeypatch):
    monkeypatch.setattr("apts_mpi.data.streamed.MOST_COUNTED", 1000)
    given, message = WRONG[name]
    with pytest.raises(InvalidInput, match=message):
        Problem(name="wrong", network=nn.Linear(3, 2), loss=mse_loss, train=given)


def test_a_stream_that_ends_early_and_a_sample_that_is_nan(tmp_path):
    inputs, _ = take_over("train", Short(), torch.float64).pair
    with pytest.raises(InvalidInput, match="Short ended after 60 samples .* and 61 were counted or promised"):
        inputs[:]
    values = np.memmap(tmp_path / "x", np.float32, "w+", shape=(8, 3))
    values[5, 1] = np.nan
    inputs, _ = take_over("train", (values, np.zeros(8)), torch.float32).pair
    assert inputs[:5].shape == (5, 3)
    with pytest.raises(InvalidInput, match="the inputs of sample 5 have nan"):
        inputs[torch.tensor([2, 5])]
