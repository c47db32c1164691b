"""How tensors come to MPI, without a GPU: host copies forced on CPU tensors, and the calls that a GPU would get."""

import contextlib

import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy

from apts_mpi import APTS, APTSOptions, GlobalStepOptions, LocalOptions, SchwarzOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.nonblocking import Pending, Starts
from apts_mpi.parallel.transport import Bytes, Mirror, Staging, Transport, use_transport
from apts_mpi.tools.events import Events

CPU = torch.device("cpu")


@pytest.fixture
def staged():
    use_transport(CPU, "staged")
    yield
    use_transport(CPU, "direct")


class Recorder:
    """Streams and events of a device that does nothing by itself; `calls` are the calls in their order."""

    def __init__(self):
        self.calls = []
        self.now = self.compute = Stream("compute", self)
        self.done = set()

    def Stream(self, device):
        return Stream("side", self)

    def Event(self):
        return RecordedEvent(self)

    def current_stream(self, device):
        return self.now

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        yield
        self.now = before


class Stream:
    def __init__(self, name, recorder):
        self.name, self.recorder = name, recorder

    def wait_stream(self, other):
        self.recorder.calls.append(f"{self.name} waits for {other.name}")


class RecordedEvent:
    def __init__(self, recorder):
        self.recorder = recorder

    def record(self, stream):
        self.recorder.calls.append(f"event on {stream.name}")

    def query(self):
        return self in self.recorder.done

    def synchronize(self):
        self.recorder.calls.append("host waits for event")
        self.recorder.done.add(self)


class Request:
    """A request of MPI that is done."""

    @staticmethod
    def start(recorder, name):
        recorder.calls.append(f"MPI starts {name}")
        return MPI.REQUEST_NULL


class RecordedStaging(Staging):
    def _copy(self, target, source):
        self._streams.calls.append("copy begins")
        super()._copy(target, source)
        self._streams.calls.append(f"copied on {self._side.name}")


def one_sum(transport, recorder, pending):
    """What `Communicator.start_sum` does, with the calls of MPI recorded."""
    tensor = torch.arange(4.0)
    memory = transport.beside(tensor)
    pending.add(
        transport.push(memory, tensor),
        lambda: Request.start(recorder, "sum"),
        lambda: transport.pull(memory, tensor),
    )
    return tensor, memory


COPY = ["copy begins", "side waits for compute", "copied on side"]


def test_staged_calls_in_their_order():
    """Copied beside the computation after what computes it, summed after the copy, and back before what comes next."""
    recorder = Recorder()
    transport = RecordedStaging(CPU, recorder)
    pending = Pending(Events(), Starts())
    tensor, memory = one_sum(transport, recorder, pending)
    assert recorder.calls == [*COPY, "event on side"] and memory is not tensor
    assert not pending.progress()
    assert "MPI starts sum" not in recorder.calls  # the copy is not done, and nobody has waited for it
    pending.wait()
    assert recorder.calls[4:] == ["host waits for event", "MPI starts sum", *COPY, "compute waits for side"]


def test_direct_calls_in_their_order():
    """Summed in place, after what computes it."""
    recorder = Recorder()
    transport = Transport(CPU, recorder)
    pending = Pending(Events(), Starts())
    tensor, memory = one_sum(transport, recorder, pending)
    assert memory is tensor and not pending.progress()
    pending.wait()
    assert recorder.calls == ["event on compute", "host waits for event", "MPI starts sum"]


def test_sums_start_in_their_order_as_soon_as_their_copies_are_done():
    """MPI matches them by their order, although the copy of a later one may be seen to be done first."""
    recorder = Recorder()
    starts, started = Starts(), []
    events = [recorder.Event() for _ in range(3)]
    for number, event in enumerate(events):
        starts.add(event, lambda number=number: started.append(number))
    recorder.done.add(events[1])
    starts.advance()
    assert started == []
    recorder.done.add(events[0])
    starts.advance()
    assert started == [0, 1]
    starts.finish()
    assert started == [0, 1, 2] and recorder.calls == ["host waits for event"]


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("describe", [False, True])
def test_what_others_wait_for_in_a_group_is_started(world, describe):
    """Rank 0's device is late; the others wait for its sum in the group, and it for them with all ranks."""
    recorder = Recorder()
    comm = Communicator(world, Events())
    group = comm.group(0)
    number = torch.ones(1)
    pending = group.pending()
    event = recorder.Event()
    if world.rank > 0:
        recorder.done.add(event)
    pending.add(event, lambda: group.mpi.Iallreduce(MPI.IN_PLACE, number.numpy()), lambda: None)
    if world.rank > 0:
        pending.wait()
    if not describe:
        comm.total(1)
    elif world.rank == 0:
        assert [comm.receive_object(rank, 7) for rank in range(1, world.size)] == list(range(1, world.size))
    else:
        comm.send_object(world.rank, 0, 7)
    pending.wait()
    assert number.item() == world.size


