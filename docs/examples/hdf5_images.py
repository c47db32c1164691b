"""Images of bytes in an HDF5 file, larger than the memory that a process may use, and a network for them.

python hdf5_images.py images.h5 400
mpirun -n 2 python -m apts_mpi.train --problem hdf5:images.h5 --network hdf5_images.py:network --batch-size 200
"""

import sys

import h5py
import numpy as np
from torch import nn

SIDE, CLASSES = 64, 4


def network(channels: int = 4):
    """Two convolutions over images of three colours, and a linear layer; ``--network.args.channels 8`` has more."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 5, stride=4, padding=2),
        nn.ReLU(),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * channels, CLASSES),
    )


def write(path: str, megabytes: int, piece: int = 100):
    """A file of random images, the brightest quarter of which is their class, a piece at a time."""
    draws, count = np.random.default_rng(0), megabytes * 1_000_000 // (3 * SIDE * SIDE)
    with h5py.File(path, "w") as file:
        for name, samples in (("train", count), ("test", max(1, count // 10))):
            images = file.create_dataset(f"{name}/inputs", (samples, 3, SIDE, SIDE), np.uint8)
            classes = file.create_dataset(f"{name}/targets", (samples,), np.int32)
            for start in range(0, samples, piece):
                stop = min(start + piece, samples)
                labels = draws.integers(0, CLASSES, stop - start)
                pixels = draws.integers(0, 128, (stop - start, 3, SIDE, SIDE), np.uint8)
                for pixel, label in zip(pixels, labels, strict=True):
                    row, column = divmod(int(label), 2)
                    half = SIDE // 2
                    pixel[:, row * half : (row + 1) * half, column * half : (column + 1) * half] += 100
                images[start:stop], classes[start:stop] = pixels, labels


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]))
