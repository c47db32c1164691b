"""Messages between ranks: sums and gathers, agreement on a record, and errors that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

from apts_mpi.errors import InvalidInput, SharedInvalidInput
from apts_mpi.parallel.contents import share_contents
from apts_mpi.parallel.nonblocking import Pending, Starts
from apts_mpi.parallel.parts import Parts, number, operation
from apts_mpi.parallel.private import private_of
from apts_mpi.parallel.stall import Patience
from apts_mpi.parallel.transport import Bytes, Mirror
from apts_mpi.parallel.waiting import WAITING
from apts_mpi.tools.events import Events

# Tag of messages outside of the pipeline, which has lower ones, as `Patience` has higher ones.
TURN = 901


# Numbers of a record that goes in one message with their count; of a longer one the rest follows in a second.
SHORT = 31


class Communicator:
    """The ranks that work on one solver, or a group of them.

    Parameters
    ----------
    comm
        Any intracommunicator. A private duplicate is made, so that messages never meet the user's own. Collective.
    events
        Where messages and waiting times are counted.
    patience
        Limits how long this rank waits for others in collectives and pending operations; None waits for ever.
    starts
        Operations that wait for the device. Of groups of the same ranks it is one queue: a rank that blocks in one
        group must have started what the others wait for in another one.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        events: Events,
        patience: Patience | None = None,
        starts: Starts | None = None,
    ) -> None:
        self._private = private_of(comm)
        self._mpi = self._private.comm
        self.events = events
        self.patience = patience
        self._starts = Starts() if starts is None else starts
        self.rank = self._mpi.Get_rank()
        self.size = self._mpi.Get_size()

    def group(self, color: int) -> Communicator:
        """Communicator of the ranks that give the same ``color``, in the order of their ranks. Collective."""
        with WAITING.noted("all ranks to form groups"):
            colors = tuple(self._mpi.allgather(color))
            groups = self._private.groups
            if colors not in groups:
                groups[colors] = self._mpi.Split(color, self.rank)
        return Communicator(groups[colors], self.events, self.patience, self._starts)

    @property
    def mpi(self) -> MPI.Intracomm:
        """The private duplicate, for a library that takes a communicator, as HDF5 does."""
        return self._mpi

    def local_rank(self) -> int:
        """Number of this rank among those on its host. Collective."""
        with WAITING.noted("all ranks to tell their hosts"):
            host = self._mpi.Split_type(MPI.COMM_TYPE_SHARED)
            local_rank = host.Get_rank()
            host.Free()
        return local_rank

    def pending(self) -> Pending:
        """An empty set of operations."""
        return Pending(self.events, self._starts, self.patience, self._private.departures.departed)

    def watch_departures(self) -> None:
        """End waits for ranks whose programs have come to their ends; see ``Departures``. Called on all ranks."""
        self._private.departures.watch()

    def limit_patience(self, timeout: float, places: Sequence[str]) -> None:
        """From now on wait for others at most ``timeout`` seconds; groups made later do so too. See ``Patience``."""
        self.patience = Patience(self._mpi, timeout, places, WAITING.sign)

    @contextmanager
    def _collective(self, operation: str, size: int = 0) -> Iterator[None]:
        """Count and time a blocking collective, the block, to which this rank gives ``size`` bytes. Collective.

        Of objects that are pickled the bytes are not known, and not counted.
        """
        self._starts.finish()
        self.events.message(operation, size)
        if self.patience is not None:
            self.events.message("barrier", 0)
        what = "all ranks to come to a reduction"
        with self.events.timed("wait"):
            if self.patience is not None:
                self.patience.wait(self._mpi.Ibarrier().Test, what)
            with WAITING.noted(what, self._private.departures.departed):
                yield

    def start_send(self, pending: Pending, content: Bytes, rank: int, tag: int) -> None:
        """Start to send a message to ``rank``; ``content`` must stay as it is until the operation has completed."""
        self.events.message("pipeline", content.size)
        pending.add(content.push(), lambda: self._mpi.Isend(content.memory, rank, tag), lambda: None)

    def start_receive(self, pending: Pending, content: Bytes, rank: int, tag: int) -> None:
        """Start to receive the next message of ``rank`` with ``tag``, which has the size of ``content``."""
        pending.add(content.clear(), lambda: self._mpi.Irecv(content.memory, rank, tag), content.pull)

    def send_object(self, value: Any, rank: int, tag: int) -> None:
        """Send a small object; returns when it can be forgotten."""
        self._starts.finish()
        self.events.message("pipeline", 0)
        request = self._mpi.isend(value, rank, tag)
        if self.patience is None:
            with WAITING.noted("a description to be received"):
                request.wait()
        else:
            self.patience.wait(lambda: request.test()[0], "a description to be received")

    def receive_object(self, rank: int, tag: int) -> Any:
        """The next small object of ``rank`` with ``tag``."""
        self._starts.finish()
        what = "a description of activations"
        with self.events.timed("wait"):
            if self.patience is not None:
                self.patience.wait(lambda: self._mpi.Iprobe(rank, tag), what)
            with WAITING.noted(what):
                return self._mpi.recv(source=rank, tag=tag)

    def start_sum(self, pending: Pending, send: Mirror, receive: Mirror, start: int, stop: int) -> None:
        """Start the sum over ranks of elements ``start`` to ``stop`` of ``send`` into ``receive``. Collective.

        ``send`` and ``receive`` may be the same mirror.
        """
        self.events.message("sum", (stop - start) * receive.tensor.element_size())

        def begin() -> MPI.Request:
            # Holding ``send``: its tensor is read until then.
            source = MPI.IN_PLACE if send is receive else send.memory(start, stop)
            return self._mpi.Iallreduce(source, receive.memory(start, stop))

        pending.add(send.push(start, stop), begin, lambda: receive.pull(start, stop))

    def start_gather(self, pending: Pending, buffer: Mirror, ranges: Sequence[tuple[int, int]]) -> None:
        """Start to give every rank the elements that rank r holds in ``ranges[r]``, in place. Collective."""
        start, stop = ranges[self.rank]
        whole = buffer.memory(0, buffer.tensor.numel())
        counts = [stop - start for start, stop in ranges]
        offsets = [start for start, _ in ranges]
        self.events.message("gather", (stop - start) * buffer.tensor.element_size())
        pending.add(
            buffer.push(start, stop),
            lambda: self._mpi.Iallgatherv(MPI.IN_PLACE, [whole, (counts, offsets)]),
            lambda: buffer.pull(0, buffer.tensor.numel()),
        )

    def sum(self, mirror: Mirror) -> None:
        """Sum ``mirror`` over the ranks in place. Collective."""
        pending = self.pending()
        self.start_sum(pending, mirror, mirror, 0, mirror.tensor.numel())
        pending.wait()

    def share_tensors(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every rank rank 0's contents of ``tensors``, of the same shape, dtype and layout there. Collective.

        On rank 0 they stay untouched. Long ones go from memory to memory where they lie, one after the other, and short
        ones in one message.
        """
        given = sum(tensor.numel() * tensor.element_size() for tensor in tensors) if self.rank == 0 else 0
        with self._collective("share", given):
            share_contents(tensors, self._mpi)

    def total(self, number: int) -> int:
        """Sum of ``number`` over the ranks. Collective."""
        found = np.array([number])
        with self._collective("collect", found.nbytes):
            self._mpi.Allreduce(MPI.IN_PLACE, found, MPI.SUM)
        return int(found[0])

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each of ``numbers``, as many on every rank, whose results are the same bits. Collective."""
        found = np.array(numbers, dtype=np.int64)
        with self._collective("collect", found.nbytes):
            self._mpi.Allreduce(MPI.IN_PLACE, found, MPI.MAX)
        return found.tolist()

    def numbers(self, own: int) -> list[int]:
        """What each rank gives, in the order of ranks. Collective."""
        found = np.empty(self.size, dtype=np.int64)
        with self._collective("collect", found.itemsize):
            self._mpi.Allgather(np.array([own], dtype=np.int64), found)
        return found.tolist()

    def combine(self, own: Parts, decide: Callable[[Parts], Sequence[float]]) -> tuple[float, ...]:
        """Let rank 0 decide from what the numbers of all ranks are together; every rank returns that. Collective.

        Nothing on any rank grows with the ranks, but for the rounds of the reduction.

        Parameters
        ----------
        own
            What this rank has; as many of each kind on every rank.
        decide
            Called on rank 0; returns the record, floats.
        """
        message = own.message()
        found = np.empty_like(message) if self.rank == 0 else None
        with self._collective("agree", message.nbytes):
            receive = None if found is None else [found, len(found), number()]
            self._mpi.Reduce([message, len(message), number()], receive, op=operation(), root=0)
        return self.decide(lambda: decide(own.of(np.asarray(found))))

    def agree(self, values: Sequence[float], decide: Callable[[np.ndarray], Sequence[float]]) -> tuple[float, ...]:
        """Let rank 0 decide from the values of all ranks; every rank returns its decision. Collective.

        A sum over ranks is formed on rank 0 alone and handed out: MPI libraries have returned different bits of
        one Allreduce on different ranks (pmodels/mpich#6538), and ranks that compare them part company. Where a sum,
        the largest or a norm does, `combine` costs less on many ranks.

        Parameters
        ----------
        values
            Float64 scalars of this rank, as many on every rank.
        decide
            Called on rank 0 with an array of shape (ranks, len(values)); returns the record, floats.
        """
        own = np.asarray(values, dtype=np.float64)
        table = np.empty((self.size, own.size)) if self.rank == 0 else None
        with self._collective("agree", own.nbytes):
            self._mpi.Gather(own, table, root=0)
        return self.decide(lambda: decide(np.asarray(table)))

    def sum_on_root(self, values: np.ndarray) -> np.ndarray | None:
        """Sum of float64 ``values`` over the ranks; None on all ranks but rank 0. Collective."""
        total = np.empty_like(values) if self.rank == 0 else None
        with self._collective("reduce", values.nbytes):
            self._mpi.Reduce(np.ascontiguousarray(values), total, op=MPI.SUM, root=0)
        return total

    def sum_of_part(self, values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """This rank's part of the sum of float64 ``values``, (count,), over the ranks, so many of each. Collective."""
        part = np.empty(counts[self.rank])
        with self._collective("reduce", values.nbytes):
            self._mpi.Reduce_scatter(values, part, counts, op=MPI.SUM)
        return part

    def decide(self, decide: Callable[[], Sequence[float]]) -> tuple[float, ...]:
        """What ``decide``, called on rank 0 alone, returns. Collective."""
        record = np.array(decide() if self.rank == 0 else (), dtype=np.float64)
        message = np.zeros(1 + SHORT)
        message[: 1 + len(record)] = [len(record), *record][: 1 + SHORT]
        with self._collective("decide", max(message.nbytes, 8 + record.nbytes) if self.rank == 0 else 0):
            self._mpi.Bcast(message)
            count = int(message[0])
            if count <= SHORT:
                record = message[1 : 1 + count]
            else:
                record = record if self.rank == 0 else np.empty(count)
                self._mpi.Bcast(record)
        return tuple(record.tolist())

    def collect(self, value: Any) -> list[Any]:
        """What each rank gives, a small object that can be pickled, in the order of ranks. Collective."""
        with self._collective("collect"):
            return self._mpi.allgather(value)

    def agree_on_text(self, text: str) -> str:
        """Rank 0's ``text``. Collective."""
        with self._collective("decide"):
            return self._mpi.bcast(text, root=0)

    def in_turn(self, value: Any) -> Iterator[Any]:
        """On rank 0 what each rank gives, in the order of ranks, one in memory at a time; to be used up. Collective."""
        what = "the ranks to give their parts in turn"
        if self.rank > 0:
            with WAITING.noted(what):
                self._mpi.send(value, 0, TURN)
            return
        yield value
        for rank in range(1, self.size):
            with WAITING.noted(what):
                given = self._mpi.recv(source=rank, tag=TURN)
            yield given

    @contextmanager
    def shared_errors(self) -> Iterator[None]:
        """Raise on every rank, after the block, if the block raised on any. Collective; no collective inside.

        Raises
        ------
        SharedInvalidInput
            With the message of the first rank that failed. An exception other than `apts_mpi.InvalidInput` is raised
            as it is where it happened.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed: list[int] = []
        if self.largest(error is not None)[0]:
            messages = self.collect(None if error is None else _describe(error))
            failed = [rank for rank, message in enumerate(messages) if message is not None]
        if error is not None and not isinstance(error, InvalidInput):
            raise error
        if failed:
            where = "" if len(failed) == self.size else f"rank {failed[0]}: "
            raise SharedInvalidInput(where + messages[failed[0]]) from error

    @contextmanager
    def shared_refusals(self) -> Iterator[None]:
        """Raise on every rank, after the block, if the block raised `apts_mpi.InvalidInput` on any. Collective.

        Any other exception goes out at once: other ranks may wait in a collective inside the block, where they learn
        nothing of it until the run is ended.

        Raises
        ------
        SharedInvalidInput
            See `shared_errors`.
        """
        refused: InvalidInput | None = None
        try:
            yield
        except InvalidInput as error:
            refused = error
        with self.shared_errors():
            if refused is not None:
                raise refused


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, InvalidInput) else f"{type(error).__name__}: {error}"
