"""Small files of images and labels, in the format of the MNIST family."""

import struct

import numpy as np

from apts_mpi.problems import idx

TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS = idx.FILES


def idx_bytes(array, magic=None):
    header = struct.pack(f">{1 + array.ndim}I", magic or 0x0800 + array.ndim, *array.shape)
    return header + array.tobytes()


def write_dataset(directory, compress=lambda content: content, suffix="", train=6, test=3):
    random = np.random.default_rng(0)
    arrays = {}
    for images_name, labels_name, count in ((TRAIN_IMAGES, TRAIN_LABELS, train), (TEST_IMAGES, TEST_LABELS, test)):
        arrays[images_name] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[labels_name] = random.integers(0, 10, count, dtype=np.uint8)
    for name, array in arrays.items():
        (directory / (name + suffix)).write_bytes(compress(idx_bytes(array)))
    return arrays
