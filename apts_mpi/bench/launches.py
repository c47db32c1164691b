"""What an iteration asks of its device: operations, the kernels that they launch, and how long those take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from apts_mpi.parallel.timing import Timing
from apts_mpi.parallel.transport import wait_for_device
from apts_mpi.tools.command import FILE_WIDTH

# How torch calls what it hands to a device that is no kernel.
COPIES = ("Memcpy", "Memset")

OPERATOR = "aten::"


@dataclass(frozen=True)
class Launches:
    """Of an iteration.

    Attributes
    ----------
    operations
        Of torch, called by Python or by its backward passes; those that an operation calls itself do not count.
    kernels, copies
        That a GPU was given; none on a CPU.
    kernel_seconds
        Their time on the GPU, one after the other.
    """

    operations: float
    kernels: float
    copies: float
    kernel_seconds: float


def launches_of(call: Callable[[], None], calls: int, device: torch.device) -> Launches:
    """Count those of a call, as the mean over a few. What runs first is not to be among them: call it before."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for _ in range(calls):
            call()
        wait_for_device(device)
    return counted(profiler.events(), calls)


def counted(events: Iterable, calls: int) -> Launches:
    """The mean a call of what a profiler has seen in all of them."""
    operations = kernels = copies = 0
    microseconds = 0.0
    for event in events:
        if event.device_type == DeviceType.CPU:
            within = event.cpu_parent is not None and event.cpu_parent.name.startswith(OPERATOR)
            operations += event.name.startswith(OPERATOR) and not within
        elif not event.is_user_annotation:
            is_copy = event.name.startswith(COPIES)
            copies, kernels = copies + is_copy, kernels + (not is_copy)
            microseconds += event.time_range.elapsed_us()
    return Launches(operations / calls, kernels / calls, copies / calls, 1e-6 * microseconds / calls)


def as_json(found: dict[str, tuple[Timing, Launches]]) -> list[dict[str, object]]:
    """A mapping a kind of iteration; seconds are those of a clock, without the profiler."""
    return [
        {"iteration": name, "seconds": timing.median, "quartiles": [timing.low, timing.high], **asdict(launches)}
        for name, (timing, launches) in found.items()
    ]


def print_launches(found: dict[str, tuple[Timing, Launches]], device: torch.device) -> None:
    """A line a kind of iteration."""
    table = Table(title=f"an iteration on {device}")
    for heading in (
        "iteration",
        "milliseconds",
        "operations",
        "kernels",
        "copies",
        "ms of kernels",
        "share of the time",
    ):
        table.add_column(heading, justify="left" if heading == "iteration" else "right")
    for name, (timing, launches) in found.items():
        counts = (f"{count:.0f}" for count in (launches.operations, launches.kernels, launches.copies))
        share = f"{launches.kernel_seconds / timing.median:.0%}" if launches.kernels else ""
        kernels = f"{1e3 * launches.kernel_seconds:.2f}" if launches.kernels else ""
        table.add_row(name, f"{1e3 * timing.median:.2f}", *counts, kernels, share)
    Console(width=max(Console().width, FILE_WIDTH)).print(table)
