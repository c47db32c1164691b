"""Reader of labelled images in IDX files, the format of MNIST and Fashion-MNIST.

An IDX file starts with two zero bytes, the element type (8 for unsigned bytes) and the number of dimensions;
the dimensions follow as big-endian 32-bit integers, then the elements in row-major order.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from apts_mpi.errors import InvalidInput
from apts_mpi.problems.problem import ALL, Wanted

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
CLASSES = 10

_MAGIC = {3: 0x00000803, 1: 0x00000801}
_CONTENT = {0x00000803: "images", 0x00000801: "labels"}


Pair = tuple[np.ndarray | None, np.ndarray | None]


def read_dataset(directory: str, wanted: Wanted = ALL) -> tuple[Pair, Pair]:
    """Read the training and the test set of a directory with the four files in `FILES`, gzipped or not.

    Parameters
    ----------
    directory : str
        The option ``--data-dir``.
    wanted : Wanted
        Images are the inputs, labels the targets.

    Returns
    -------
    (train_images, train_labels), (test_images, test_labels)
        Arrays of uint8, (n, rows, columns) and (n,), labels below `CLASSES`; None in the place of what is not wanted,
        whose files are not looked for.

    Raises
    ------
    InvalidInput
        When the directory or a file is missing, unreadable, truncated, corrupt or mislabelled.
    """
    if not (wanted.inputs or wanted.targets):
        return (None, None), (None, None)
    if not Path(directory).is_dir():
        raise InvalidInput(f"--data-dir {directory} is not a directory: give one that holds {_expected_files()}")
    kinds = (wanted.inputs, wanted.targets) * 2
    paths = [_find(directory, name) if kind else None for name, kind in zip(FILES, kinds, strict=True)]
    return _read_pair(paths[0], paths[1]), _read_pair(paths[2], paths[3])


def _expected_files() -> str:
    return ", ".join(FILES) + " (each plain or .gz)"


def _find(directory: str, name: str) -> Path:
    for candidate in (Path(directory, name), Path(directory, name + ".gz")):
        if candidate.is_file():
            return candidate
    raise InvalidInput(f"--data-dir {directory} has no {name} or {name}.gz: it must hold {_expected_files()}")


def _read_pair(images_path: Path | None, labels_path: Path | None) -> Pair:
    images = None if images_path is None else read_idx(images_path, 3)
    labels = None if labels_path is None else read_idx(labels_path, 1)
    if images is not None and labels is not None and len(images) != len(labels):
        raise InvalidInput(
            f"{images_path} has {len(images)} images and {labels_path} has {len(labels)} labels: "
            "take both from the same data set"
        )
    if labels is not None and len(wrong := np.flatnonzero(labels >= CLASSES)):
        raise InvalidInput(
            f"{labels_path}: label {wrong[0]} is {labels[wrong[0]]}, outside 0..{CLASSES - 1}: fetch the file again"
        )
    return images, labels


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read one IDX file of unsigned bytes.

    Parameters
    ----------
    path : Path
        Decompressed on the way when its name ends in ``.gz``.
    dimensions : int
        3 for images, 1 for labels.

    Returns
    -------
    ndarray of uint8 with that many dimensions

    Raises
    ------
    InvalidInput
        When the file cannot be read or is not such a file, whole.
    """
    content = _read_bytes(path)
    header = 4 + 4 * dimensions
    _check_magic(path, content, _MAGIC[dimensions])
    if len(content) < header:
        raise InvalidInput(
            f"{path} is truncated: its header takes {header} bytes, the file has {len(content)}: fetch it again"
        )
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    expected = header + math.prod(shape)
    if len(content) != expected:
        fault = "is truncated" if len(content) < expected else "is too long"
        raise InvalidInput(
            f"{path} {fault}: its header announces {expected} bytes, the file has {len(content)}: fetch it again"
        )
    if math.prod(shape) == 0:
        raise InvalidInput(f"{path} is empty: its header announces the shape {shape}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InvalidInput(f"{path} is not a whole gzip file ({error}): fetch it again") from error
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error}") from error


def _check_magic(path: Path, content: bytes, expected: int) -> None:
    if len(content) < 4:
        raise InvalidInput(
            f"{path} is truncated: its magic number takes 4 bytes, the file has {len(content)}: fetch it again"
        )
    found = struct.unpack(">I", content[:4])[0]
    if found != expected:
        held = _CONTENT.get(found, "no images or labels of unsigned bytes")
        raise InvalidInput(
            f"{path} should hold {_CONTENT[expected]} but holds {held} (magic number {found}, "
            f"not {expected}): give each file its own name"
        )
