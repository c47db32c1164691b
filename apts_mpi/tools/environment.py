"""The one place where the library reads the clock, the process environment and the random state."""

from __future__ import annotations

import os
import platform
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

# What launchers tell each process about the size of its job and its number in it (Hydra and others, Open MPI, Slurm).
LAUNCHER_VARIABLES = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)

# And about its number among those on its host.
LOCAL_VARIABLES = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")

# Beginnings of the variables by which launchers and batch systems tell a process its place in a job.
JOB_VARIABLES = (
    "PMI_",
    "PMIX_",
    "OMPI_COMM_WORLD_",
    "OMPI_UNIVERSE_",
    "HYDI_",
    "HYDRA_",
    "MPI_LOCAL",
    "SLURM_",
    "APTS_MPI_",
)

# What a batch job of ``jobs/`` tells its ranks.
JOB_RANKS, JOB_LAUNCHER = "APTS_MPI_RANKS", "APTS_MPI_LAUNCHER"

_STARTED = time.perf_counter()


def since_start() -> float:
    """Seconds since this module was imported, a few seconds after the process started."""
    return time.perf_counter() - _STARTED


def versions() -> dict[str, str]:
    """Versions of what a result depends on, by name."""
    found = {"python": platform.python_version()}
    for name in ("apts_mpi", "torch", "numpy", "mpi4py", "h5py"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"  # used from its source tree
    return found


def uncompiled() -> AbstractContextManager[Any]:
    """In the block what ``torch.compile`` has compiled runs as it was written."""
    # Where its module was not imported nothing is compiled, and to import it takes seconds.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def seconds() -> float:
    """Seconds on a monotonic clock."""
    return time.perf_counter()


def cpu_seconds() -> float:
    """Seconds that processors have worked for this process, all its threads together."""
    return time.process_time()


def wall_time() -> float:
    """Seconds since 1970, of a clock that may be set."""
    return time.time()


def pause(duration: float) -> None:
    """Sleep for ``duration`` seconds."""
    time.sleep(duration)


def end_after(duration: float) -> None:
    """Have the system end this process after ``duration`` seconds, whatever it does then."""
    signal.setitimer(signal.ITIMER_REAL, duration)


def timestamp() -> str:
    """Local date and time as ``20260131-235959``, for names of run directories."""
    return time.strftime("%Y%m%d-%H%M%S")


def has_gpu_driver() -> bool:
    """Whether NVIDIA's driver is loaded here, be torch able to use it or not."""
    return Path("/dev/nvidiactl").exists()


def launcher() -> tuple[int, int] | None:
    """Number of processes that the launcher says it started and the number of this one; None without a launcher."""
    for size, rank in LAUNCHER_VARIABLES:
        if os.environ.get(size, "").isdigit() and os.environ.get(rank, "").isdigit():
            return int(os.environ[size]), int(os.environ[rank])
    return None


def job() -> tuple[int, str] | None:
    """Number of ranks of a batch job of ``jobs/``, and the launcher that it calls; None outside of one."""
    ranks, words = os.environ.get(JOB_RANKS, ""), os.environ.get(JOB_LAUNCHER, "")
    return (int(ranks), words) if ranks.isdigit() else None


def is_first_on_host() -> bool:
    """Whether the launcher numbers this process first among those on its host; also without a launcher."""
    numbers = [os.environ[name] for name in LOCAL_VARIABLES if name in os.environ]
    return not numbers or numbers[0] == "0"


def outside_job() -> dict[str, str]:
    """The environment variables without what a launcher told this process, for a job to be started from here."""
    return {name: value for name, value in os.environ.items() if not name.startswith(JOB_VARIABLES)}


def of_one_thread() -> dict[str, str]:
    """The environment variables, with one thread for computations where they do not say how many."""
    return {"OMP_NUM_THREADS": "1"} | dict(os.environ)


def switched_on(names: Iterable[str]) -> list[str]:
    """Those of the environment variables that are set, and not to nothing, 0 or no."""
    off = ("", "0", "no", "off", "false", "disable")
    return [name for name in names if os.environ.get(name, "").lower() not in off]


def host() -> str:
    """Name of this host."""
    return platform.node()


def cores() -> tuple[int, ...]:
    """Numbers of the cores that this process may use."""
    return tuple(sorted(os.sched_getaffinity(0)))


def process() -> str:
    """This process and its host, in words."""
    return f"process {os.getpid()} on {platform.node()}"


def free_port() -> int:
    """A TCP port of this host that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def random_state(device: torch.device) -> torch.Tensor:
    """Copy of torch's random state on ``device``, as bytes."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state()


def set_random_state(state: torch.Tensor, device: torch.device) -> None:
    """Set torch's random state on ``device``."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def free_memory_of_gpu(device: torch.device) -> int:
    """Bytes of a GPU that nobody has, or that torch keeps for this process."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def peak_memory_of_gpu(device: torch.device) -> int:
    """Bytes of a GPU that torch had for tensors of this process at a time, at most so far."""
    return torch.cuda.max_memory_allocated(device)


@contextmanager
def preserved_random_state(device: torch.device) -> Iterator[None]:
    """Leave torch's random state on ``device`` after the block as it was before."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


@contextmanager
def kept_generators(device: torch.device) -> Iterator[Callable[[], bool]]:
    """Leave the random states that `seed_stream` does not set after the block as before: Python's, numpy's, another's.

    Gives a function that says whether one of them has moved since.
    """

    def states() -> tuple[Any, ...]:
        host = torch.get_rng_state() if device.type == "cuda" else torch.empty(0)
        return random.getstate(), np.random.get_state(), host  # noqa: NPY002 - what users may draw from

    def in_words(python: Any, numpy: Any, host: torch.Tensor) -> tuple[Any, ...]:
        kind, keys, *rest = numpy
        return python, kind, keys.tobytes(), rest, host.tolist()

    before = states()
    try:
        yield lambda: in_words(*states()) != in_words(*before)
    finally:
        python, numpy, host = before
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        if host.numel():
            torch.set_rng_state(host)


def seed_stream(device: torch.device, *key: int) -> None:
    """Seed torch on ``device`` from a tuple of integers; equal keys give equal random numbers."""
    seed = _seed_of(key)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def kept_draws() -> Iterator[None]:
    """Leave the random states of torch on the host, numpy and Python after the block as they were before."""
    cpu = torch.device("cpu")
    with preserved_random_state(cpu), kept_generators(cpu):
        yield


def seed_draws(*key: int) -> None:
    """Seed torch on the host, numpy and Python from a tuple of integers; see `seed_stream`."""
    seed = _seed_of(key)
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what users draw from
    random.seed(seed)


def _seed_of(key: tuple[int, ...]) -> int:
    seed = 0
    for part in key:
        # A 64-bit multiplicative hash (Knuth); neighbouring keys must not give neighbouring seeds.
        seed = ((seed ^ (part + 0x9E3779B97F4A7C15)) * 0xD1342543DE82EF95) % 2**63
    return seed
