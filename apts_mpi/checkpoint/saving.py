"""One save, from the arrays of the ranks to a complete checkpoint under its name."""

from __future__ import annotations

import itertools
import math
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.checkpoint.format import Checkpoint
from apts_mpi.checkpoint.index import describe, part_name
from apts_mpi.checkpoint.seals import Region, Written, read_back
from apts_mpi.checkpoint.writers import (
    Flush,
    Writer,
    agree_on_places,
    finish_file,
    reserve,
    shared,
    show_parts,
    synchronise,
    write_own,
    write_part,
    write_together,
)
from apts_mpi.errors import InvalidInput

if TYPE_CHECKING:
    from apts_mpi.parallel.communicator import Communicator

LATEST, BEST = "latest", "best"

# The link that becomes `LATEST`, ready before the file has its name.
READY = ".step-latest.tmp"


def file_name(step: int) -> str:
    """Name of the main file of a checkpoint."""
    return f"step-{step:08d}.h5"


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
        # Into the main file, by this rank.
        self._written: list[Written] = []
        self._main_slabs: list[Region] = []
        self._flushes: list[Flush] = []
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
                self._written += write_together(self._temporary, self._arrays, self._numbers, self._places, self._comm)
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
        """Write what this rank writes alone, and read all it has written back.

        No MPI: this may run beside the main thread.
        """
        if self._comm.rank == 0:
            self._written += write_own(self._temporary, self._alone)
        if self._in_parts:
            part = self._temporary_parts / part_name(self._comm.rank)
            self._part_checksum, flush = write_part(part, self._arrays, self._numbers)
            self._flushes.append(flush)
        if self._comm.rank == 0 or not self._in_parts:
            # Also the other ranks: their machines may hold what they have written together.
            self._flushes.append(Flush(self._temporary))
            self._main_slabs = read_back(self._temporary, self._written)

    def complete(self) -> None:
        """Finish the main file, see whether it can be opened, and that all is on disk. Collective."""
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
                Checkpoint(self._temporary).close()
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

    def commit(self, best: bool) -> None:
        """On rank 0: make it a checkpoint, and the latest; the best as well, or not what was so before under its name.

        The link lies ready before: of a run that is killed between the two names, it tells what is the latest.
        """
        link = self._directory / READY
        link.unlink(missing_ok=True)
        link.symlink_to(file_name(self.step))
        os.replace(self._temporary, self._directory / file_name(self.step))
        synchronise(self._directory)
        os.replace(link, self._directory / LATEST)
        if best:
            name_best(self._directory, self.step)
        elif os.path.basename(os.path.realpath(self._directory / BEST)) == file_name(self.step):
            (self._directory / BEST).unlink()
        synchronise(self._directory)


def name_best(directory: Path, step: int | None) -> bool:
    """Let the link ``best`` name the checkpoint of a step, or nothing where there is none; return whether it does."""
    link = directory / ".step-best.tmp"
    link.unlink(missing_ok=True)
    if step is None or not (directory / file_name(step)).exists():
        (directory / BEST).unlink(missing_ok=True)
        return False
    link.symlink_to(file_name(step))
    os.replace(link, directory / BEST)
    return True


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
