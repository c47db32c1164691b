"""What a stage costs in memory, beside a rank that holds the whole network."""

from __future__ import annotations

import functools
import gc

import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from apts_mpi.apts import APTS
from apts_mpi.bench.staged_networks import batch, network, options
from apts_mpi.staged.build import build_stage
from apts_mpi.staged.solver import StagedAPTS
from apts_mpi.tools.command import FILE_WIDTH

MEBIBYTE = 2**20


def tensor_bytes() -> int:
    """Bytes of all tensors of this process, each memory once."""
    gc.collect()
    # Not isinstance: some of torch's objects warn when they are asked for their class.
    found = [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor) and not value.is_meta]
    memories = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in found}
    return sum(memories.values())


def memory(layers: int, width: int) -> None:
    """Print the bytes of parameters, gradients and solver state of the busiest rank in both layouts. Collective."""
    world = MPI.COMM_WORLD
    table = Table(title=f"MiB on the busiest of {world.size} ranks, {layers} layers of {width}x{width}")
    for column in ("local solver", "what", "one rank", "replicated", "staged", "of one rank", "of replicated"):
        table.add_column(column, justify="left" if column in ("local solver", "what") else "right")
    for solver in ("sgd", "adam", "kfac"):
        rows = zip(
            *[_memory_of(kind, solver, layers, width, world) for kind in ("one rank", "replicated", "staged")],
            strict=True,
        )
        for what, (one, replicated, staged) in zip(("parameters", "gradients", "state", "sum"), rows, strict=True):
            numbers = [f"{value / MEBIBYTE:.2f}" for value in (one, replicated, staged)]
            table.add_row(solver, what, *numbers, f"{staged / one:.4f}", f"{staged / replicated:.4f}")
    if world.rank == 0:
        Console(width=max(Console().width, FILE_WIDTH)).print(table)


def _memory_of(kind: str, solver: str, layers: int, width: int, world: MPI.Intracomm) -> list[int]:
    """Largest bytes of a rank: parameters, gradients, the rest, and their sum."""
    own = [0, 0, 0, 0]
    if kind != "one rank" or world.rank == 0:
        data = batch(8 * layers, width)
        before = tensor_bytes()
        comm = MPI.COMM_SELF if kind == "one rank" else world
        made: APTS
        if kind == "staged":
            chosen = options("staged", layers, solver)
            stage = build_stage(
                functools.partial(network, layers, width), comm=comm, options=chosen, parts=lambda made: (made, None)
            )
            made = StagedAPTS(stage, cross_entropy, comm=comm, options=chosen)
        else:
            made = APTS(network(layers, width), cross_entropy, comm=comm, options=options("replicated", layers, solver))
        while not made.step(data).accepted:
            pass
        total = tensor_bytes() - before
        objective = made.holding.objective
        size = objective.vector.values.nbytes
        gradients = objective.vector.gradients.nbytes + objective.reduction.total.nbytes
        own = [size, gradients, total - size - gradients, total]
    return [world.allreduce(value, MPI.MAX) for value in own]
