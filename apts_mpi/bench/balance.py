"""Local solves of the slowest rank beside the mean of all: cuts by numbers of parameters, and cuts that move."""

from __future__ import annotations

from collections.abc import Sequence
from unittest import mock

import numpy as np
import torch
from mpi4py import MPI
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.functional import cross_entropy

from apts_mpi.apts import APTS
from apts_mpi.options import APTSOptions, CoarseOptions, LocalOptions, PartitionName, SchwarzOptions
from apts_mpi.tools import events
from apts_mpi.tools.environment import cpu_seconds

# Layers, of as many parameters each: wide on one side, whose curvature costs more, and square ones.
BOTTLENECKS, SQUARES, WIDE, NARROW, WIDTH = 12, 12, 1024, 64, 256
SAMPLES, CLASSES = 128, 10

# Iterations between looks, and in all but the first looks, which are timed.
EVERY, LOOKS = 5, 3

PARTITIONS: tuple[PartitionName, ...] = ("layer", "adaptive", "adaptive-timed")


def network() -> nn.Sequential:
    """A network whose layers have as many parameters and curvature of other sizes, the same on every call."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(BOTTLENECKS // 2):
        layers += [nn.Linear(NARROW, WIDE), nn.Tanh(), nn.Linear(WIDE, NARROW), nn.Tanh()]
    layers += [nn.Linear(NARROW, WIDTH), nn.Tanh()]
    for _ in range(SQUARES):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random samples, whose labels a network of two layers has given."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, NARROW, generator=generator)
    teacher = torch.randn(NARROW, CLASSES, generator=generator)
    return inputs, (inputs.tanh() @ teacher).argmax(dim=1)


def solver(partition: PartitionName) -> APTS:
    """One subdomain a rank, cut so."""
    schwarz = SchwarzOptions(partition=partition, repartition_every=EVERY)
    options = APTSOptions(
        subdomains=MPI.COMM_WORLD.size,
        schwarz=schwarz,
        local=LocalOptions(solver="kfac"),
        coarse=CoarseOptions(model="none"),
    )
    return APTS(network(), cross_entropy, comm=MPI.COMM_WORLD, options=options)


def balance(rounds: int) -> None:
    """Time local solves with each partition, in turn on the same batch, and print the slowest rank's. Collective.

    Seconds are those of the processor without waiting, which other programs do not lengthen.
    """
    given = batch()
    with mock.patch.object(events, "seconds", cpu_seconds):
        solvers = [solver(partition) for partition in PARTITIONS]
        taken = np.zeros((len(solvers), rounds))
        for number in range(LOOKS + rounds):
            for row, each in zip(taken, solvers, strict=True):
                before = each.holding.schwarz.solving.seconds
                for _ in range(EVERY):
                    each.step(given)
                if number >= LOOKS:
                    row[number - LOOKS] = each.holding.schwarz.solving.seconds - before
    found = MPI.COMM_WORLD.gather(taken)
    if found is not None:
        _print_table(solvers, np.stack(found))


def _print_table(solvers: Sequence[APTS], seconds: np.ndarray) -> None:
    """``seconds`` are those of each rank, partition and round."""
    starts = [layer.start for layer in solvers[0].holding.decomposition.layers]
    ratios = seconds.max(axis=0) / seconds.mean(axis=0)
    table = Table(title=f"local solves of {EVERY} iterations, {len(seconds)} ranks")
    for column in ("partition", "begin at layers", "slowest / mean", "quartiles", "slowest, ms"):
        table.add_column(column, justify="left" if column.startswith(("part", "begin")) else "right")
    for index, (partition, each) in enumerate(zip(PARTITIONS, solvers, strict=True)):
        parts = each.holding.decomposition.subdomains
        places = ", ".join(str(starts.index(part.owned_start)) for part in parts)
        low, middle, high = np.quantile(ratios[index], (0.25, 0.5, 0.75))
        slowest = 1e3 * np.median(seconds[:, index].max(axis=0))
        table.add_row(partition, places, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", f"{slowest:.0f}")
    Console().print(table)
