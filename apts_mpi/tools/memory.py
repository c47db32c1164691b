"""How much memory this process has taken, and may still take."""

from __future__ import annotations

import functools
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from apts_mpi.tools.environment import free_memory_of_gpu, peak_memory_of_gpu

# Limits of a control group and what is used of them, in its second version and in the first.
GROUPS = (
    ("/sys/fs/cgroup{path}", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory{path}", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)

# Limits of a process, and what of its status counts.
LIMITS = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))

# Bytes by which two counts of the system's of the same memory differ, as threads tell theirs late.
INACCURACY = 2**22


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device: of a GPU those that are free, of the host what all limits leave."""
    if device.type == "cuda":
        return free_memory_of_gpu(device)
    return max(min(_left(), default=2**63 - 1), 0)


def peak_of(device: torch.device) -> Callable[[], int] | None:
    """What gives the most bytes that this process had on a device at a time, of the host in its memory; or None.

    The system tells it fast, but for a process that one with more memory has started: it counts that one's too.
    """
    if device.type == "cuda":
        return functools.partial(peak_memory_of_gpu, device)
    own = _kilobytes(Path("/proc/self/status")).get("VmHWM", 0)
    return _peak_of_host if _peak_of_host() <= own + INACCURACY else None


def _peak_of_host() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _left() -> Iterator[int]:
    """What the machine, the control groups of this process and its own limits leave, as far as they tell."""
    machine = _kilobytes(Path("/proc/meminfo"))
    if "MemAvailable" in machine:
        yield machine["MemAvailable"]
    status = _kilobytes(Path("/proc/self/status"))
    for limit, used in LIMITS:
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY and used in status:
            yield soft - status[used]
    for line in _lines(Path("/proc/self/cgroup")):
        path = line.split(":", 2)[-1].rstrip("/")
        for directory, limit_of_group, used in GROUPS:
            yield from _of_groups(Path(directory.format(path=path)), limit_of_group, used)


def _of_groups(directory: Path, limit: str, used: str) -> Iterator[int]:
    """What a control group and those around it leave."""
    for group in (directory, *directory.parents):
        numbers = [_number(group / name) for name in (limit, used)]
        if numbers[0] is not None and numbers[1] is not None:
            # Files that the system has in memory for speed go when it is needed.
            cached = _pairs(group / "memory.stat").get("inactive_file", 0)
            yield numbers[0] - numbers[1] + cached


def _number(path: Path) -> int | None:
    """The number in a file; None without a file, and for the word that stands for none."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _pairs(path: Path) -> dict[str, int]:
    pairs = (line.split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _kilobytes(path: Path) -> dict[str, int]:
    """Names and amounts in a file of lines such as ``VmSize:  1024 kB``, in bytes."""
    words = (line.split() for line in _lines(path))
    return {word[0].rstrip(":"): int(word[1]) * 1024 for word in words if len(word) == 3 and word[2] == "kB"}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
