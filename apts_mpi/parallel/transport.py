"""Memory of a tensor that MPI may read and write; the only file where CUDA meets MPI."""

from __future__ import annotations

import contextlib
from typing import Any, Literal, Protocol

import torch

from apts_mpi.errors import InvalidInput

# mpi4py silently reduces bfloat16 to garbage, refuses float16, and misreads a tensor that is not C-contiguous.
ADMITTED_DTYPES = (torch.float32, torch.float64)

# Of a vector that is summed piece by piece: large enough for bandwidth, small enough that the first sum starts early in
# a backward pass.
BUCKET_BYTES = 1 << 20


class DeviceEvent(Protocol):
    """A moment in the work of a device, as ``torch.cuda.Event``."""

    def record(self, stream: Any) -> None:
        """It is when the device has done what is in ``stream`` by now."""

    def query(self) -> bool:
        """Whether it has been."""

    def synchronize(self) -> None:
        """Wait for it."""


class HostStreams:
    """What `Transport` uses of ``torch.cuda``, for a CPU, which has done everything when a call returns."""

    class Stream:
        """Work in its order."""

        def __init__(self, device: torch.device) -> None: ...

        def wait_stream(self, stream: Any) -> None:
            """Let what comes now begin after what is in ``stream`` by now."""

    class Event:
        """See `apts_mpi.parallel.transport.DeviceEvent`."""

        def record(self, stream: Any) -> None: ...

        def query(self) -> bool:
            """See `apts_mpi.parallel.transport.DeviceEvent`."""
            return True

        def synchronize(self) -> None: ...

    def current_stream(self, device: torch.device) -> Stream:
        """The stream of the computation."""
        return self.Stream(device)

    def stream(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """In the block work goes to ``stream``."""
        return contextlib.nullcontext()


class Transport:
    """How tensors of a device come to where MPI reads and writes them: in their own memory.

    Nothing here waits for the device. MPI knows no streams, so what `push` returns has to be over before MPI may start.

    Parameters
    ----------
    device
        The device.
    streams
        Its streams, ``torch.cuda`` by default.
    """

    words = "the tensors' own memory"

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        self._device = device
        self._streams = streams or (HostStreams() if device.type == "cpu" else torch.cuda)

    def beside(self, tensor: torch.Tensor) -> torch.Tensor:
        """The memory that MPI gets for a tensor, of its shape."""
        return tensor

    def push(self, memory: torch.Tensor, tensor: torch.Tensor) -> DeviceEvent:
        """Bring a tensor, or a part, into its memory for MPI; the event after which MPI may read and write there."""
        return self._noted(self._streams.current_stream(self._device))

    def clear(self) -> DeviceEvent:
        """The event after which MPI may write into memory that was taken by now."""
        return self._noted(self._streams.current_stream(self._device))

    def pull(self, memory: torch.Tensor, tensor: torch.Tensor) -> None:
        """Bring what MPI wrote into the tensor, before whatever is computed from now on."""

    def _noted(self, stream: Any) -> DeviceEvent:
        event = self._streams.Event()
        event.record(stream)
        return event


class Staging(Transport):
    """The same through pinned host memory, by copies on a stream of their own, beside the computation.

    Iallreduce on GPU memory crashes in current Open MPI, GPU-aware or not (open-mpi/ompi#9845).
    """

    words = "staging through pinned host memory"

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        super().__init__(device, streams)
        self._side = self._streams.Stream(device)

    def beside(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Transport`."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")

    def push(self, memory: torch.Tensor, tensor: torch.Tensor) -> DeviceEvent:
        """See `Transport`."""
        # All copies are on one stream: when this one is done, so are those that MPI's results of before were read by.
        self._copy(memory, tensor)
        return self._noted(self._side)

    def clear(self) -> DeviceEvent:
        """See `Transport`."""
        return self._noted(self._side)

    def pull(self, memory: torch.Tensor, tensor: torch.Tensor) -> None:
        """See `Transport`."""
        self._copy(tensor, memory)
        self._streams.current_stream(self._device).wait_stream(self._side)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        # After what computes the source, and after what still reads the target.
        self._side.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._side):
            target.copy_(source, non_blocking=True)


TRANSPORTS: dict[str, type[Transport]] = {"direct": Transport, "staged": Staging}

# By device. A process has one GPU, and what MPI can do with its memory is the same for all of it.
_chosen: dict[torch.device, Transport] = {}


def use_transport(device: torch.device, kind: Literal["direct", "staged"]) -> None:
    """From now on bring tensors of ``device`` to MPI in their own memory, or through host memory."""
    _chosen[device] = TRANSPORTS[kind](device)


def transport_of(device: torch.device) -> Transport:
    """How tensors of a device come to MPI: unless `use_transport` said otherwise, staged from a GPU."""
    if device not in _chosen:
        use_transport(device, "direct" if device.type == "cpu" else "staged")
    return _chosen[device]


def _buffer(memory: torch.Tensor) -> Any:
    """What mpi4py takes: an array of host memory, or the tensor on a device, by its DLPack."""
    return memory.numpy() if memory.device.type == "cpu" else memory


class Mirror:
    """What MPI sees of a flat tensor.

    Parameters
    ----------
    tensor
        Flat, contiguous, float32 or float64, not requiring a gradient.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.dtype not in ADMITTED_DTYPES or not tensor.is_contiguous() or tensor.requires_grad:
            raise InvalidInput(
                f"a tensor of {tensor.dtype}, contiguous={tensor.is_contiguous()}, "
                f"requires_grad={tensor.requires_grad} cannot be reduced; give a contiguous float32 or float64 tensor"
            )
        self.tensor = tensor
        self._transport = transport_of(tensor.device)
        self._memory = self._transport.beside(tensor)
        self._buffer = _buffer(self._memory)

    def memory(self, start: int, stop: int) -> Any:
        """For MPI: elements ``start`` to ``stop``, shape (stop - start,)."""
        return self._buffer[start:stop]

    def push(self, start: int, stop: int) -> DeviceEvent:
        """Bring elements ``start`` to ``stop`` to where MPI reads them; the event after which they are there."""
        return self._transport.push(self._memory[start:stop], self.tensor[start:stop])

    def pull(self, start: int, stop: int) -> None:
        """Bring elements ``start`` to ``stop`` from where MPI wrote them into the tensor."""
        self._transport.pull(self._memory[start:stop], self.tensor[start:stop])


class Bytes:
    """What MPI sees of a tensor in a message between two ranks, where nothing is summed: its bytes, of any dtype.

    Parameters
    ----------
    tensor
        Contiguous, not requiring a gradient.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._transport = transport_of(tensor.device)
        self._memory = self._transport.beside(tensor)
        self.size = tensor.numel() * tensor.element_size()
        self.memory = _buffer(self._memory.reshape(-1).view(torch.uint8))

    def push(self) -> DeviceEvent:
        """Bring the tensor to where MPI reads it; the event after which it is there."""
        return self._transport.push(self._memory, self._tensor)

    def clear(self) -> DeviceEvent:
        """The event after which MPI may write there."""
        return self._transport.clear()

    def pull(self) -> None:
        """Bring what MPI wrote into the tensor."""
        self._transport.pull(self._memory, self._tensor)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a tensor of the host on ``device``, without waiting for it."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def choose_device(kind: str, local_rank: int) -> torch.device:
    """Device of this rank: one GPU a rank, in the order of the ranks on the host.

    Parameters
    ----------
    kind
        ``cpu``, ``cuda``, or ``auto``: a GPU where there is one.
    local_rank
        Number of this rank among those on its host.

    Raises
    ------
    InvalidInput
        For ``cuda`` where there is none.
    """
    count = torch.cuda.device_count() if kind != "cpu" else 0
    if kind == "cuda" and count == 0:
        raise InvalidInput("device: 'cuda' was asked for, but torch finds no GPU here; give --device cpu or auto")
    if count == 0:
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % count)
    # Before anything touches CUDA: the first context made is the one that stays (pytorch/pytorch#21922).
    torch.cuda.set_device(device)
    return device


def wait_for_device(device: torch.device) -> None:
    """Wait until a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def identity_of(device: torch.device) -> str:
    """What tells a GPU from all others of its host, also where processes see them under other numbers; "" for a CPU."""
    if device.type == "cpu":
        return ""
    properties = torch.cuda.get_device_properties(device)
    # Older releases of torch have no uuid.
    return str(getattr(properties, "uuid", device))
