"""Classification of small grey images: handwritten digits and Fashion-MNIST.

All the networks are an ``nn.Sequential`` of flat images, (b, pixels), to scores of ten classes, (b, 10). ``width`` is
that of the hidden layers; in a convolutional network it counts the channels of the first layer, twice or four times
which the later ones have.
"""

import functools
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from apts_mpi.errors import InvalidInput
from apts_mpi.problems import idx
from apts_mpi.problems.layers import mlp
from apts_mpi.problems.problem import ALL, Problem, Wanted
from apts_mpi.problems.sequences import in_pairs, permuted

PIXELS = 28 * 28  # of the images that are read from files

FASHION_MNIST_DIRECTORY = "/usr/share/datasets/fashion-mnist"

# Shuffles the digits before a fifth is held out: a part of the data set, so not the seed of the run.
_DIGITS_SPLIT_SEED = 0


def digits(dtype: torch.dtype, *, width: int = 64, depth: int = 7) -> Problem:
    """Handwritten digits of 8x8 pixels with a deep, narrow ReLU network, 64-(64x7)-10."""
    network = mlp([64] + [width] * depth + [10], nn.ReLU)
    _initialise_for_depth(network)
    return _digits("digits", network, dtype)


def digits_cnn(dtype: torch.dtype, *, width: int = 16) -> Problem:
    """Handwritten digits of 8x8 pixels with three 3x3 convolutions, the first of 16 channels, the others of 32."""
    network = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * 2 * 2, 10),
    )
    return _digits("digits-cnn", network, dtype)


def fashion_mnist(
    data_dir: str | None, dtype: torch.dtype, wanted: Wanted = ALL, *, width: int = 128, depth: int = 5
) -> Problem:
    """Fashion-MNIST with a ReLU network, 784-(128x5)-10."""
    network = mlp([784] + [width] * depth + [10], nn.ReLU)
    return _fashion_mnist("fashion-mnist", network, data_dir, dtype, wanted, batch_size=2000, epochs=12)


def fashion_mnist_cnn(data_dir: str | None, dtype: torch.dtype, wanted: Wanted = ALL, *, width: int = 16) -> Problem:
    """Fashion-MNIST with four 3x3 convolutions and two linear layers."""
    network = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    return _fashion_mnist("fashion-mnist-cnn", network, data_dir, dtype, wanted, batch_size=1000, epochs=6)


def fashion_mnist_resnet(data_dir: str | None, dtype: torch.dtype, wanted: Wanted = ALL, *, width: int = 16) -> Problem:
    """Fashion-MNIST with a small residual network with batch normalisation."""
    network = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        ResidualBlock(width, width, stride=1),
        ResidualBlock(width, 2 * width, stride=2),
        ResidualBlock(2 * width, 4 * width, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )
    return _fashion_mnist("fashion-mnist-resnet", network, data_dir, dtype, wanted, batch_size=500, epochs=6)


def permuted_digits(dtype: torch.dtype, *, tasks: int = 5, width: int = 100) -> Problem:
    """Handwritten digits, of which each task after the first has the pixels in an order of its own; 64-100-100-10."""
    return permuted("permuted-digits", mlp([64, width, width, 10], nn.ReLU), digits(dtype), tasks)


def split_fashion_mnist(data_dir: str | None, dtype: torch.dtype, *, width: int = 100) -> Problem:
    """Fashion-MNIST in five pairs of classes, of which the network tells the first from the second; 784-100-100-2."""
    network = mlp([784, width, width, 2], nn.ReLU)
    return in_pairs("split-fashion-mnist", network, fashion_mnist(data_dir, dtype), classes=10)


def _initialise_for_depth(network: nn.Sequential) -> None:
    # torch's own initialisation loses the signal in eight layers: Adam ends 2 to 3 points lower on the digits.
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, added to their input (He et al., arXiv 1512.03385).

    Parameters
    ----------
    channels_in, channels_out : int
    stride : int
        Of the first convolution; where the shape changes, a 1x1 convolution adapts the input.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.convolution1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.convolution2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.shortcut = nn.Sequential()
        if channels_in != channels_out or stride != 1:
            self.shortcut.append(nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(channels_out))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.relu(self.norm1(self.convolution1(inputs)))
        return torch.relu(self.norm2(self.convolution2(hidden)) + self.shortcut(inputs))


def _digits(name: str, network: nn.Module, dtype: torch.dtype) -> Problem:
    train, test = _digits_data()
    return _classification(name, network, train, test, dtype, batch_size=240, epochs=30)


@functools.cache
def _digits_data() -> tuple[idx.Pair, idx.Pair]:
    with resources.files("apts_mpi.problems").joinpath("data", "digits.npz").open("rb") as file:
        content = np.load(file)
        images, labels = content["images"], content["labels"]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_DIGITS_SPLIT_SEED)).numpy()
    held_out, kept = np.split(order, [len(images) // 5])
    return (images[kept], labels[kept]), (images[held_out], labels[held_out])


def _fashion_mnist(
    name: str,
    network: nn.Module,
    data_dir: str | None,
    dtype: torch.dtype,
    wanted: Wanted,
    batch_size: int,
    epochs: int,
) -> Problem:
    directory = _fashion_mnist_directory(data_dir) if wanted.inputs or wanted.targets else ""
    train, test = idx.read_dataset(directory, wanted)
    for images, _ in (train, test):
        if images is not None and images.shape[1:] != (28, 28):
            raise InvalidInput(f"--data-dir {data_dir} holds images of {images.shape[1:]} pixels: {name} takes 28x28")
    return _classification(name, network, train, test, dtype, batch_size, epochs)


def _fashion_mnist_directory(data_dir: str | None) -> str:
    if data_dir is not None:
        return data_dir
    if Path(FASHION_MNIST_DIRECTORY).is_dir():
        return FASHION_MNIST_DIRECTORY
    raise InvalidInput(
        f"Fashion-MNIST is not in {FASHION_MNIST_DIRECTORY}: install the Debian package "
        f"dataset-fashion-mnist, or give --data-dir, a directory that holds {', '.join(idx.FILES)}"
    )


def _classification(
    name: str,
    network: nn.Module,
    train: idx.Pair,
    test: idx.Pair,
    dtype: torch.dtype,
    batch_size: int,
    epochs: int,
) -> Problem:
    # In the place of images or labels that are None there are zeros without memory, of one sample if both are.
    if train[0] is not None:
        mean, std = float(train[0].mean()), float(train[0].std())

    def tensors(images: np.ndarray | None, labels: np.ndarray | None) -> tuple[Tensor, Tensor]:
        count = next((len(part) for part in (images, labels) if part is not None), 1)
        pixels = torch.zeros(1, PIXELS, dtype=dtype).expand(count, -1)
        if images is not None:
            pixels = (torch.tensor(images.reshape(count, -1), dtype=dtype) - mean) / std
        classes = torch.zeros(1, dtype=torch.int64).expand(count)
        return pixels, classes if labels is None else torch.tensor(labels, dtype=torch.int64)

    return Problem(
        name=name,
        network=network.to(dtype),
        loss=cross_entropy,
        train=tensors(*train),
        test=tensors(*test),
        batch_size=batch_size,
        epochs=epochs,
        accuracy=True,
    )
