"""What is in a checkpoint file, and its reader.

Every array is a dataset under its own name, whole, whichever ranks wrote it. Beside them lie two datasets with the
bytes of a JSON text: ``checkpoint/metadata`` and ``checkpoint/index`` (step, arrays and parts). The *parts* are further
files, in a directory beside this one, with the slabs of each rank, which virtual datasets show as whole arrays.
Checksums are behind the end of the HDF5 file, see `apts_mpi.checkpoint.seals`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from apts_mpi.checkpoint.arrays import Array
from apts_mpi.checkpoint.seals import SealedFile, damaged

if TYPE_CHECKING:
    from apts_mpi.parallel.communicator import Communicator

GROUP = "checkpoint"
INDEX, METADATA = f"{GROUP}/index", f"{GROUP}/metadata"


def describe(arrays: Sequence[Array], step: int, parts: str, checksums: Sequence[int]) -> str:
    """The text of the index. ``checksums`` are those that `seal` returned for the files in directory ``parts``."""
    listed = [{"name": array.name, "shape": array.shape, "dtype": array.dtype.str} for array in arrays]
    return json.dumps({"step": step, "arrays": listed, "parts": parts, "checksums": checksums})


def part_name(rank: int) -> str:
    """Name of a rank's file in the directory of parts."""
    return f"{rank:04d}.h5"


def open_file(path: Path) -> h5py.File:
    """Open for reading. Without locks, which some file systems lack: a file is never changed once it has its name."""
    return h5py.File(path, "r", locking=False)


def read_texts(path: Path) -> tuple[SealedFile, dict[str, Any], dict[str, Any]]:
    """Checksums, index and metadata of a main file, without a look at its parts; raises as `Checkpoint` does."""
    main = SealedFile(path)
    main.verify(region for region in main.regions if not region.is_slab)
    try:
        with open_file(path) as file:
            index, metadata = (json.loads(file[name][()].tobytes()) for name in (INDEX, METADATA))
    except Exception as error:
        # HDF5 and h5py meet what they cannot read with errors of many kinds.
        raise damaged(path, error) from error
    return main, index, metadata


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
        # A link may lie elsewhere than the parts, which are sought beside the file.
        place = path.resolve()
        main, index, self.metadata = read_texts(place)
        self.step: int = index["step"]
        self.parts: str = index["parts"]
        self._shapes = {array["name"]: tuple(array["shape"]) for array in index["arrays"]}
        self._dtypes = {array["name"]: np.dtype(array["dtype"]) for array in index["arrays"]}
        self.names = tuple(self._shapes)
        self._files = [main]
        for rank, expected in enumerate(index["checksums"]):
            part = SealedFile(place.parent / self.parts / part_name(rank))
            if part.checksum != expected:
                raise damaged(part.path, f"it does not belong to {path}")
            part.verify(region for region in part.regions if not region.is_slab)
            self._files.append(part)
        self._file = open_file(place)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of an array."""
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        """Type of an array."""
        return self._dtypes[name]

    def read(self, name: str, first_row: int = 0, rows: int | None = None) -> np.ndarray:
        """Rows of an array, all from ``first_row`` on if ``rows`` is None; an array of shape () is read whole.

        Raises
        ------
        DamagedCheckpoint
            If HDF5 cannot read them.
        """
        part = slice(first_row, None if rows is None else first_row + rows) if self.shape(name) else ()
        try:
            return np.asarray(self._file[name][part])
        except Exception as error:
            raise damaged(self.path, error) from error

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
