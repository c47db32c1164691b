"""Runs on samples that are read as they are needed: the same as on tensors, on any ranks, with workers, and resumed."""

import gc
import json
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from apts_mpi.tools.status import USAGE

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))  # of what is asked for by its name

LAYOUTS = ["--layout=replicated", "--layout=staged"]
SMALL = "--device=cpu --dtype=float64 --epochs=2 --subdomains=2 --stall_timeout=60".split()
TRAINING, HELD_OUT = 60, 20


def history(path):
    return [json.loads(line) for line in (Path(path) / "history.jsonl").read_text().splitlines()]


def losses(path):
    return [record.get("loss", record.get("train_loss")) for record in history(path)]


def write(path, *, targets=np.int64, inputs=np.uint8, **left_out):
    """A file of images of 4x4 pixels, by rank 0 for all; ``left_out`` are changes to its datasets."""
    if MPI.COMM_WORLD.rank == 0:
        draws = np.random.default_rng(0)
        with h5py.File(path, "w") as file:
            for name, count in (("train", TRAINING), ("test", HELD_OUT)):
                images = draws.integers(0, 256, (count, 4, 4))
                classes = images[:, 0, :3].argmax(1)
                kind = np.dtype(targets).kind
                file[f"{name}/inputs"] = images.astype(inputs)
                file[f"{name}/targets"] = (images[:, :2, 0] / 255 if kind == "f" else classes).astype(targets)
            for name, value in left_out.items():
                place = name.replace("_", "/")
                del file[place]
                if value is not None:
                    file[place] = value
    MPI.COMM_WORLD.Barrier()
    return str(path)


def on_tensors():
    """The same file as tensors, for `MODULE:FUNCTION`."""
    from sampled_data import images

    with h5py.File("data.h5") as file:
        pairs = [(file[f"{name}/inputs"][:], file[f"{name}/targets"][:]) for name in ("train", "test")]
    double = [(torch.from_numpy(x).double() / 255, torch.from_numpy(y)) for x, y in pairs]
    return images(), torch.nn.functional.cross_entropy, tuple(double)


@pytest.mark.mpi
@pytest.mark.all_sizes
@pytest.mark.parametrize("batch_size", [24, 60])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_trains_as_its_tensors(trained, layout, batch_size):
    write("data.h5")
    arguments = [*SMALL, layout, f"--batch_size={batch_size}"]
    if layout == "--layout=staged":
        arguments += [
            "--subdomains=3",
            "--pipeline.micro_batches=2",
            f"--replicas={2 if MPI.COMM_WORLD.size in (4, 8) else 1}",
        ]
        if MPI.COMM_WORLD.size == 8:
            arguments[-1] = "--replicas=4"
    trained("--problem=test_read_data:on_tensors", *arguments, "--run_dir=tensors")
    trained("--problem=hdf5:data.h5", "--network=sampled_data:images", *arguments, "--run_dir=file")
    assert losses("file") == losses("tensors")
    last = history("file")[-1]
    assert 0.0 <= last["test_accuracy"] <= 1.0 and last["train_loss"] < losses("file")[0]


@pytest.mark.mpi
@pytest.mark.parametrize("targets", [np.int32, np.uint8, np.float32])
def test_the_loss_is_that_of_the_targets(trained, targets):
    write("data.h5", targets=targets)
    name = "values" if targets is np.float32 else "images"
    trained("--problem=hdf5:data.h5", f"--network=sampled_data:{name}", *SMALL, "--run_dir=run")
    assert ("train_accuracy" in history("run")[-1]) == (targets is not np.float32)


@pytest.mark.mpi
def test_a_loss_and_arguments_of_the_users(trained):
    write("data.h5")
    arguments = ["--problem=hdf5:data.h5", "--network=sampled_data:images", *SMALL, "--max_iterations=1"]
    trained(*arguments, "--run_dir=plain", "--network.args.depth", "2")
    trained(*arguments, "--run_dir=half", "--loss=sampled_data:half_cross_entropy", "--network.args.depth=2")
    assert losses("half")[0] == pytest.approx(losses("plain")[0] / 2, rel=1e-12)
    assert "depth=2" in Path("half/config.yaml").read_text()
    trained("--config=half/config.yaml", "--run_dir=again")
    assert losses("again") == losses("half")


