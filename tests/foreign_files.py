"""Checkpoints as somebody else may have made them: changed, and sealed again so that all checksums are right."""

import json
from contextlib import contextmanager

import h5py
import numpy as np

from apts_mpi.checkpoint import seals

INDEX, METADATA = "checkpoint/index", "checkpoint/metadata"


@contextmanager
def resealed(path):
    """The file without its seal in the block; afterwards with another one. Returns what `seal` does in a list."""
    with path.open("r+b") as file:
        file.truncate(sum(seals.SealedFile(path).regions[-1][:2]))
    checksum = []
    yield checksum
    checksum.append(seals.seal(path, []))


@contextmanager
def as_hdf5(path):
    """The file, open to be changed."""
    with resealed(path) as checksum, h5py.File(path, "r+", libver=("v110", "v110"), locking=False) as file:
        yield file
    return checksum


def get_text(file, name):
    return json.loads(file[name][()].tobytes())


def set_text(file, name, value):
    """Replace one of the two texts; what is no text already is made JSON."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    del file[name]
    file[name] = np.frombuffer(text, np.uint8)


def change_index(path, change):
    """Let a function change the index in place, or return another one."""
    change_text(path, INDEX, change)


def change_metadata(path, change):
    """The same of the metadata."""
    change_text(path, METADATA, change)


def change_text(path, name, change):
    with as_hdf5(path) as file:
        value = get_text(file, name)
        changed = change(value)
        set_text(file, name, value if changed is None else changed)


def change_part(path, number, change):
    """Let a function change a part as an open file of HDF5; the index of the main file names its new checksum."""
    with h5py.File(path, "r", locking=False) as file:
        parts = path.parent / get_text(file, INDEX)["parts"]
    part = sorted(parts.iterdir())[number]
    with resealed(part) as checksum, h5py.File(part, "r+", libver=("v110", "v110"), locking=False) as file:
        change(file)

    def rename(index):
        index["checksums"][number] = checksum[0]

    change_index(path, rename)


def put(tree, place, value):
    """Put a value into nested objects and lists, at the place of a path of keys; `...` takes it away."""
    *inner, last = place
    for key in inner:
        tree = tree[key]
    if value is ...:
        del tree[last]
    else:
        tree[last] = value


def set_array(path, name, values):
    """Put other values, of another shape or type too, into the place of an array."""
    with as_hdf5(path) as file:
        if name in file:
            del file[name]
        file[name] = values
        index = get_text(file, INDEX)
        described = {"name": name, "shape": values.shape, "dtype": values.dtype.str}
        index["arrays"] = [*(array for array in index["arrays"] if array["name"] != name), described]
        set_text(file, INDEX, index)
