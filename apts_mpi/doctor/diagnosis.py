"""What was found on a machine, judged: one row a check. Pure functions, no MPI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

Status = Literal["ok", "warn", "fail"]

# From the best to the worst.
STATUSES: tuple[Status, ...] = ("ok", "warn", "fail")

# Environment variable that lets a library move data outside of its calls, by a word of its name; Open MPI has none
# (open-mpi/ompi#13088). Cray's and Intel's libraries come from MPICH and may name it, so they are looked for first.
ASYNCHRONOUS_PROGRESS = {
    "cray": "MPICH_ASYNC_PROGRESS",
    "intel": "I_MPI_ASYNC_PROGRESS",
    "mpich": "MPIR_CVAR_ASYNC_PROGRESS",
}

# Share of the shorter of communication and computation that should be hidden behind the other.
ENOUGH_OVERLAP = 0.5


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes
    ----------
    check
        What was looked at.
    status
        ``ok``, ``warn``: it works, but slowly or less safely; ``fail``: runs will fail or be wrong.
    found
        What was found, in words.
    remedy
        What to do about it; empty where there is nothing to do.
    values
        The same as data, for ``--json``.
    """

    check: str
    status: Status
    found: str
    remedy: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RankFacts:
    """What a rank knows of its place.

    Attributes
    ----------
    host
        Name.
    cores
        Numbers of the cores that it may use.
    threads
        Compute threads of torch.
    device
        ``cpu`` or such as ``cuda:0``.
    device_identity
        What tells a GPU from all others of the host; empty on a CPU.
    versions
        Of Python, the package and the libraries.
    has_driver
        Whether the host has NVIDIA's driver.
    """

    host: str
    cores: tuple[int, ...]
    threads: int
    device: str
    device_identity: str
    versions: Mapping[str, str]
    has_driver: bool = False


def worst(rows: Sequence[Finding]) -> Status:
    """The status of all together."""
    return max((row.status for row in rows), key=STATUSES.index)


def judge_launcher(mismatch: str, library: str, launcher: str, said: str, ranks: int) -> Finding:
    """Launcher and library of the same MPI?

    Parameters
    ----------
    mismatch
        What is wrong with the processes that are there, from `apts_mpi.parallel.launcher.launcher_mismatch`; empty if
        nothing.
    library
        What the library says of itself.
    launcher, said
        Path of the ``mpirun`` that would be called, and what it says of itself; empty without one.
    ranks
        Processes that reach each other.
    """
    values = {"library": library, "launcher": launcher}
    if mismatch:
        found, _, remedy = mismatch.partition("; ")
        return Finding("launcher", "fail", found, remedy, values)
    found = f"{library}; {launcher or 'no mpirun in PATH'}"
    if ranks > 1:
        return Finding("launcher", "ok", f"{library}: {ranks} ranks reach each other", "", values)
    if not launcher:
        return Finding("launcher", "warn", found, "put the mpirun of this library in PATH, or use srun", values)
    families = family_of_library(library), family_of_launcher(said)
    if "" in families:
        return Finding(
            "launcher", "warn", found, "see whether mpirun -n 2 python -m apts_mpi.doctor has 2 ranks", values
        )
    if families[0] != families[1]:
        remedy = "call the mpirun of the library, or choose its library by MPI4PY_MPIABI=mpich or openmpi"
        return Finding("launcher", "fail", f"{library}, but {launcher} belongs to {families[1]}", remedy, values)
    return Finding("launcher", "ok", found, "", values)


def family_of_library(text: str) -> str:
    """``Open MPI``, ``MPICH`` (and what comes from it: one launcher starts them all), or empty."""
    text = text.lower()
    if "open mpi" in text:
        return "Open MPI"
    return "MPICH" if any(word in text for word in ("mpich", "intel", "cray", "mvapich")) else ""


def family_of_launcher(text: str) -> str:
    """The same of what ``mpirun --version`` prints."""
    text = text.lower()
    if any(word in text for word in ("open mpi", "openmpi", "open-mpi", "openrte", "prrte")):
        return "Open MPI"
    return "MPICH" if any(word in text for word in ("hydra", "intel", "mpich", "mvapich")) else ""


