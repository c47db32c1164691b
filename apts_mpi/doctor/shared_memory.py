"""What killed jobs left in the shared memory of a host: found, judged, removed. Without MPI, which may lack the room.

A job that is killed has no time to remove its segments. They take memory until the host starts anew, and with enough of
them no job has room to start.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import stat
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from apts_mpi.doctor.diagnosis import Finding
from apts_mpi.tools import environment

SHARED_MEMORY, PROCESSES = Path("/dev/shm"), Path("/proc")

# Names of the segments of MPICH, Intel MPI and Open MPI, and of the libraries of networks below them.
SEGMENT = re.compile(
    r"(mpich_shm_|mpich_shar_tmp|Intel_MPI_|vader_segment\.|sm_segment|osc_rdma\.|osc_sm\.|open_mpi\.|ucx_shm_posix_"
    r"|psm[23]_shm\.)[!-~]*"
)

# Seconds that a segment is left alone: a job under way may be about to open what it has made.
YOUNG = 60.0

# From which share of the shared memory, or which number, segments are worth a warning.
NOTABLE_SHARE, MANY = 0.05, 50

# Bytes that a rank may need for MPI to start: libraries take one to four million, and die of a bus error without.
ROOM_OF_A_RANK = 2**22

REMEDY = "python -m apts_mpi.doctor --clear-shared-memory removes them; on each host that has some"


@dataclass(frozen=True)
class Segment:
    """A file in shared memory and the bytes of memory that it takes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Survey:
    """What was found on a host.

    Attributes
    ----------
    host
        Its name.
    unused
        The segments that no process uses.
    capacity
        Bytes of the shared memory, 0 if it has no limit.
    room
        Bytes of it that are free.
    obstacle
        Why nothing can be said; empty if something can.
    """

    host: str
    unused: tuple[Segment, ...] = ()
    capacity: int = 0
    room: int = 0
    obstacle: str = ""

    @property
    def bytes(self) -> int:
        """What the segments take together."""
        return sum(segment.bytes for segment in self.unused)

    @property
    def notable(self) -> bool:
        """Whether they are many or take much of the memory."""
        return len(self.unused) >= MANY or 0 < NOTABLE_SHARE * self.capacity <= self.bytes


def survey(directory: Path = SHARED_MEMORY, processes: Path = PROCESSES) -> Survey:
    """Look for segments of this user's that no process uses. Not collective; for one process of a host.

    Two that look at the same time may each take a segment for used by the other.

    Parameters
    ----------
    directory
        Where the segments are.
    processes
        Where the system tells of its processes.
    """
    host = environment.host()
    obstacle = _obstacle(directory, processes)
    if obstacle:
        return Survey(host, obstacle=obstacle)
    try:
        place = os.statvfs(directory)
        names = sorted(filter(SEGMENT.fullmatch, os.listdir(directory)))
        unused = _unused(directory, names, processes)
    except OSError as error:
        return Survey(host, obstacle=f"{directory}: {error.strerror}")
    return Survey(host, tuple(unused), place.f_blocks * place.f_frsize, place.f_bavail * place.f_frsize)


def remove(
    names: Collection[str], directory: Path = SHARED_MEMORY, processes: Path = PROCESSES
) -> tuple[list[Segment], dict[str, str]]:
    """Remove segments, but none that is in use by now. Not collective.

    Returns
    -------
    removed, failures
        What is gone, and why others could not be removed, by name.

    Raises
    ------
    OSError
        If the system does not tell whether files are in use.
    """
    removed: list[Segment] = []
    failures: dict[str, str] = {}
    for segment in _unused(directory, names, processes):
        path = directory / segment.name
        try:
            if _is_free(path, and_remove=True):
                removed.append(segment)
        except FileNotFoundError:
            continue  # somebody else was faster
        except OSError as error:
            failures[segment.name] = error.strerror or str(error)
    return removed, failures


