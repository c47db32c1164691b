"""What may happen to a training run, and what has to become of it then."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from apts_mpi.bench.fault_runs import Job
from apts_mpi.checkpoint.saving import file_name
from apts_mpi.tools.environment import pause
from apts_mpi.tools.status import REQUEUE

# Seconds between two presses of Ctrl-C that are two, and in which a run notices what became of its directory.
PRESSES, NOTICED = 0.4, 0.5

# Bytes that a file may have where the disk is "full": fewer than a checkpoint has.
ROOM = 6000


@dataclass(frozen=True)
class Place:
    """Where a fault is done.

    Attributes
    ----------
    rank
        To which rank.
    share
        From 0 to 1: which byte of which file, or how long something lasts.
    """

    rank: int
    share: float


@dataclass(frozen=True)
class Ending:
    """How a job may end: with status 0, with 75 after it has saved, or as a failure; and what it has to say.

    A launcher that says ``aborted`` has ended the job itself, with any status.
    """

    ways: frozenset[str]
    words: tuple[str, ...] = ()
    aborted: str | None = None

    def wrong(self, status: int, output: str) -> str:
        """What is not as it should be; empty if all is."""
        way = {0: "done", REQUEUE: "stopped"}.get(status, "failed")
        if way not in self.ways and not (self.aborted and self.aborted in output):
            return f"status {status}, where it should have {' or '.join(sorted(self.ways))}"
        missing = [words for words in self.words if words not in output]
        return f"it did not say {missing[0]!r}" if missing else ""


STOPPED = Ending(frozenset({"stopped"}), ("was received",))
ENDED = Ending(frozenset({"failed"}))
ANY_BUT_DONE = Ending(frozenset({"failed", "stopped"}))


@dataclass(frozen=True)
class Going:
    """From where a run has to go on: from an iteration, or, where that is None, not at all; and what it has to say."""

    iteration: int | None
    words: tuple[str, ...] = ()


class Kind:
    """A fault, as a value: derived classes say what is done.

    Attributes
    ----------
    name
        For the table.
    action
        A statement for a call of the user's loss on one rank.
    options
        Of the training command, beside those of the run.
    least
        Ranks that it takes.
    early
        Whether it may come before the first iteration.
    keeps
        Whether the checkpoints from before are still there afterwards.
    compares
        Whether the run is the same afterwards as one without the fault.
    """

    name = ""
    action = ""
    options: Sequence[str] = ()
    least = 1
    early = False
    keeps = True
    compares = True

    def do(self, job: Job, place: Place) -> Ending:
        """Do it to a job; return how that has to end."""
        job.send(job.process.pid, signal.SIGTERM)
        return STOPPED

    def harm(self, checkpoints: Path, steps: list[int], place: Place) -> Going:
        """Do something to the files of a job that has ended, and return how the run has to go on.

        Parameters
        ----------
        checkpoints
            The folder.
        steps
            Those in it, rising, at least one.
        place
            Where.
        """
        return Going(steps[-1])


class Signal(Kind):
    """To mpirun, or to one rank."""

    early = True

    def __init__(self, number: signal.Signals, to_mpirun: bool, ending: Ending) -> None:
        self.name = f"{number.name} to {'mpirun' if to_mpirun else 'a rank'}"
        self._number = number
        self._to_mpirun = to_mpirun
        self._ending = ending

    def do(self, job: Job, place: Place) -> Ending:
        """See `Kind`."""
        job.send(job.process.pid if self._to_mpirun else job.rank(place.rank), self._number)
        return self._ending


class SecondInterrupt(Kind):
    """Ctrl-C twice, to mpirun; where the first has stopped the run already, the second comes too late."""

    name = "SIGINT to mpirun, twice"

    def do(self, job: Job, place: Place) -> Ending:
        """See `Kind`."""
        for _ in range(2):
            job.send(job.process.pid, signal.SIGINT)
            pause(PRESSES)
        # As MPICH has it, whose status is 0 at times, also of a run that had stopped with 75.
        return Ending(ANY_BUT_DONE.ways, aborted="Ctrl-C caught")


class InterruptedStanding(Kind):
    """Ctrl-C twice, to all ranks, of which one never comes to the end of its iteration."""

    name = "SIGINT to all, twice, where a rank stands"
    action = "print('stands now', flush=True); time.sleep(10000)"

    def do(self, job: Job, place: Place) -> Ending:
        """See `Kind`."""
        job.wait_for("stands now")
        for _ in range(2):
            for process in job.ranks().values():
                job.send(process, signal.SIGINT)
            pause(PRESSES)
        return Ending(frozenset({"failed"}), ("interrupted a second time",))


class Stopped(Kind):
    """SIGSTOP, as a rank of which nothing is heard."""

    name = "SIGSTOP to a rank"
    options = ("--stall-timeout=8",)
    least = 2

    def do(self, job: Job, place: Place) -> Ending:
        """See `Kind`."""
        job.send(job.rank(place.rank), signal.SIGSTOP)
        return Ending(frozenset({"failed"}), ("stall_timeout is 8 s",))


class InLoss(Kind):
    """What the user's loss does on one rank, by which the job ends and the rank is named."""

    def __init__(self, name: str, action: str, words: str) -> None:
        self.name = f"{name} in the loss of a rank"
        self.action = action
        self._words = words

    def do(self, job: Job, place: Place) -> Ending:
        """See `Kind`."""
        return Ending(frozenset({"failed"}), (f"rank {place.rank}", self._words))


