"""What is in a checkpoint file, and its reader.

Every array is a dataset under its own name, whole, whichever ranks wrote it. Beside them lie two datasets with the
bytes of a JSON text: ``checkpoint/metadata`` and ``checkpoint/index`` (step, arrays and parts). The *parts* are further
files, in a directory beside this one, with the slabs of each rank, which virtual datasets show as whole arrays.
Checksums are behind the end of the HDF5 file, see `apts_mpi.checkpoint.seals`.

A file may come from anywhere. Nothing of it is used before it is known to be what a checkpoint is: the seal, the index
(`apts_mpi.checkpoint.index`) and what HDF5 makes of the file (`apts_mpi.checkpoint.structure`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from apts_mpi.checkpoint.claim import is_same
from apts_mpi.checkpoint.index import INDEX, METADATA, Index, Shaped, part_name, read_index, read_metadata
from apts_mpi.checkpoint.seals import SealedFile, damaged
from apts_mpi.checkpoint.structure import Part, check_structure, read_text
from apts_mpi.errors import InvalidInput, shown

if TYPE_CHECKING:
    from apts_mpi.parallel.communicator import Communicator


def open_file(path: Path) -> h5py.File:
    """Open for reading. Without locks, which some file systems lack: a file is never changed once it has its name."""
    return h5py.File(path, "r", locking=False)


@contextmanager
def opened(path: Path) -> Iterator[h5py.File]:
    """Open for the block, in which whatever is wrong with the file is an error that says so."""
    try:
        with open_file(path) as file:
            yield file
    except InvalidInput:
        raise
    except Exception as error:
        # HDF5 and h5py meet what they cannot read with errors of many kinds.
        raise damaged(path, shown(str(error))) from error


def read_texts(path: Path) -> tuple[SealedFile, Index, dict[str, Any]]:
    """Checksums, index and metadata of a main file, without a look at its parts; raises as `Checkpoint` does."""
    main = SealedFile(path)
    main.verify(region for region in main.regions if not region.is_slab)
    with opened(path) as file:
        try:
            index = read_index(read_text(file, INDEX), "index:")
            return main, index, read_metadata(read_text(file, METADATA), "metadata:")
        except InvalidInput as error:
            raise damaged(path, error) from error


class Checkpoint:
    """Reader of a checkpoint file; closed by `close` or at the end of a ``with`` block.

    Parameters
    ----------
    path
        The file.

    Attributes
    ----------
    path : Path
        The file.
    step : int
        When it was saved.
    metadata : dict
        What was saved beside the arrays.
    names : tuple of str
        The arrays in the order in which they were saved.
    parts : str
        Name of the directory with the slabs of the ranks; empty if the file holds them all.

    Raises
    ------
    DamagedCheckpoint
        If it is not a checkpoint, or damaged elsewhere than in the values; these are checked by `verify`.
    InvalidInput
        If it cannot be read or has a newer format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # A link may lie elsewhere than the parts, which are sought beside the file.
            place = path.resolve()
        except (OSError, RuntimeError) as error:
            raise InvalidInput(f"{path} cannot be read ({error}); give a checkpoint file") from error
        main, index, self.metadata = read_texts(place)
        self.step = index.step
        self.parts = index.parts
        self._arrays = index.arrays
        self.names = tuple(index.arrays)
        self._files = [main, *(self._open_part(place, index, rank) for rank in range(len(index.checksums)))]
        with opened(place) as file, ExitStack() as stack:
            parts = [
                Part(f"{index.parts}/{part.path.name}", stack.enter_context(opened(part.path)), part.end)
                for part in self._files[1:]
            ]
            try:
                check_structure(Part("", file, main.end), index, parts)
            except InvalidInput as error:
                raise damaged(place, error) from error
        self._file = open_file(place)
        self._place, self._known = place, os.stat(place)

    def _open_part(self, place: Path, index: Index, rank: int) -> SealedFile:
        """The checksums of a rank's file, which lies in the directory of parts itself."""
        part = SealedFile(place.parent / index.parts / part_name(rank))
        if part.path.is_symlink() or part.path.parent.is_symlink():
            raise damaged(part.path, "it is a link, or its directory is, which may lead anywhere")
        if part.checksum != index.checksums[rank]:
            raise damaged(part.path, f"it does not belong to {self.path}")
        part.verify(region for region in part.regions if not region.is_slab)
        return part

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of an array."""
        return self._described(name).shape

    def dtype(self, name: str) -> np.dtype:
        """Type of an array."""
        return self._described(name).dtype

    def _described(self, name: str) -> Shaped:
        if name not in self._arrays:
            raise damaged(self.path, f"it has no array {shown(name)}")
        return self._arrays[name]

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> np.ndarray:
        """Rows of an array, all from ``first_row`` on if ``rows`` is None; an array of shape () is read whole.

        Raises
        ------
        DamagedCheckpoint
            If HDF5 cannot read them, or the checkpoint was removed meanwhile.
        """
        part = slice(first_row, None if rows is None else first_row + rows) if self.shape(name) else ()
        try:
            values = np.asarray(self._file[name][part])
        except Exception as error:
            raise damaged(self.path, shown(str(error))) from error
        # HDF5 shows zeros for parts that are not there, and who removes a checkpoint removes its main file first.
        if not is_same(self._place, self._known):
            raise damaged(self.path, "it was removed or replaced while it was read")
        return values

    def verify(self, share: int = 0, shares: int = 1) -> None:
        """Check the values, or one of ``shares`` parts of them of about as many bytes.

        Raises
        ------
        DamagedCheckpoint
            If a slab is not as it was saved.
        """
        total = sum(region.length for file in self._files for region in file.regions if region.is_slab)
        before = 0
        for file in self._files:
            chosen = []
            for region in file.regions:
                if region.is_slab:
                    # A slab belongs to the share in which its middle lies.
                    if (2 * before + region.length) * shares // (2 * total) == share:
                        chosen.append(region)
                    before += region.length
            file.verify(chosen)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_checkpoint(path: Path, comm: Communicator) -> Checkpoint:
    """Open a checkpoint on all ranks; each verifies an even share of its values. Collective.

    Raises
    ------
    SharedInvalidInput
        If it is damaged, not a checkpoint, of a newer format or cannot be read; on all ranks.
    """
    with ExitStack() as stack:
        with comm.shared_errors():
            checkpoint = stack.enter_context(Checkpoint(path))
            checkpoint.verify(comm.rank, comm.size)
        stack.pop_all()
    return checkpoint
