"""Schedules of a pipeline as data: the order in which a stage works on its micro-batches. No communication.

Every schedule goes through the micro-batches in the same order forwards and backwards, so that a stage's gradient is
summed in the same order by all of them: they differ in memory and waiting, not in a bit of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Action:
    """A stage's work on one micro-batch: its forward or its backward pass."""

    direction: Direction
    micro_batch: int


def forwards(micro_batches: int) -> list[Action]:
    """Forward passes alone, for a loss without its gradient."""
    return [Action("forward", index) for index in range(micro_batches)]


def backwards(micro_batches: int) -> list[Action]:
    """The backward passes that are left after `forwards`."""
    return [Action("backward", index) for index in range(micro_batches)]


def gpipe(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """Fill and drain: all forward passes, then all backward passes (Huang et al., arXiv 1811.06965).

    A stage keeps the graphs of all micro-batches.
    """
    return forwards(micro_batches) + backwards(micro_batches)


def one_forward_one_backward(stage: int, stages: int, micro_batches: int) -> list[Action]:
    """One forward pass, one backward pass in turn, after as many forward passes as fill the stages behind (1F1B).

    A stage keeps the graphs of as many micro-batches as there are stages from it to the last, at most (Narayanan et
    al., arXiv 1806.03377, with the flush of arXiv 2104.04473).
    """
    ahead = min(stages - 1 - stage, micro_batches)
    actions = forwards(ahead)
    for index in range(micro_batches - ahead):
        actions += [Action("forward", ahead + index), Action("backward", index)]
    return actions + backwards(micro_batches)[micro_batches - ahead :]


SCHEDULES: dict[str, Callable[[int, int, int], list[Action]]] = {"gpipe": gpipe, "1f1b": one_forward_one_backward}


def ideal_bubble(stages: int, micro_batches: int) -> float:
    """Share of the time in which a stage waits when all passes take equally long, of either schedule."""
    return (stages - 1) / (micro_batches + stages - 1)


def most_in_flight(actions: Sequence[Action]) -> int:
    """Most micro-batches whose forward pass is done and whose backward pass is not."""
    most = running = 0
    for action in actions:
        running += 1 if action.direction == "forward" else -1
        most = max(most, running)
    return most