def judge_shared_memory(surveys: Sequence[Survey]) -> Finding:
    """Whether killed jobs left much behind, on each of the hosts."""
    values = {"hosts": [asdict(one) | {"bytes": one.bytes} for one in surveys]}
    worst = max(surveys, key=lambda one: (one.notable, one.bytes, len(one.unused)))
    if worst.unused:
        number = len(worst.unused)
        found = f"{worst.host}: {number} segment{'s' * (number > 1)} of jobs that ended, {amount(worst.bytes)}"
        found += f" of {amount(worst.capacity)}" if worst.capacity else ""
        return Finding("shared memory", *(("warn", found, REMEDY) if worst.notable else ("ok", found, "")), values)
    obstacles = [one.obstacle for one in surveys if one.obstacle]
    found = f"not looked at: {obstacles[0]}" if obstacles else "no segments of jobs that ended"
    return Finding("shared memory", "ok", found, "", values)


def is_short(ranks: int, directory: Path = SHARED_MEMORY) -> bool:
    """Whether there may be no room for a job of so many ranks, were all of them on this host."""
    try:
        place = os.statvfs(directory)
    except OSError:
        return False
    return place.f_blocks > 0 and place.f_bavail * place.f_frsize < ranks * ROOM_OF_A_RANK


def describe_shortage(found: Survey) -> str:
    """What to say where there may be no room."""
    words = (
        f"{found.host}: {SHARED_MEMORY} has {amount(found.room)} left of {amount(found.capacity)}, with which MPI may "
    )
    if not found.unused:
        return f"{words}not start; see what fills it with ls -lS {SHARED_MEMORY}"
    return f"{words}not start; segments of jobs that ended: {len(found.unused)}, {amount(found.bytes)}; {REMEDY}"


def amount(number: int) -> str:
    """A number of bytes in words."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def _obstacle(directory: Path, processes: Path) -> str:
    if not directory.is_dir():
        return f"this system has no {directory}"
    if not (processes / "self" / "maps").exists():
        return f"without {processes} it cannot be told which segments are in use"
    return ""


def _unused(directory: Path, names: Collection[str], processes: Path) -> list[Segment]:
    old = [segment for name in names if (segment := _own_and_old(directory, name))]
    used = _used_files(directory, processes) if old else set()
    unused = []
    for segment in old:
        # It may be gone by now, or be one that even its owner may not open.
        with suppress(FileNotFoundError, PermissionError):
            if segment.name not in used and _is_free(directory / segment.name):
                unused.append(segment)
    return unused


def _own_and_old(directory: Path, name: str) -> Segment | None:
    try:
        found = os.lstat(directory / name)
    except OSError:
        return None
    own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
    if not own or environment.wall_time() - found.st_mtime < YOUNG:
        return None
    return Segment(name, found.st_blocks * 512)


def _used_files(directory: Path, processes: Path) -> set[str]:
    """Names of the files in a directory that a process has mapped or open, as far as this user may know."""
    beginning = f"{os.path.realpath(directory)}/"
    paths: list[str] = []
    for process in processes.iterdir():
        if process.name.isdigit():
            # It may end meanwhile, and those of others cannot be read.
            with suppress(OSError):
                lines = (process / "maps").read_text(errors="surrogateescape").splitlines()
                paths += [line[line.index("/") :] for line in lines if "/" in line]
            with suppress(OSError):
                for file in os.scandir(process / "fd"):
                    with suppress(OSError):
                        paths.append(os.readlink(file))
    return {path.removeprefix(beginning) for path in paths if path.startswith(beginning)}


def _is_free(path: Path, and_remove: bool = False) -> bool:
    """Whether the system grants a lease, which it does only for a file that nobody else has open or mapped.

    Processes in other containers, which share the memory but are not seen in ``/proc``, count too. Who opens the file
    meanwhile waits until it is closed here.

    Raises
    ------
    OSError
        If the file cannot be opened, or the system has no leases, or it cannot be removed.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except BlockingIOError:
        return False  # another process has the lease
    try:
        # The signal that tells of another opener; the usual one would end this process, this one is ignored.
        fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        if and_remove:
            os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)