def judge_cores(ranks: Sequence[RankFacts]) -> Finding:
    """Hosts, and more compute threads than cores."""
    hosts = {host: [rank for rank in ranks if rank.host == host] for host in dict.fromkeys(rank.host for rank in ranks)}
    values = {
        "hosts": {host: len(own) for host, own in hosts.items()},
        "cores": [list(rank.cores) for rank in ranks],
        "threads": [rank.threads for rank in ranks],
    }
    cores = _range([len(rank.cores) for rank in ranks])
    threads = _range([rank.threads for rank in ranks])
    found = f"ranks: {len(ranks)}, hosts: {len(hosts)}; of each rank, cores: {cores}, threads: {threads}"
    for host, own in hosts.items():
        crowded = _crowded(own)
        if crowded:
            used, available, sharing = crowded
            remedy = f"set OMP_NUM_THREADS={max(1, available // sharing)}"
            if sharing > available:
                remedy += f", and start {available} ranks or fewer a host, or bind them to cores of their own"
            found += f"; oversubscribed: on {host} {sharing} ranks have {used} threads for {available} cores"
            return Finding("cores", "warn", found, remedy, values)
    return Finding("cores", "ok", found, "", values)


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _crowded(ranks: Sequence[RankFacts]) -> tuple[int, int, int] | None:
    """Threads, cores and ranks of a set of cores with more threads than cores; None if there is no such set.

    Looked at are the sets that ranks are bound to, and all cores of the host.
    """
    sets = {frozenset(rank.cores) for rank in ranks}
    for cores in sorted(sets | {frozenset().union(*sets)}, key=len):
        inside = [rank for rank in ranks if cores.issuperset(rank.cores)]
        threads = sum(rank.threads for rank in inside)
        if threads > len(cores):
            return threads, len(cores), len(inside)
    return None


def judge_devices(ranks: Sequence[RankFacts]) -> Finding:
    """Rank → GPU map, ranks that share one, and ranks without one."""
    values = {"devices": [[rank.host, rank.device, rank.device_identity] for rank in ranks]}
    without = [number for number, rank in enumerate(ranks) if not rank.device_identity]
    if len(without) == len(ranks):
        found = "torch finds no GPU: all ranks compute on CPUs"
        unused = [rank.host for rank in ranks if rank.has_driver]
        if unused:
            remedy = "install torch's build for CUDA (without a .venv: TORCH_INDEX= bash jobs/local_train.sh), or see "
            remedy += "what nvidia-smi says"
            return Finding("GPUs", "warn", f"{found}, though {unused[0]} has NVIDIA's driver", remedy, values)
        return Finding("GPUs", "ok", found, "", values)
    found = ", ".join(f"{number} → {rank.host} {rank.device}" for number, rank in enumerate(ranks[:8]))
    found += ", …" if len(ranks) > 8 else ""
    if without:
        remedy = "start ranks only on hosts with a GPU, or give --device cpu"
        return Finding("GPUs", "fail", f"{found}; no GPU for rank {without[0]}", remedy, values)
    uses = Counter((rank.host, rank.device_identity) for rank in ranks)
    (place, most), *_ = uses.most_common(1)
    if most > 1:
        sharing = [number for number, rank in enumerate(ranks) if (rank.host, rank.device_identity) == place]
        found += f"; {most} ranks share one GPU, such as {sharing[0]} and {sharing[1]} on {place[0]}"
        remedy = "start one rank a GPU; in Slurm give --gpus-per-node, all of them visible to every rank of the host"
        return Finding("GPUs", "warn", found, remedy, values)
    return Finding("GPUs", "ok", found, "", values)


def judge_sums(wrong: Sequence[Mapping[str, int]]) -> list[Finding]:
    """Sums over ranks, a row a dtype, from the number of wrong elements by dtype on each rank."""
    rows = []
    for dtype in wrong[0]:
        ranks = [rank for rank, counts in enumerate(wrong) if counts[dtype]]
        if ranks:
            found = f"{sum(counts[dtype] for counts in wrong)} elements are wrong, first on rank {ranks[0]}"
            remedy = "do not train with this MPI: update it, or choose another library"
            rows.append(Finding(f"allreduce {dtype}", "fail", found, remedy, {"wrong_ranks": ranks}))
        else:
            rows.append(Finding(f"allreduce {dtype}", "ok", f"exact; ranks: {len(wrong)}", "", {"wrong_ranks": []}))
    return rows


def judge_direct(outcome: str | None, transport: str) -> Finding:
    """Iallreduce on GPU memory, and how reductions are done.

    Parameters
    ----------
    outcome
        Of the process that tried it: empty if it worked, else what went wrong; None where there is no GPU to try.
    transport
        How the package will carry the data.
    """
    if outcome is None:
        works, state = None, "not tried, as there is no GPU"
    else:
        works, state = not outcome, f"does not work ({outcome})" if outcome else "works"
    return Finding("Iallreduce on GPUs", "ok", f"{state}; transport: {transport}", "", {"works": works})


