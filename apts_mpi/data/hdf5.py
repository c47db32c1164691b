"""Rows of datasets in HDF5 files, read by each process that needs some."""

from __future__ import annotations

import itertools
from pathlib import Path

import h5py
import numpy as np

from apts_mpi.errors import InvalidInput, shown


class FileRows:
    """Rows of a dataset, of which neighbours are read together and none twice."""

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset = dataset
        self.shape, self.dtype = dataset.shape or (), dataset.dtype

    def read(self, rows: np.ndarray) -> np.ndarray:
        """See `apts_mpi.data.source.Rows`."""
        wanted, places = np.unique(rows, return_inverse=True)
        found = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        # HDF5 takes far longer for a list of rows than for a range.
        edges = [0, *(np.flatnonzero(np.diff(wanted) > 1) + 1), len(wanted)]
        try:
            for first, last in itertools.pairwise(edges):
                if last > first:
                    source = np.s_[int(wanted[first]) : int(wanted[last - 1]) + 1]
                    self._dataset.read_direct(found, source, np.s_[int(first) : int(last)])
        except (OSError, RuntimeError, KeyError) as error:
            raise InvalidInput(
                f"{self._dataset.file.filename}: samples {wanted[0]} to {wanted[-1]} of {self._dataset.name} cannot be "
                f"read ({_reason(error)}); mend the file"
            ) from error
        return found if np.array_equal(wanted, rows) else found[places.reshape(-1)]


def open_data(path: Path) -> h5py.File:
    """A file of samples, opened by this process for itself, to be read.

    Raises
    ------
    InvalidInput
        If it is no HDF5 file, or a part of one.
    """
    if not path.is_file():
        raise InvalidInput(f"{shown(str(path))}: there is no such file; give the path of an HDF5 file")
    try:
        # Nobody writes, and file systems of clusters may have no locks.
        return h5py.File(path, "r", locking=False)
    except OSError as error:
        raise InvalidInput(
            f"{shown(str(path))}: it cannot be read as HDF5 ({_reason(error)}); give a whole HDF5 file"
        ) from error


def dataset_of(file: h5py.File, name: str) -> FileRows:
    """Rows of a dataset of the file.

    Raises
    ------
    InvalidInput
        If there is none of that name.
    """
    found = file.get(name)
    if not isinstance(found, h5py.Dataset):
        there: list[str] = []
        file.visititems(lambda name, item: there.append(name) if isinstance(item, h5py.Dataset) else None)
        words = ", ".join(there[:8]) or "no dataset at all"
        raise InvalidInput(f"{shown(file.filename)}: it has no dataset {name}; there is {words}")
    return FileRows(found)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:150]
