"""The checkpoints of a run: ``step-00000100.h5``, perhaps with ``step-00000100.parts/``, and the link ``latest``.

A save writes under names that begin with a dot. The new name of the main file makes the checkpoint: before that there
is none, afterwards it is complete, and the latest. Where that is asked for, the link ``best`` names it as well.
Whatever else a killed run has left is removed at the next save.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.checkpoint.claim import Claim
from apts_mpi.checkpoint.format import Checkpoint, open_checkpoint, read_texts
from apts_mpi.checkpoint.saving import BEST, LATEST, READY, Saving, explained, file_name, name_best
from apts_mpi.checkpoint.writers import Writer, choose_writer, prepare
from apts_mpi.errors import InvalidInput, SharedInvalidInput

if TYPE_CHECKING:
    from apts_mpi.parallel.communicator import Communicator

TEMPORARY = ".step-*.tmp"
FILE_NAME = re.compile(r"step-(\d{8,})\.h5")
PARTS_NAME = re.compile(r"(step-\d{8,})(\.\d+)?\.parts")


def saved_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints in a directory, rising."""
    matches = (FILE_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def latest_step(directory: Path) -> int | None:
    """Step that the link ``latest`` names, or is about to; None without one."""
    return named_step(directory, READY if is_ready(directory) else LATEST)


def named_step(directory: Path, link: str) -> int | None:
    """Step of the checkpoint that a link names; None without one."""
    match = FILE_NAME.fullmatch(os.path.basename(os.path.realpath(directory / link)))
    return int(match[1]) if match else None


def is_ready(directory: Path) -> bool:
    """Whether a run was killed after its checkpoint got its name and before ``latest`` named it."""
    name = os.path.basename(os.path.realpath(directory / READY))
    made = FILE_NAME.fullmatch(name) is not None and (directory / name).exists()
    # A file that still has its temporary name is not the one that has this name: that is of an earlier save.
    return made and not (directory / f".{name}.tmp").exists()


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
        self._saves_best = False
        self._remover = ThreadPoolExecutor(1)
        self._removal: Future[None] | None = None
        self._claim: Claim | None = None
        with comm.shared_errors(), explained(path):
            if keep_last < 1 or keep_every < 0:
                raise InvalidInput(f"keep_last {keep_last}, keep_every {keep_every}: keep at least the last one")
            if comm.rank == 0:
                self._claim = Claim(path)

    def clear(self) -> None:
        """Remove all checkpoints, of an earlier run. Collective."""
        self._settle()
        with self._comm.shared_errors(), explained(self.path):
            if self._comm.rank == 0:
                for step in saved_steps(self.path):
                    (self.path / file_name(step)).unlink()
                for link in (LATEST, BEST):
                    (self.path / link).unlink(missing_ok=True)
                remove_leftovers(self.path)

    def name_best(self, step: int | None) -> bool:
        """Let the link ``best`` name the checkpoint of a step, or nothing; return whether there is one. Collective."""
        found = False
        with self._comm.shared_errors(), explained(self.path):
            if self._comm.rank == 0:
                found = name_best(self.path, step)
        return bool(self._comm.decide(lambda: [found])[0])

    def save(self, arrays: Sequence[Array], metadata: Mapping[str, Any], step: int, best: bool = False) -> Path:
        """Save a checkpoint and make it the latest. Collective.

        Parameters
        ----------
        arrays
            The same on all ranks but for the slabs.
        metadata
            Of numbers, texts, lists and mappings, as JSON has them; rank 0's is saved.
        step
            Its number, not negative; an earlier checkpoint of that number is replaced.
        best
            Whether the link ``best`` is to name it; what it names is kept until it names another.

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
        self._settle()
        with self._cleared_after_failure():
            saving = self._begin(arrays, metadata, step, copy=False)
            saving.write()
            return self._complete(saving, best)

    def start_save(self, arrays: Sequence[Array], metadata: Mapping[str, Any], step: int, best: bool = False) -> None:
        """Copy the arrays and write them in the background; `finish` makes the checkpoint. Collective.

        With the writer ``mpio`` it is a plain `save`, as there all ranks write together. Raises as `save` does.
        """
        if self._writer == "mpio":
            self.save(arrays, metadata, step, best)
            return
        self._settle()
        with self._cleared_after_failure():
            self._saving, self._saves_best = self._begin(arrays, metadata, step, copy=True), best
        self._saving.start()

    def finish(self) -> None:
        """Wait for what `start_save` has begun, if anything, and complete it. Collective; raises as `save` does."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._cleared_after_failure():
                saving.wait()
                self._complete(saving, self._saves_best)

    def close(self) -> None:
        """Finish, and let other runs save here. Collective."""
        try:
            self._settle()
        finally:
            self._remover.shutdown()
            if self._claim is not None:
                self._claim.release()
                self._claim = None

    def __enter__(self) -> CheckpointDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # After an error the other ranks may be elsewhere, and a collective would wait for them for ever.
        if kind is not None:
            self._saving = self._removal = None
        self.close()

    def finish_removal(self) -> None:
        """Wait until the checkpoints that are not kept are removed. Collective.

        Raises
        ------
        SharedInvalidInput
            If they cannot be.
        """
        removal, self._removal = self._removal, None
        if removal is not None:
            with self._comm.shared_errors(), explained(self.path):
                removal.result()

    def _settle(self) -> None:
        """Come to the end of all that is under way."""
        self.finish()
        self.finish_removal()

    def _begin(self, arrays: Sequence[Array], metadata: Mapping[str, Any], step: int, copy: bool) -> Saving:
        with self._comm.shared_errors(), explained(self.path):
            prepared = prepare(arrays, copy)
            text = ""
            if step < 0:
                raise InvalidInput(f"checkpoint: step {step} is negative; number the steps from 0")
            if self._comm.rank == 0:
                text = as_text(metadata)
                if self._claim is not None:
                    self._claim.renew()
                remove_leftovers(self.path)
        return Saving(self.path, prepared, text, step, self._comm, self._writer)

    def _complete(self, saving: Saving, best: bool) -> Path:
        saving.complete()
        with self._comm.shared_errors(), explained(self.path):
            if self._comm.rank == 0:
                if self._claim is not None:
                    self._claim.check()
                saving.commit(best)
        # In the background: to remove a large file takes as long as half of its writing.
        self._removal = self._remover.submit(self._retain, saving.step)
        return self.path / file_name(saving.step)

    def _retain(self, newest: int) -> None:
        """Remove old checkpoints, and the parts of a replaced one. No MPI."""
        if self._comm.rank != 0 or (self._claim is not None and not self._claim.holds):
            return
        # Those after the newest are left: the run was resumed before them and will replace them when it gets there.
        steps = [step for step in saved_steps(self.path) if step <= newest]
        best = named_step(self.path, BEST)
        for step in steps[: -self._keep_last]:
            if step != best and (self._keep_every == 0 or step % self._keep_every):
                (self.path / file_name(step)).unlink(missing_ok=True)
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


def as_text(metadata: Mapping[str, Any]) -> str:
    """JSON, or `InvalidInput` if it cannot hold the metadata."""
    try:
        return json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"checkpoint: the metadata cannot be saved as JSON ({error}); make arrays of it") from error


def remove_leftovers(directory: Path) -> None:
    """Remove temporaries, and directories of parts to which no checkpoint belongs; make a link that lies ready."""
    if is_ready(directory):
        os.replace(directory / READY, directory / LATEST)
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
        return index.parts == parts.name
    except InvalidInput:
        return file.exists()


def remove(path: Path) -> None:
    """Remove a file, link or directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
