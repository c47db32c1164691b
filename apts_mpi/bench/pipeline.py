"""What a pipeline costs in time, beside one rank and beside torch's own pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.distributed import pipelining
from torch.nn.functional import cross_entropy

from apts_mpi.bench.staged_networks import batch, network, options
from apts_mpi.options import APTSOptions, CoarseOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.timing import time_in_turn, wait_for_all
from apts_mpi.staged.schedules import SCHEDULES, ideal_bubble
from apts_mpi.staged.solver import StagedAPTS
from apts_mpi.tools.command import FILE_WIDTH
from apts_mpi.tools.environment import free_port
from apts_mpi.tools.events import Event, Events


def pipeline(layers: int, width: int, samples: int, micro_batches: int, repetitions: int) -> None:
    """Print times of gradient evaluations: on one rank, of both schedules, and of torch's pipeline. Collective."""
    world = MPI.COMM_WORLD
    data = batch(samples, width)
    staged = {name: _Evaluation(world, layers, width, micro_batches, name, data) for name in SCHEDULES}
    wait = functools.partial(wait_for_all, world, 0.0005)
    with torch_processes(world):
        calls = {
            "one rank, whole batch": _on_rank_0(world, lambda: _whole_batch(layers, width, data)),
            "one rank, micro-batches": _on_rank_0(
                world, lambda: _Evaluation(MPI.COMM_SELF, layers, width, micro_batches, "gpipe", data)
            ),
            **{f"staged, {name}": evaluation for name, evaluation in staged.items()},
            **{
                f"torch {name}, gloo": _torch_step(name, world, network(layers, width), micro_batches, data)
                for name in ("ScheduleGPipe", "Schedule1F1B")
            },
        }
        timings = time_in_turn(list(calls.values()), repetitions, between=wait)
    seconds = {name: world.allreduce(timing.median, MPI.MAX) for name, timing in zip(calls, timings, strict=True)}
    bubbles = {f"staged, {name}": world.allreduce(staged[name].bubble(), MPI.MIN) for name in SCHEDULES}
    local = _local_seconds(world, layers, width, micro_batches, data, repetitions)
    if world.rank == 0:
        _print_times(world.size, micro_batches, seconds, bubbles, (layers, width, samples), local)


def _on_rank_0(world: MPI.Intracomm, make: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    """What ``make`` makes, on rank 0; on the others nothing, so that they wait."""
    return make() if world.rank == 0 else lambda: None


def _whole_batch(layers: int, width: int, data: tuple[torch.Tensor, torch.Tensor]) -> Callable[[], None]:
    """A plain forward and backward pass."""
    whole = network(layers, width)

    def evaluate() -> None:
        whole.zero_grad()
        cross_entropy(whole(data[0]), data[1]).backward()

    return evaluate


def _print_times(
    ranks: int,
    micro_batches: int,
    seconds: dict[str, float],
    bubbles: dict[str, float],
    sizes: tuple[int, int, int],
    local: tuple[float, float],
) -> None:
    layers, width, samples = sizes
    table = Table(
        title=f"{layers} layers of {width}x{width}, {samples} samples, {ranks} stages, {micro_batches} micro-batches, "
        f"{torch.get_num_threads()} thread(s) a rank"
    )
    columns = (
        "gradient evaluation",
        "milliseconds",
        "of whole batch",
        "of micro-batches",
        "ideal",
        "bubble",
        "its ideal",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    share = f"{(micro_batches + ranks - 1) / (micro_batches * ranks):.3f}"
    ideal_of_bubble = f"{ideal_bubble(ranks, micro_batches):.3f}"
    for name, taken in seconds.items():
        ratios = [f"{taken / seconds[beside]:.3f}" for beside in list(seconds)[:2]]
        bubble = [f"{bubbles[name]:.3f}", ideal_of_bubble] if name in bubbles else ["", ""]
        table.add_row(name, f"{1e3 * taken:.2f}", *ratios, "" if name.startswith("one") else share, *bubble)
    one, staged = local
    table.add_row("local iterations, one rank", f"{1e3 * one:.2f}", "", "", "", "", "")
    table.add_row(
        "local iterations, staged", f"{1e3 * staged:.2f}", "", f"{staged / one:.3f}", f"{1 / ranks:.3f}", "", ""
    )
    Console(width=max(Console().width, FILE_WIDTH)).print(table)


class _Evaluation:
    """Gradient evaluations of a staged solver on one batch."""

    def __init__(
        self, comm: MPI.Intracomm, layers: int, width: int, micro_batches: int, schedule: str, data: tuple
    ) -> None:
        chosen = options("staged", layers, "sgd", micro_batches=micro_batches, schedule=schedule)
        chosen = _without_coarse_level(chosen)
        self._solver = StagedAPTS(network(layers, width), cross_entropy, comm=comm, options=chosen)
        self._solver.step(data)  # takes the batch
        self._start()

    def _start(self) -> None:
        self._before = replace(self._event)

    @property
    def _event(self) -> Event:
        return self._solver.events.totals["global evaluation"]

    def __call__(self) -> None:
        with self._solver.events.timed("global evaluation"):
            self._solver.evaluate()

    def bubble(self) -> float:
        """Share of the time in which this rank waited."""
        event, before = self._event, self._before
        return 1.0 - (event.own_seconds - before.own_seconds) / (event.seconds - before.seconds)


def _without_coarse_level(chosen: APTSOptions) -> APTSOptions:
    return replace(chosen, coarse=CoarseOptions(model="none"))


def _local_seconds(
    world: MPI.Intracomm, layers: int, width: int, micro_batches: int, data: tuple, repetitions: int
) -> tuple[float, float]:
    """Seconds of the local solves of an iteration: on one rank that has all stages, and on the slowest of all ranks."""
    found = []
    for comm in (MPI.COMM_SELF, world):
        chosen = _without_coarse_level(options("staged", layers, "tr", micro_batches=micro_batches))
        if comm is world or world.rank == 0:
            solver = StagedAPTS(network(layers, width), cross_entropy, comm=comm, options=chosen)
            for _ in range(repetitions):
                solver.step(data)
            found.append(solver.events.totals["local solves"].seconds / repetitions)
        else:
            found.append(0.0)
        wait_for_all(world, 0.0005)
    return world.allreduce(found[0], MPI.MAX), world.allreduce(found[1], MPI.MAX)


@contextmanager
def torch_processes(world: MPI.Intracomm) -> Iterator[None]:
    """torch's own process group of the same ranks, by gloo."""
    port = world.bcast(free_port() if world.rank == 0 else None)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=world.rank, world_size=world.size
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _torch_step(
    name: str, world: MPI.Intracomm, whole: nn.Sequential, micro_batches: int, data: tuple[torch.Tensor, torch.Tensor]
) -> Callable[[], None]:
    """The same step through ``torch.distributed.pipelining``, with the same stages."""
    comm = Communicator(world, Events())
    size = len(whole) // world.size
    module = whole[comm.rank * size : (comm.rank + 1) * size]
    stage = pipelining.PipelineStage(module, comm.rank, world.size, torch.device("cpu"))
    schedule = getattr(pipelining, name)(stage, micro_batches, loss_fn=cross_entropy)
    first, last = comm.rank == 0, comm.rank == world.size - 1

    def step() -> None:
        module.zero_grad()
        schedule.step(*([data[0]] if first else []), **({"target": data[1], "losses": []} if last else {}))

    return step