def judge_overlap(shares: Sequence[tuple[float, float]], library: str, switched_on: Sequence[str]) -> Finding:
    """How much of an Iallreduce is hidden behind computation; the median of the measurements counts.

    Parameters
    ----------
    shares
        As `apts_mpi.doctor.probes.measure_overlap` has them.
    library
        What the MPI library says of itself.
    switched_on
        The environment variables of `ASYNCHRONOUS_PROGRESS` that are set.
    """
    if not shares:
        found = "nothing to overlap with one rank; mpirun -n 2 python -m apts_mpi.doctor measures it"
        return Finding("overlap", "ok", found, "", {"plain": None, "tested": None, "variable": None})
    variable = next((name for word, name in ASYNCHRONOUS_PROGRESS.items() if word in library.lower()), None)
    columns = dict(zip(("plain", "tested"), zip(*shares, strict=True), strict=True))
    values: dict[str, Any] = {name: median(column) for name, column in columns.items()}
    values |= {f"{name}_range": [min(column), max(column)] for name, column in columns.items()} | {"variable": variable}
    plain, tested = (f"{_range([round(100 * share) for share in column])}%" for column in columns.values())
    found = f"{plain} of an Iallreduce hidden behind computation, {tested} with calls of Test in between"
    if variable in switched_on:
        found += f", {variable} being set"
    if values["plain"] >= ENOUGH_OVERLAP:
        return Finding("overlap", "ok", found, "", values)
    if variable is None:
        remedy = "this library has no variable for it (MPICH and its relatives have)"
    elif variable in switched_on:
        remedy = "leave a core a rank free for its progress thread, or unset the variable"
    else:
        remedy = f"try {variable}=1, with a core a rank to spare"
    return Finding("overlap", "warn", found, remedy, values)


def judge_hdf5(versions: str, mpio: bool, error: str, ranks: int) -> Finding:
    """h5py with or without MPI, and whether a checkpoint can be saved and read in the run directory."""
    kind = "with MPI" if mpio else "without MPI"
    manner = "one file that all ranks write" if mpio and ranks > 1 else "a file a rank" if ranks > 1 else "one file"
    values = {"mpio": mpio}
    if error:
        remedy = "give another --run-dir, on a file system that all ranks share and may write"
        return Finding("h5py", "fail", f"{versions} {kind}: no checkpoint can be saved: {error}", remedy, values)
    return Finding("h5py", "ok", f"{versions} {kind}; checkpoints: {manner}", "", values)


def judge_storage(directory: str, writable: str, unseen: Sequence[int], stale: Sequence[int]) -> Finding:
    """The run directory: writable, shared by all ranks, and with a rename that replaces a file for all of them.

    Parameters
    ----------
    directory
        Where it was tried.
    writable
        Why not; empty if it is.
    unseen, stale
        Ranks that do not see a file of rank 0 at all, and those that see the old one after it was replaced.
    """
    values = {"directory": directory, "unseen": list(unseen), "stale": list(stale)}
    if writable:
        return Finding(
            "run directory", "fail", f"{directory}: {writable}", "give a --run-dir that can be written", values
        )
    if unseen:
        remedy = "give a --run-dir on a file system that all hosts share"
        return Finding(
            "run directory", "fail", f"{directory}: rank {unseen[0]} sees other files than rank 0", remedy, values
        )
    if stale:
        remedy = "give a --run-dir on another file system; checkpoints could be mixed up when a run is resumed"
        found = f"{directory}: rank {stale[0]} still sees a file that rank 0 has replaced by a rename"
        return Finding("run directory", "fail", found, remedy, values)
    return Finding("run directory", "ok", f"{directory}: written, shared by all ranks, renamed", "", values)


def judge_locks(error: str, ignoring: Sequence[int], ranks: int) -> Finding:
    """File locks, which keep two runs from saving into one directory.

    Parameters
    ----------
    error
        Why rank 0 got no lock; empty if it did.
    ignoring
        Ranks that got it although rank 0 had it.
    ranks
        Their number.
    """
    values = {"error": error, "ignoring": list(ignoring)}
    remedy = (
        "give each run a directory of its own; set HDF5_USE_FILE_LOCKING=FALSE if other tools read checkpoints here"
    )
    if error:
        return Finding("file locking", "warn", f"the file system has no locks ({error})", remedy, values)
    if ignoring:
        found = f"rank {ignoring[0]} got a lock that rank 0 held"
        return Finding("file locking", "warn", found, remedy, values)
    return Finding(
        "file locking", "ok", "a file can be locked" + (", and keeps other ranks out" if ranks > 1 else ""), "", values
    )


def judge_versions(ranks: Sequence[RankFacts], library: str) -> Finding:
    """Versions, the same on all ranks."""
    own = dict(ranks[0].versions)
    values = {"versions": own | {"mpi": library}}
    found = ", ".join([*(f"{name} {version}" for name, version in own.items()), library])
    for number, rank in enumerate(ranks):
        for name, version in rank.versions.items():
            if version != own.get(name):
                found = f"rank {number} on {rank.host} has {name} {version}, rank 0 on {ranks[0].host} {own.get(name)}"
                return Finding("versions", "fail", found, "use one environment on all hosts", values)
    return Finding("versions", "ok", found, "", values)