class NotANumber(Kind):
    """A loss in one call on one rank: that step is skipped or rejected, and the run goes on, as another one."""

    name = "nan in the loss of a rank"
    action = "print('nan now', flush=True); return outputs.sum() * float('nan')"
    compares = False

    def do(self, job: Job, place: Place) -> Ending:
        """See `Kind`."""
        job.wait_for("nan now")
        pause(NOTICED)
        return super().do(job, place)


class FullDisk(Kind):
    """Files may not be as large as a checkpoint: until the end, or for a while."""

    name = "disk full for rank 0"

    def do(self, job: Job, place: Place) -> Ending:
        """See `Kind`."""
        process = job.rank(0)
        with suppress(ProcessLookupError):
            before = resource.prlimit(process, resource.RLIMIT_FSIZE)
            resource.prlimit(process, resource.RLIMIT_FSIZE, (ROOM, before[1]))
            pause(NOTICED)
            if place.share < 0.5:
                super().do(job, place)
                return Ending(frozenset({"failed"}), ("the last checkpoint could not be saved",))
            resource.prlimit(process, resource.RLIMIT_FSIZE, before)
        return super().do(job, place)


class DirectoryGone(Kind):
    """The run directory is removed or renamed; the run makes it again."""

    keeps = False

    def __init__(self, name: str, take: Callable[[Path], object]) -> None:
        self.name = f"run directory {name}"
        self._take = take

    def do(self, job: Job, place: Place) -> Ending:
        """See `Kind`."""
        self._take(job.directory / "run")
        pause(NOTICED)
        return super().do(job, place)


def remove(run: Path) -> None:
    """Remove a directory into which somebody writes."""
    for _ in range(3):
        shutil.rmtree(run, ignore_errors=True)


# What is done to the files of a checkpoint, of which the first is the main one; returns what is to be said of it.
Harm = Callable[[list[Path], float], str]


class Damage(Kind):
    """Done to the newest checkpoint after the run has stopped: it is told, and the one before is used, if any."""

    def __init__(self, name: str, harm: Harm, least: int = 1) -> None:
        self.name = name
        self.least = least
        self._harm = harm

    def harm(self, checkpoints: Path, steps: list[int], place: Place) -> Going:
        """See `Kind`."""
        main = checkpoints / file_name(steps[-1])
        words = self._harm([main, *sorted(main.with_suffix(".parts").glob("*"))], place.share)
        return Going(steps[-2] if len(steps) > 1 else None, (words,))


def pick(files: list[Path], share: float) -> tuple[Path, float]:
    """One of some files, and the share of it where something is done."""
    index = int(share * len(files))
    return files[index], share * len(files) - index


def flip_byte(files: list[Path], share: float) -> str:
    """One bit of it."""
    file, within = pick(files, share)
    contents = bytearray(file.read_bytes())
    contents[int(within * len(contents))] ^= 1 << int(1000 * within) % 8
    file.write_bytes(contents)
    return files[0].stem


def cut(files: list[Path], share: float) -> str:
    """Leave the beginning of a file."""
    file, within = pick(files, share)
    contents = file.read_bytes()
    file.write_bytes(contents[: int(within * len(contents))])
    return files[0].stem


def remove_part(files: list[Path], share: float) -> str:
    """Or the file, where a checkpoint has no parts; that one could be missed is not told then."""
    pick(files[1:] or files, share)[0].unlink()
    return files[0].stem if files[1:] else ""


def put_garbage(files: list[Path], share: float) -> str:
    """A text, or zeros, in its place."""
    files[0].write_bytes(b"no checkpoint\n" * 100 if share < 0.5 else bytes(10000))
    return files[0].stem


class LatestGone(Kind):
    """The link to the newest checkpoint is removed: it is found without."""

    name = "latest removed"

    def harm(self, checkpoints: Path, steps: list[int], place: Place) -> Going:
        """See `Kind`."""
        (checkpoints / "latest").unlink()
        return Going(steps[-1])


class Foreign(Kind):
    """A file that is no checkpoint has the name of a later one: it is left alone."""

    name = "foreign file with a later name"

    def harm(self, checkpoints: Path, steps: list[int], place: Place) -> Going:
        """See `Kind`."""
        (checkpoints / file_name(99999999)).write_bytes(b"foreign" * int(1000 * place.share))
        return Going(steps[-1])


KINDS: tuple[Kind, ...] = (
    Signal(signal.SIGKILL, False, ENDED),
    Signal(signal.SIGKILL, True, ENDED),
    Signal(signal.SIGHUP, True, ANY_BUT_DONE),
    *(Signal(number, True, STOPPED) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)),
    *(Signal(number, False, STOPPED) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)),
    SecondInterrupt(),
    InterruptedStanding(),
    Stopped(),
    InLoss("an exception", "raise ValueError('of the user')", "ValueError: of the user"),
    InLoss("sys.exit", "sys.exit(0)", "SystemExit: 0"),
    InLoss("os._exit", "os._exit(0)", "called os._exit(0)"),
    InLoss("MemoryError", "raise MemoryError", "MemoryError"),
    NotANumber(),
    FullDisk(),
    DirectoryGone("removed", remove),
    DirectoryGone("renamed", lambda run: run.rename(run.with_name("elsewhere"))),
    Damage("byte flipped in a checkpoint", flip_byte),
    Damage("file of a checkpoint cut", cut),
    Damage("part of a checkpoint removed", remove_part, least=2),
    Damage("garbage in the place of a checkpoint", put_garbage),
    LatestGone(),
    Foreign(),
)