WRONG_FILES = {
    "no inputs": ({"train_inputs": None}, r"it has no dataset train/inputs; there is "),
    "no test targets": ({"test_targets": None}, "it has no dataset test/targets"),
    "counts": ({"train_targets": np.zeros(59, np.int64)}, "train/inputs: 60 samples, but 59 in .*train/targets"),
    "words": ({"train_targets": np.array([b"a"] * 60)}, r"train/targets: numbers of type \|S1 are not allowed"),
    "complex": ({"train_inputs": np.zeros((60, 4), complex)}, "train/inputs: numbers of type complex128"),
    "shapes": ({"test_inputs": np.zeros((20, 5, 5), np.uint8)}, "a sample of test/inputs has shape"),
    "types": ({"test_targets": np.zeros(20)}, "test/targets are float64, and train/targets int64"),
    "empty": ({"train_inputs": np.zeros((0, 4, 4), np.uint8)}, "train/inputs: shape .* has no samples"),
    "one number": ({"train_inputs": 3.0}, "has no samples"),
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_files_are_named_before_work_starts(command, name):
    changes, message = WRONG_FILES[name]
    write("data.h5", **changes)
    refused(command, message)


@pytest.mark.mpi
@pytest.mark.parametrize("cut", ["no HDF5", "truncated", "absent"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_file_of_samples(command, cut, layout):
    path = Path(write("data.h5"))
    if MPI.COMM_WORLD.rank == 0:
        content = path.read_bytes()
        path.unlink()
        if cut != "absent":
            path.write_bytes(b"text" * 900 if cut == "no HDF5" else content[: len(content) // 2])
    MPI.COMM_WORLD.Barrier()
    refused(command, "there is no such file" if cut == "absent" else "cannot be read as HDF5", layout)


def refused(command, message, *arguments):
    status, output, errors = command(
        "--problem=hdf5:data.h5", "--network=sampled_data:images", *SMALL, "--run_dir=run", *arguments
    )
    assert status == USAGE, output + errors
    if MPI.COMM_WORLD.rank == 0:
        assert re.search(message, " ".join(errors.split())), errors
        assert errors.count("\n") == 1
    assert not Path("run").exists()


REFUSED = {
    "no network": (["--problem=hdf5:data.h5"], "--network: hdf5:data.h5 has no network"),
    "a network too many": (["--network=sampled_data:images"], "--network: .*it is for hdf5:FILE"),
    "no function": (["--problem=hdf5:data.h5", "--network=sampled_data:pictures"], "no function 'pictures'"),
    "no loss yet": (
        ["--problem=hdf5:data.h5", "--network=sampled_data:images", "--loss=apts_mpi.losses:mse"],
        "--loss apts_mpi.losses:mse: it is not a loss, or has to be called",
    ),
    "a class of losses": (
        ["--problem=hdf5:data.h5", "--network=sampled_data:images", "--loss=torch.nn:CrossEntropyLoss"],
        "--loss torch.nn:CrossEntropyLoss: it is not a loss, or has to be called",
    ),
    "no module": (["--problem=hdf5:data.h5", "--network=sampled_data:write"], "no function 'write'"),
    "argument": (
        ["--problem=hdf5:data.h5", "--network=sampled_data:images", "--network.args.widht", "3"],
        "--network.args.widht: images has no such argument; did you mean width. it takes width, depth",
    ),
    "type": (
        ["--problem=sampled_data:problem", "--problem.args.workers=many"],
        "workers: 'many' is not allowed; .*int",
    ),
    "half": (["--problem=sampled_data:problem", "--problem.args.workers=1.5"], "workers: '1.5' is not allowed; .*int"),
    "none": (
        ["--problem=hdf5:data.h5", "--network=sampled_data:images", "--problem.args.width=3"],
        "--problem.args.width: .*it takes no arguments",
    ),
    "built-in": (
        ["--problem=digits", "--problem.args.widht=3"],
        "--problem.args.widht: digits has no such argument; did you mean width. it takes width, depth",
    ),
    "no count": (["--problem=burgers", "--problem.args.points=0"], "--problem.args.points: 0 .*give 1 or more"),
    "no integer": (["--problem=burgers", "--problem.args.points=9.5"], "points: '9.5' is not allowed; .*int"),
    "samples": (
        ["--problem=sampled_data:problem", "--problem.args.loader=weighted", "--train_samples=9"],
        "whose sampler chooses",
    ),
    "batches": (
        ["--problem=sampled_data:problem", "--problem.args.loader=weighted", "--batch_size=55"],
        "fewer samples than the 55 of a batch",
    ),
}


@pytest.mark.mpi
@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_cannot_be_used(command, name):
    write("data.h5")
    arguments, message = REFUSED[name]
    status, output, errors = command(*arguments, "--dtype=float64", "--run_dir=run")
    assert status == USAGE, output + errors
    if MPI.COMM_WORLD.rank == 0:
        assert re.search(message, " ".join(errors.split())), errors


def skip_without_stages(world, layout):
    if layout == "--layout=staged" and world.size > 2:
        pytest.skip("the network has two stages")


@pytest.mark.mpi
@pytest.mark.all_sizes(layout="--layout=replicated")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_that_cannot_be_read_ends_all_ranks(world, command, layout):
    skip_without_stages(world, layout)
    status, output, errors = command(
        "--problem=sampled_data:problem", "--problem.args.loader=broken", layout, *SMALL, "--run_dir=run"
    )
    assert status == USAGE, output + errors
    if MPI.COMM_WORLD.rank == 0:
        assert "sample 7 of Broken cannot be read ('OSError: the disk is gone')" in errors


KINDS = ["shuffled", "in order", "weighted", "own sampler", "own batches", "stream", "shards", "telling", "data set"]


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
@pytest.mark.parametrize("loader", KINDS)
def test_augmentation_and_order_do_not_depend_on_ranks(world, trained_on, loader):
    arguments = [*SMALL, "--problem=sampled_data:problem", f"--problem.args.loader={loader}"]
    trained_on(1, *arguments, "--run_dir=alone")
    trained_on(world.size, *arguments, "--run_dir=together")
    assert losses("together") == pytest.approx(losses("alone"), rel=1e-9)


@pytest.mark.mpi
@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loader", ["shuffled", "weighted", "own batches", "stream", "shards", "telling"])
def test_workers_change_nothing(world, trained, loader, layout):
    skip_without_stages(world, layout)
    arguments = [*SMALL, layout, "--problem=sampled_data:problem", f"--problem.args.loader={loader}", "--epochs=3"]
    trained(*arguments, "--run_dir=without")
    trained(*arguments, "--problem.args.workers=2", "--run_dir=with")
    assert losses("with") == losses("without")
    gc.collect()  # what a run has left in circles holds its workers


@pytest.mark.mpi
@pytest.mark.processes
@pytest.mark.parametrize("loader", ["shuffled", "weighted", "own batches", "stream", "shards", "telling", "data set"])
def test_a_resumed_run_repeats_and_skips_nothing(world, trained_on, loader):
    """Stopped within an epoch on one rank with two workers, and gone on with on all ranks."""
    arguments = [*SMALL, "--problem=sampled_data:problem", f"--problem.args.loader={loader}", "--epochs=3"]
    trained_on(world.size, *arguments, "--run_dir=whole")
    trained_on(1, *arguments, "--run_dir=parts", "--max_iterations=2", "--problem.args.workers=2")
    gc.collect()  # what a run has left in circles holds its workers
    again = ["--problem=sampled_data:problem", "--max_iterations=null"]
    trained_on(world.size, "--resume", "--run_dir=parts", *again)
    taken = [record["loss"] for record in history("whole") if "loss" in record]
    assert [record["loss"] for record in history("parts") if "loss" in record] == pytest.approx(taken, rel=1e-9)


@pytest.mark.mpi
@pytest.mark.parametrize("loader", ["stream", "shards"])
def test_a_stream_without_shards_is_said_to_be_read_by_each_rank(world, trained, loader, caplog):
    trained("--problem=sampled_data:problem", f"--problem.args.loader={loader}", *SMALL, "--max_iterations=1")
    told = [record.getMessage() for record in caplog.records if "without shards" in record.getMessage()]
    assert len(told) == (loader == "stream" and world.size > 1 and world.rank == 0)
    assert all(f"each of the {world.size} ranks reads all of it; give it num_shards" in text for text in told)
