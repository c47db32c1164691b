"""IDX files and the image problems; the files are small ones written here."""

import gzip

import numpy as np
import pytest
import torch
from image_files import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, idx_bytes, write_dataset
from torch.func import functional_call, jvp

from apts_mpi import problems
from apts_mpi.errors import InvalidInput
from apts_mpi.problems import idx, images


def assert_fault(directory, *messages):
    with pytest.raises(InvalidInput) as raised:
        idx.read_dataset(str(directory))
    for message in messages:
        assert message in str(raised.value)


@pytest.mark.parametrize(("compress", "suffix"), [(lambda content: content, ""), (gzip.compress, ".gz")])
def test_reads_plain_and_gzipped(tmp_path, compress, suffix):
    arrays = write_dataset(tmp_path, compress, suffix)
    (train_images, train_labels), (test_images, test_labels) = idx.read_dataset(str(tmp_path))
    assert np.array_equal(train_images, arrays[TRAIN_IMAGES]) and np.array_equal(train_labels, arrays[TRAIN_LABELS])
    assert np.array_equal(test_images, arrays[TEST_IMAGES]) and np.array_equal(test_labels, arrays[TEST_LABELS])


def test_missing_directory(tmp_path):
    assert_fault(tmp_path / "absent", "absent", "not a directory", *idx.FILES)


@pytest.mark.parametrize("name", idx.FILES)
def test_missing_file(tmp_path, name):
    write_dataset(tmp_path)
    (tmp_path / name).unlink()
    assert_fault(tmp_path, f"has no {name} or {name}.gz", *idx.FILES)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "magic number takes 4 bytes, the file has 0"),
        (3, "magic number takes 4 bytes, the file has 3"),
        (9, "header takes 16 bytes, the file has 9"),
        (16, "header announces 4720 bytes, the file has 16"),
        (4719, "header announces 4720 bytes, the file has 4719"),
    ],
)
def test_truncated(tmp_path, length, message):
    write_dataset(tmp_path)
    path = tmp_path / TRAIN_IMAGES
    path.write_bytes(path.read_bytes()[:length])
    assert_fault(tmp_path, TRAIN_IMAGES, "truncated", message)


def test_too_long(tmp_path):
    write_dataset(tmp_path)
    path = tmp_path / TEST_LABELS
    path.write_bytes(path.read_bytes() + b"x")
    assert_fault(tmp_path, "t10k-labels-idx1-ubyte is too long", "announces 11 bytes, the file has 12")


def test_empty(tmp_path):
    write_dataset(tmp_path, test=0)
    assert_fault(tmp_path, TEST_IMAGES, "(0, 28, 28)")


@pytest.mark.parametrize("damage", [lambda c: c[:30], lambda c: b"x" + c, lambda c: c[:40] + bytes(50) + c[90:]])
def test_corrupt_gzip(tmp_path, damage):
    write_dataset(tmp_path, gzip.compress, ".gz")
    path = tmp_path / (TRAIN_IMAGES + ".gz")
    path.write_bytes(damage(path.read_bytes()))
    assert_fault(tmp_path, TRAIN_IMAGES + ".gz", "not a whole gzip file")