def test_a_copy_does_not_see_what_comes_later(staged):
    """The memory of MPI is another one, and keeps what was pushed."""
    tensor = torch.arange(4.0)
    mirror = Mirror(tensor)
    mirror.push(1, 3)
    tensor.zero_()
    assert mirror.memory(1, 3).tolist() == [1.0, 2.0]
    mirror.pull(1, 3)
    assert tensor.tolist() == [0.0, 1.0, 2.0, 0.0]
    content = Bytes(torch.arange(3))
    content.push()
    assert content.memory.tobytes() == torch.arange(3).numpy().tobytes() and content.size == 24


SOLVERS = {
    "default": APTSOptions(),
    "adam": APTSOptions(local=LocalOptions(solver="adam", iterations=2)),
    "overlap": APTSOptions(
        schwarz=SchwarzOptions(partition="index", overlap=3, type="basic"), local=LocalOptions(solver="sgd")
    ),
    "steihaug": APTSOptions(global_step=GlobalStepOptions(model="steihaug")),
}


def iterates(world, options):
    """Parameters after each of some steps."""
    network = classifier(batch_norm=options == SOLVERS["adam"])
    solver = APTS(network, cross_entropy, comm=world, options=options)
    found = []
    for batch in (classified(), None, classified(seed=3), None):
        solver.step(batch)
        found.append(solver.holding.objective.vector.values.clone())
    return torch.stack(found)


@pytest.mark.mpi
@pytest.mark.all_sizes(name="default")
@pytest.mark.parametrize("name", SOLVERS)
def test_staged_is_direct_to_the_bit(world, name):
    options = SOLVERS[name]
    direct = iterates(world, options)
    use_transport(CPU, "staged")
    try:
        through_copies = iterates(world, options)
    finally:
        use_transport(CPU, "direct")
    assert torch.equal(direct, through_copies)
    assert not torch.equal(direct[0], direct[-1])


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_layout_staged_through_copies_is_direct_to_the_bit(world):
    from staged_networks import staged as in_stages

    from apts_mpi import StagedAPTS

    def run():
        torch.manual_seed(0)
        modules = [module for _ in range(world.size) for module in (torch.nn.Linear(10, 10), torch.nn.Tanh())]
        network = torch.nn.Sequential(*modules, torch.nn.Linear(10, 3)).double()
        options = in_stages(APTSOptions(), coarse="gauss-newton", solver="kfac")
        solver = StagedAPTS(network, cross_entropy, comm=world, options=options)
        for batch in (classified(), None, classified(seed=3)):
            solver.step(batch)
        return solver.holding.objective.vector.values.clone()

    direct = run()
    use_transport(CPU, "staged")
    try:
        assert torch.equal(run(), direct)
    finally:
        use_transport(CPU, "direct")


@pytest.mark.mpi
def test_buckets_are_pushed_while_the_backward_pass_runs(world, monkeypatch):
    """With a bucket a layer and copies that are done at once, sums start before the gradient is complete."""
    monkeypatch.setattr("apts_mpi.objective.reduction.BUCKET_BYTES", 1)
    pushed = []
    push = Transport.push
    monkeypatch.setattr(Transport, "push", lambda self, *parts: pushed.append(len(parts[0])) or push(self, *parts))
    at_first_layer = []
    network = classifier()
    solver = APTS(network, cross_entropy, comm=world, options=APTSOptions())
    network[0].weight.register_hook(lambda _: at_first_layer.append(len(pushed)))
    pushed.clear()
    solver.step(classified())
    assert at_first_layer[0] > 0


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_blocking_operations_do_not_overtake(world):
    """A sum whose copy is not done yet is started before an agreement on the same ranks."""
    recorder = Recorder()
    comm = Communicator(world, Events())
    mirror = Mirror(torch.full((3,), 1.0 + world.rank))
    mirror._transport = Transport(CPU, recorder)
    pending = comm.pending()
    comm.start_sum(pending, mirror, mirror, 0, 3)
    assert not pending.progress()
    assert comm.total(1) == world.size
    pending.wait()
    assert mirror.tensor.tolist() == [sum(range(1, world.size + 1))] * 3
