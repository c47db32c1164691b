"""The checkpoints of a run: ``step-00000100.h5``, perhaps with ``step-00000100.parts/``, and the link ``latest``.

A save writes under names that begin with a dot. The new name of the main file makes the checkpoint: before that there
is none, afterwards it is complete. Whatever else a killed run has left is removed at the next save.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from apts_mpi.checkpoint.format import (
    Array,
    Checkpoint,
    describe,
    open_checkpoint,
    part_name,
    read_texts,
    slab_checksums,
)
from apts_mpi.checkpoint.writers import (
    Flush,
    Writer,
    agree_on_places,
    choose_writer,
    finish_file,
    prepare,
    reserve,
    shared,
    show_parts,
    synchronise,
    write_own,
    write_part,
    write_together,
)
from apts_mpi.comm import Communicator
from apts_mpi.environment import pause
from apts_mpi.errors import InvalidInput, SharedInvalidInput

LATEST = "latest"
LOCK = ".lock"
TEMPORARY = ".step-*.tmp"
FILE_NAME = re.compile(r"step-(\d{8,})\.h5")
PARTS_NAME = re.compile(r"(step-\d{8,})(\.\d+)?\.parts")

# Seconds to wait for the lock, in tries of a tenth: the ranks of a run that was killed may take a moment to end.
LOCK_TRIES = 100
LOCK_PAUSE = 0.1


def file_name(step: int) -> str:
    """Name of the main file of a checkpoint."""
    return f"step-{step:08d}.h5"


def saved_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, rising."""
    matches = (FILE_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def latest_step(directory: Path) -> int | None:
    """Step that the link ``latest`` names; None without one."""
    match = FILE_NAME.fullmatch(os.path.basename(os.path.realpath(directory / LATEST)))
    return int(match[1]) if match else None


def candidates(directory: Path) -> list[int]:
    """Steps in the order in which to try them: the latest, the ones before it, and last those after it.

    The ones after it come from a run that was resumed at an earlier step.

    Raises
    ------
    InvalidInput
        If there is none.
    """
    steps = saved_steps(directory) if directory.is_dir() else []
    if not steps:
        raise InvalidInput(f"{directory} has no checkpoint in it; give the directory that a run has saved into")
    latest = latest_step(directory)
    if latest is None:
        latest = steps[-1]
    return sorted(steps, key=lambda step: (step > latest, -step))


def resolve(path: Path) -> Path:
    """The latest checkpoint if ``path`` is a directory, else ``path``.

    Raises
    ------
    InvalidInput
        If the directory has no checkpoint.
    """
    return path / file_name(candidates(path)[0]) if path.is_dir() else path


def newest_valid(directory: Path, comm: Communicator) -> tuple[Checkpoint, list[str]]:
    """Open the newest checkpoint that is whole, and say what is wrong with newer ones. Collective.

    Raises
    ------
    SharedInvalidInput
        If there is none.
    """
    with comm.shared_errors():
        steps = candidates(directory) if comm.rank == 0 else []
    messages: list[str] = []
    for step in comm.collect(steps)[0]:
        try:
            return open_checkpoint(directory / file_name(step), comm), messages
        except SharedInvalidInput as error:
            messages.append(str(error))
    raise SharedInvalidInput(f"{directory} has no checkpoint that can be used: " + "; ".join(messages))


class CheckpointDirectory:
    """Saves the checkpoints of one run; closed by `close` or at the end of a ``with`` block. Collective.

    Parameters
    ----------
    path
        Made if it does not exist; on a file system that all ranks share.
    comm
        The ranks of the run.
    keep_last
        How many checkpoints to keep, counted back from the one just saved.
    keep_every
        Also keep those whose step is a multiple of this; 0 for none.
    writer
        ``mpio`` for one file that all ranks write through an h5py with MPI, ``parts`` for a file a rank; by default
        what h5py is able to.

    Raises
    ------
    SharedInvalidInput
        If the directory cannot be written or another run saves into it.
    """

    def __init__(
        self, path: Path, comm: Communicator, keep_last: int = 2, keep_every: int = 0, writer: Writer | None = None
    ) -> None:
        self.path = path
        self._comm = comm
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._writer = writer or choose_writer(comm)
        self._saving: Saving | None = None
        self._lock: int | None = None
        with comm.shared_errors(), explained(path):
            if keep_last < 1 or keep_every < 0:
                raise InvalidInput(f"keep_last {keep_last}, keep_every {keep_every}: keep at least the last one")
            if comm.rank == 0:
                path.mkdir(parents=True, exist_ok=True)
                self._lock = lock(path)

    def save(self, arrays: Sequence[Array], metadata: Mapping[str, Any], step: int) -> Path:
        """Save a checkpoint and make it the latest. Collective.

        Parameters
        ----------
        arrays
            The same on all ranks but for the slabs.
        metadata
            Of numbers, texts, lists and mappings, as JSON has them; rank 0's is saved.
        step
            Its number, not negative; an earlier checkpoint of that number is replaced.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        SharedInvalidInput
            If arrays or metadata cannot be saved, or the file system fails (disk full, no permission); on all ranks.
            Earlier checkpoints are as they were.
        """
        self.finish()
        with self._cleared_after_failure():
            saving = self._begin(arrays, metadata, step, copy=False)
            saving.write()
            return self._complete(saving)

    def start_save(self, arrays: Sequence[Array], metadata: Mapping[str, Any], step: int) -> None:
        """Copy the arrays and write them in the background; `finish` makes the checkpoint. Collective.

        With the writer ``mpio`` it is a plain `save`, as there all ranks write together. Raises as `save` does.
        """
        if self._writer == "mpio":
            self.save(arrays, metadata, step)
            return
        self.finish()
        with self._cleared_after_failure():
            self._saving = self._begin(arrays, metadata, step, copy=True)
        self._saving.start()

    def finish(self) -> None:
        """Wait for what `start_save` has begun, if anything, and complete it. Collective; raises as `save` does."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._cleared_after_failure():
                saving.wait()
                self._complete(saving)

    def close(self) -> None:
        """Finish, and let other runs save here. Collective."""
        try:
            self.finish()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> CheckpointDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # After an error the other ranks may be elsewhere, and a collective would wait for them for ever.
        if kind is not None:
            self._saving = None
        self.close()

    def _begin(self, arrays: Sequence[Array], metadata: Mapping[str, Any], step: int, copy: bool) -> Saving:
        with self._comm.shared_errors(), explained(self.path):
            prepared = prepare(arrays, copy)
            text = ""
            if step < 0:
                raise InvalidInput(f"checkpoint: step {step} is negative; number the steps from 0")
            if self._comm.rank == 0:
                text = as_text(metadata)
                remove_leftovers(self.path)
        return Saving(self.path, prepared, text, step, self._comm, self._writer)

    def _complete(self, saving: Saving) -> Path:
        saving.complete()
        with self._comm.shared_errors(), explained(self.path):
            if self._comm.rank == 0:
                saving.commit()
                self._retain(saving.step)
        return self.path / file_name(saving.step)

    def _retain(self, newest: int) -> None:
        """Remove old checkpoints, and the parts of a replaced one."""
        # Those after the newest are left: the run was resumed before them and will replace them when it gets there.
        steps = [step for step in saved_steps(self.path) if step <= newest]
        for step in steps[: -self._keep_last]:
            if self._keep_every == 0 or step % self._keep_every:
                (self.path / file_name(step)).unlink()
        remove_leftovers(self.path)

    @contextmanager
    def _cleared_after_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            if self._comm.rank == 0:
                with suppress(OSError):
                    remove_leftovers(self.path)
            raise


class Saving:
    """One save under way, from `write`, or `start` and `wait`, through `complete` to `commit`. Collective.

    Parameters
    ----------
    directory
        Where.
    arrays
        As `prepare` gives them.
    metadata
        JSON text, on rank 0.
    step, comm, writer
        As for `CheckpointDirectory`.
    """

    def __init__(
        self, directory: Path, arrays: list[Array], metadata: str, step: int, comm: Communicator, writer: Writer
    ) -> None:
        self.step = step
        self._directory = directory
        self._arrays = arrays
        self._metadata = metadata
        self._comm = comm
        self._places = agree_on_places(arrays, comm)
        self._numbers = shared(arrays, comm)
        self._alone = [array for number, array in enumerate(arrays) if number not in self._numbers]
        self._in_parts = bool(self._numbers) and writer == "parts"
        self._together = bool(self._numbers) and not self._in_parts
        self._temporary = directory / f".{file_name(step)}.tmp"
        self._temporary_parts = directory / f".step-{step:08d}.parts.tmp"
        self._thread = threading.Thread(target=self._write_and_note, daemon=True)
        self._failure: Exception | None = None
        with comm.shared_errors(), explained(directory):
            if comm.rank == 0 and self._in_parts:
                self._temporary_parts.mkdir()
        self._check_space()

    def _check_space(self) -> None:
        """See that the disk has space for the files of all ranks at the same time. Collective.

        HDF5 is to meet no full disk: after a failure it may crash, at the latest when the process ends.
        """
        files = self._expected_files()
        with self._comm.shared_errors(), explained(self._directory):
            for path, size in files.items():
                reserve(path, size)
        with self._comm.shared_errors(), explained(self._directory):
            for path in files:
                path.unlink()

    def _expected_files(self) -> dict[Path, int]:
        """Files that this rank creates, with the bytes of their values."""
        files = {}
        if self._comm.rank == 0:
            in_main = self._alone if self._in_parts else self._arrays
            size = sum(math.prod(array.shape) * array.dtype.itemsize for array in in_main)
            files[self._temporary] = size + len(self._metadata)
        if self._in_parts:
            own = [slab.values.nbytes for number in self._numbers for slab in self._arrays[number].slabs]
            files[self._temporary_parts / part_name(self._comm.rank)] = sum(own)
        return files

    def write(self) -> None:
        """Bring the slabs to disk. Collective."""
        with self._comm.shared_errors(), explained(self._directory):
            if self._together:
                write_together(self._temporary, self._arrays, self._numbers, self._places, self._comm)
        with self._comm.shared_errors(), explained(self._directory):
            self._write_own()

    def start(self) -> None:
        """Begin to write, in the background."""
        self._thread.start()

    def wait(self) -> None:
        """Wait for the end of what `start` began. Collective."""
        self._thread.join()
        with self._comm.shared_errors(), explained(self._directory):
            if self._failure is not None:
                raise self._failure

    def _write_and_note(self) -> None:
        try:
            self._write_own()
        except Exception as error:
            self._failure = error

    def _write_own(self) -> None:
        """Write what this rank writes alone. No MPI: this may run beside the main thread."""
        self._flushes = []
        self._main_slabs = []
        if self._comm.rank == 0:
            write_own(self._temporary, self._alone)
        if self._in_parts:
            part = self._temporary_parts / part_name(self._comm.rank)
            self._part_checksum, flush = write_part(part, self._arrays, self._numbers)
            self._flushes.append(flush)
        if self._comm.rank == 0 or not self._in_parts:
            # Also the other ranks: their machines may hold what they have written together.
            self._flushes.append(Flush(self._temporary))
            self._main_slabs = slab_checksums(self._alone if self._in_parts else self._arrays)

    def complete(self) -> None:
        """Finish the main file, compare what was written with the checksums, and see it to disk. Collective."""
        main_slabs = itertools.chain.from_iterable(self._comm.collect(self._main_slabs))
        part_checksums = self._comm.collect(self._part_checksum) if self._in_parts else []
        parts = ""
        with self._comm.shared_errors(), explained(self._directory):
            if self._comm.rank == 0:
                if self._in_parts:
                    parts = self._name_parts()
                    show_parts(self._temporary, self._arrays, self._numbers, self._places, parts)
                index = describe(self._arrays, self.step, parts, part_checksums)
                finish_file(self._temporary, index, self._metadata, main_slabs)
        open_checkpoint(self._temporary, self._comm).close()
        with self._comm.shared_errors(), explained(self._directory):
            for flush in self._flushes:
                flush.finish()
            if parts:
                synchronise(self._directory / parts)

    def _name_parts(self) -> str:
        """Give the directory of parts its name, the first that is free: it may lie beside the one to be replaced."""
        numbers = itertools.chain([""], (f".{number}" for number in itertools.count(1)))
        names = (f"step-{self.step:08d}{number}.parts" for number in numbers)
        name = next(name for name in names if not (self._directory / name).exists())
        os.rename(self._temporary_parts, self._directory / name)
        return name

    def commit(self) -> None:
        """On rank 0: make it a checkpoint, and the latest."""
        os.replace(self._temporary, self._directory / file_name(self.step))
        synchronise(self._directory)
        link = self._directory / ".step-latest.tmp"
        link.symlink_to(file_name(self.step))
        os.replace(link, self._directory / LATEST)
        synchronise(self._directory)


def as_text(metadata: Mapping[str, Any]) -> str:
    """JSON, or `InvalidInput` if it cannot hold the metadata."""
    try:
        return json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"checkpoint: the metadata cannot be saved as JSON ({error}); make arrays of it") from error


def lock(directory: Path) -> int:
    """Number of the open file that locks the directory for this process, until it is closed or the process ends."""
    number = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pause(LOCK_PAUSE)
            continue
        except OSError:
            pass  # a file system without locks: two runs in one directory stay unnoticed
        return number
    os.close(number)
    raise InvalidInput(f"directory {str(directory)!r}: another run saves checkpoints into it; give each run its own")


def remove_leftovers(directory: Path) -> None:
    """Remove temporaries, and directories of parts to which no checkpoint belongs."""
    for path in directory.glob(TEMPORARY):
        remove(path)
    for path in directory.iterdir():
        match = PARTS_NAME.fullmatch(path.name)
        if match and not is_used(path, directory / f"{match[1]}.h5"):
            remove(path)


def is_used(parts: Path, file: Path) -> bool:
    """Whether a directory of parts belongs to a checkpoint, or to one too damaged to tell."""
    try:
        _, index, _ = read_texts(file)
        return index["parts"] == parts.name
    except InvalidInput:
        return file.exists()


def remove(path: Path) -> None:
    """Remove a file, link or directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def explained(directory: Path) -> Iterator[None]:
    """Turn errors of the file system, also as HDF5 reports them, into `InvalidInput`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # HDF5's text is long; the words of the system are in it.
        words = re.search("error message = '(.*?)'", str(error))
        raise InvalidInput(
            f"directory {str(directory)!r} cannot be written ({words[1] if words else error}); "
            "free some space or give another one"
        ) from error
