"""Stages that work on micro-batches at the same time: activations go forwards from rank to rank, gradients back."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from apts_mpi.errors import InvalidInput, StageError, StallError
from apts_mpi.network.activations import Bundle, detached
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.nonblocking import Pending
from apts_mpi.parallel.transport import Bytes
from apts_mpi.staged.schedules import Action, Direction
from apts_mpi.tools.trees import tensors_of

TAGS: dict[Direction, int] = {"forward": 1, "backward": 2}
DESCRIPTION = 3

# Receives that are posted before they are needed, in actions of the schedule.
AHEAD = 2


@dataclass(frozen=True)
class Description:
    """Shapes and dtypes of the tensors of a bundle, and whether it is a tuple."""

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    is_tuple: bool

    @staticmethod
    def of(bundle: Bundle) -> Description:
        """The description of a bundle."""
        tensors = tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors_of(bundle))
        return Description(tensors, not isinstance(bundle, torch.Tensor))

    def gradients(self) -> Description:
        """What comes back for it: a gradient for each tensor that can have one."""
        return Description(
            tuple(part for part in self.tensors if part[1].is_floating_point or part[1].is_complex), self.is_tuple
        )


class _Receive:
    """A bundle on its way to this rank."""

    def __init__(self, comm: Communicator, description: Description, rank: int, tag: int, device: torch.device) -> None:
        self._is_tuple = description.is_tuple
        self._tensors = tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in description.tensors)
        self.pending = comm.pending()
        for tensor in self._tensors:
            comm.start_receive(self.pending, Bytes(tensor), rank, tag)

    def wait(self, what: str) -> Bundle:
        self.pending.wait(what)
        return self._tensors if self._is_tuple else self._tensors[0]


def _check_sendable(bundle: Bundle | None) -> None:
    """Raise `InvalidInput` for what cannot leave a stage."""
    parts = bundle if isinstance(bundle, tuple | list) else (bundle,)
    for part in parts:
        if not isinstance(part, torch.Tensor):
            raise InvalidInput(
                f"a {type(part).__name__} leaves the stage, and only tensors and tuples of them can; let the module "
                "before the cut return these, or cut elsewhere with --cuts"
            )


class Pipeline:
    """The stages of one replica, in the order of their ranks.

    Shapes are agreed once for each ``key``: the first bundle of a key is preceded by its description.

    Parameters
    ----------
    comm
        The ranks, one a stage.
    names
        Names of the stages, for messages.
    device
        Where this rank's tensors are.
    """

    def __init__(self, comm: Communicator, names: Sequence[str], device: torch.device) -> None:
        self.comm = comm
        self._names = names
        self._device = device
        self._events = comm.events
        self.stage, self.stages = comm.rank, comm.size
        self._entering: dict[Hashable, Description] = {}
        self._leaving: dict[Hashable, Description] = {}
        self._describe_back = False
        self._returning: dict[Hashable, Description] = {}
        self._returned: set[Hashable] = set()
        self._sends: list[tuple[Pending, Bundle]] = []
        self._receives: dict[Action, _Receive] = {}

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage."""
        return self.stage == self.stages - 1

    def run(
        self,
        actions: Sequence[Action],
        keys: Sequence[Hashable],
        forward: Callable[[int, Bundle | None], Bundle | None],
        backward: Callable[[int, Bundle | None], Bundle | None] | None = None,
        describe_back: bool = False,
    ) -> None:
        """Do the actions of a schedule. Collective over the stages.

        Parameters
        ----------
        actions
            This stage's part of the schedule.
        keys
            For each micro-batch, what the shapes of its activations depend on; equal on all stages.
        forward
            Called with the number of a micro-batch and what entered (None on the first stage); returns what leaves
            (ignored on the last).
        backward
            Called with the number of a micro-batch and the gradients of the differentiable tensors that left (None on
            the last stage); returns those of the differentiable tensors that entered (ignored on the first).
        describe_back
            Whether what goes back has other shapes than what went forwards; equal for equal keys.

        Raises
        ------
        StageError
            If ``forward`` or ``backward`` raises, naming the stage.
        StallError
            If a neighbour is not heard of in time.
        """
        self._describe_back = describe_back
        for number, action in enumerate(actions):
            self._post_ahead(actions[number : number + 1 + AHEAD], keys)
            arrived = self._arrived(action, keys)
            passed = forward if action.direction == "forward" else backward
            assert passed is not None
            try:
                with self._events.traced(f"{action.direction} {action.micro_batch}"):
                    result = passed(action.micro_batch, arrived)
                    if action.direction == "forward" and not self.is_last:
                        _check_sendable(result)
            except StallError:
                raise
            except Exception as error:
                raise StageError(
                    f"{self._names[self.stage]} failed in the {action.direction} pass of micro-batch "
                    f"{action.micro_batch}: {type(error).__name__}: {error}"
                ) from error
            if action.direction == "forward" and not self.is_last:
                self._send_forward(result, keys[action.micro_batch])
            elif action.direction == "backward" and not self.is_first:
                self._send_backward(result, keys[action.micro_batch])
        for pending, _ in self._sends:
            pending.wait("a neighbour to take in what was sent")
        self._sends.clear()

    def progress(self) -> None:
        """Give the MPI library time to move data, as most move nothing outside of a call, and give a sign of life."""
        if self.comm.patience is not None:
            self.comm.patience.sign()
        self._sends = [(pending, tensors) for pending, tensors in self._sends if not pending.progress()]
        for receive in self._receives.values():
            receive.pending.progress()

    def _source(self, direction: Direction) -> int | None:
        """The stage from which a pass in this direction gets something."""
        if direction == "forward":
            return None if self.is_first else self.stage - 1
        return None if self.is_last else self.stage + 1

    def _post_ahead(self, actions: Sequence[Action], keys: Sequence[Hashable]) -> None:
        """Post receives in their order, as MPI matches them, up to the first whose shapes are not known yet."""
        unknown = set()
        for action in actions:
            if action.direction not in unknown and not self._post(action, keys):
                unknown.add(action.direction)

    def _post(self, action: Action, keys: Sequence[Hashable]) -> bool:
        """Post the receive of an action; false if its shapes are not known yet."""
        source, key = self._source(action.direction), keys[action.micro_batch]
        if source is None or action in self._receives:
            return True
        description = self._described(action.direction).get(key)
        if description is None:
            return False
        self._receives[action] = _Receive(self.comm, description, source, TAGS[action.direction], self._device)
        return True

    def _arrived(self, action: Action, keys: Sequence[Hashable]) -> Bundle | None:
        source, key = self._source(action.direction), keys[action.micro_batch]
        if source is None:
            return None
        if action not in self._receives:
            self._described(action.direction)[key] = self.comm.receive_object(source, DESCRIPTION)
            self._post(action, keys)
        content = "activations" if action.direction == "forward" else "output gradients"
        what = f"the {content} of micro-batch {action.micro_batch} from {self._names[source]}"
        return self._receives.pop(action).wait(what)

    def _described(self, direction: Direction) -> dict[Hashable, Description]:
        """What is known of the bundles that come to this rank."""
        return self._entering if direction == "forward" else self._returning

    def _send_forward(self, bundle: Bundle | None, key: Hashable) -> None:
        assert bundle is not None
        if key not in self._leaving:
            self._leaving[key] = Description.of(bundle)
            self.comm.send_object(self._leaving[key], self.stage + 1, DESCRIPTION)
            if not self._describe_back:
                self._returning[key] = self._leaving[key].gradients()
        self._send(detached(bundle), self.stage + 1, TAGS["forward"])

    def _send_backward(self, bundle: Bundle | None, key: Hashable) -> None:
        assert bundle is not None
        if self._describe_back and key not in self._returned:
            self._returned.add(key)
            self.comm.send_object(Description.of(bundle), self.stage - 1, DESCRIPTION)
        self._send(bundle, self.stage - 1, TAGS["backward"])

    def _send(self, bundle: Bundle | None, rank: int, tag: int) -> None:
        assert bundle is not None
        # What is contiguous is not copied: nobody may write to it until it is sent.
        tensors = tuple(tensor.contiguous() for tensor in tensors_of(bundle))
        pending = self.comm.pending()
        for tensor in tensors:
            self.comm.start_send(pending, Bytes(tensor), rank, tag)
        self._sends.append((pending, tensors))