def test_unreadable(tmp_path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(InvalidInput, match=r"plain cannot be read: .*directory"):
        idx.read_idx(tmp_path / "plain", 3)


def test_labels_in_the_place_of_images(tmp_path):
    arrays = write_dataset(tmp_path)
    (tmp_path / TRAIN_IMAGES).write_bytes(idx_bytes(arrays[TRAIN_LABELS]))
    assert_fault(tmp_path, TRAIN_IMAGES, "should hold images but holds labels", "2049, not 2051")


def test_images_in_the_place_of_labels(tmp_path):
    arrays = write_dataset(tmp_path)
    (tmp_path / TEST_LABELS).write_bytes(idx_bytes(arrays[TEST_IMAGES]))
    assert_fault(tmp_path, TEST_LABELS, "should hold labels but holds images", "2051, not 2049")


def test_wrong_magic(tmp_path):
    arrays = write_dataset(tmp_path)
    (tmp_path / TRAIN_IMAGES).write_bytes(idx_bytes(arrays[TRAIN_IMAGES], magic=0x0D03))
    assert_fault(tmp_path, "should hold images but holds no images or labels of unsigned bytes", "3331")


def test_counts_disagree(tmp_path):
    arrays = write_dataset(tmp_path)
    (tmp_path / TRAIN_LABELS).write_bytes(idx_bytes(arrays[TRAIN_LABELS][:5]))
    assert_fault(tmp_path, "has 6 images", "has 5 labels")


def test_label_out_of_range(tmp_path):
    arrays = write_dataset(tmp_path)
    labels = arrays[TRAIN_LABELS].copy()
    labels[4] = 10
    (tmp_path / TRAIN_LABELS).write_bytes(idx_bytes(labels))
    assert_fault(tmp_path, TRAIN_LABELS, "label 4 is 10, outside 0..9")


@pytest.mark.parametrize("name", ["fashion-mnist", "fashion-mnist-cnn", "fashion-mnist-resnet"])
def test_fashion_mnist(tmp_path, name):
    arrays = write_dataset(tmp_path)
    problem = problems.build(name, data_dir=str(tmp_path), dtype=torch.float64)
    inputs, labels = problem.train
    raw = arrays[TRAIN_IMAGES].reshape(6, 784)
    np.testing.assert_allclose(inputs.numpy(), (raw - raw.mean()) / raw.std(), rtol=1e-12)
    test_raw = arrays[TEST_IMAGES].reshape(3, 784)
    np.testing.assert_allclose(problem.test[0].numpy(), (test_raw - raw.mean()) / raw.std(), rtol=1e-12)
    assert labels.tolist() == arrays[TRAIN_LABELS].tolist() and labels.dtype == torch.int64
    assert problem.accuracy and isinstance(problem.network, torch.nn.Sequential)
    assert problem.network(inputs).shape == (6, 10)


def test_fashion_mnist_of_another_size(tmp_path):
    arrays = write_dataset(tmp_path)
    (tmp_path / TEST_IMAGES).write_bytes(idx_bytes(arrays[TEST_IMAGES][:, :8, :8].copy()))
    with pytest.raises(InvalidInput, match=r"\(8, 8\) pixels: fashion-mnist takes 28x28"):
        problems.build("fashion-mnist", data_dir=str(tmp_path))


def test_fashion_mnist_default_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "FASHION_MNIST_DIRECTORY", str(tmp_path / "absent"))
    with pytest.raises(InvalidInput, match="install the Debian package dataset-fashion-mnist, or give --data-dir"):
        problems.build("fashion-mnist")
    write_dataset(tmp_path)
    monkeypatch.setattr(images, "FASHION_MNIST_DIRECTORY", str(tmp_path))
    assert len(problems.build("fashion-mnist").train[0]) == 6


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")  # torch.func's own.
def test_resnet_jacobian_products_in_evaluation_mode(tmp_path):
    """In training mode batch normalisation writes its buffers, which transforms of torch.func forbid."""
    write_dataset(tmp_path)
    problem = problems.build("fashion-mnist-resnet", data_dir=str(tmp_path), dtype=torch.float64)
    network = problem.network.eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():  # Zero biases would put many ReLUs on their kink.
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    parameters = {name: value.detach() for name, value in network.named_parameters()}
    tangents = {name: torch.ones_like(value) for name, value in parameters.items()}

    def outputs(step):
        values = {name: value + step * tangents[name] for name, value in parameters.items()}
        return functional_call(network, values, (problem.train[0],))

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    _, product = jvp(outputs, (zero,), (one,))
    difference = (outputs(1e-7) - outputs(-1e-7)) / 2e-7
    torch.testing.assert_close(product, difference.detach(), rtol=1e-5, atol=1e-5)


def test_digits_are_split_and_standardised():
    problem = problems.build("digits", dtype=torch.float64)
    (inputs, labels), (test_inputs, test_labels) = problem.train, problem.test
    assert inputs.shape == (1438, 64) and test_inputs.shape == (359, 64)
    assert abs(inputs.mean()) < 1e-12 and abs(inputs.std(correction=0) - 1) < 1e-12
    # 182 pictures of a three and 1,797 of all digits: the published counts of the data set.
    everything = torch.cat([labels, test_labels])
    assert torch.bincount(everything).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert torch.bincount(test_labels, minlength=10).min() > 20
    levels = torch.cat([inputs, test_inputs]).unique()
    torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(16))


@pytest.mark.parametrize("name", ["digits", "digits-cnn"])
def test_adam_learns_the_digits(name):
    problem = problems.build(name, seed=1)
    optimizer = torch.optim.Adam(problem.network.parameters(), lr=3e-3)
    inputs, targets = problem.train
    generator = torch.Generator().manual_seed(0)
    for _ in range(problem.epochs if name == "digits" else 15):
        for rows in torch.randperm(len(inputs), generator=generator).split(problem.batch_size):
            optimizer.zero_grad()
            problem.loss(problem.network(inputs[rows]), targets[rows]).backward()
            optimizer.step()
    accuracy = (problem.network(problem.test[0]).argmax(-1) == problem.test[1]).double().mean()
    assert accuracy > 0.96
