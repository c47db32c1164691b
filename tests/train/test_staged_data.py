"""Teams staged: a rank reads the data that its stage needs, and no more."""

import functools
from dataclasses import replace

import pytest
import torch
from image_files import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, idx_bytes, write_dataset
from mpi4py import MPI

from apts_mpi import PipelineOptions
from apts_mpi.errors import InvalidInput
from apts_mpi.problems import build
from apts_mpi.train.layouts import build_staged_problem, train_problem
from apts_mpi.train.options import TrainingOptions

STAGES = 6  # of the network at most


def staged_options(world, **changes):
    replicas = 1 if world.size <= STAGES else 2
    pipeline = PipelineOptions(micro_batches=2)
    plain = {
        "problem": "fashion-mnist",
        "layout": "staged",
        "dtype": "float64",
        "batch_size": 20,
        "stall_timeout": 60.0,
    }
    return TrainingOptions(**plain | {"replicas": replicas, "pipeline": pipeline} | changes)


def place_of(world, options):
    """Whether this rank has the first stage, and whether it has the last."""
    return world.rank < options.replicas, world.rank >= world.size - options.replicas


def held(problem):
    """Bytes of the storages of inputs and of targets, but for placeholders, which have no elements."""
    pairs = (problem.train, problem.test)
    return [sum(data[place].untyped_storage().nbytes() for data in pairs if data[place].numel()) for place in (0, 1)]


@pytest.mark.mpi
@pytest.mark.all_sizes(train_samples=33)
@pytest.mark.parametrize("train_samples", [None, 33])
def test_files_of_other_stages_are_not_looked_for(world, tmp_path, train_samples):
    write_dataset(tmp_path, train=41, test=9)
    chosen = staged_options(world, train_samples=train_samples)
    first, last = place_of(world, chosen)
    for name, needed in {TRAIN_IMAGES: first, TEST_IMAGES: first, TRAIN_LABELS: last, TEST_LABELS: last}.items():
        if not needed:
            (tmp_path / name).unlink()
    own = tmp_path if first or last else tmp_path / "absent"
    make = functools.partial(build, chosen.problem, data_dir=str(own), train_samples=train_samples, dtype=torch.float64)
    problem = build_staged_problem(make, chosen, world)
    samples = (train_samples or 41) + 9
    assert held(problem) == [first * samples * 784 * 8, last * samples * 8]
    training = train_problem(problem, replace(chosen, max_iterations=2), torch.device("cpu"), world)
    assert training.samples == (train_samples or 41)
    metrics = training.metrics()
    if world.rank == 0:
        write_dataset(tmp_path, train=41, test=9)
        plain = TrainingOptions(problem=chosen.problem, dtype="float64", batch_size=20)
        expected = train_problem(make(), plain, torch.device("cpu"), MPI.COMM_SELF).metrics()
        assert metrics == pytest.approx(expected, rel=1e-12)
    records = []
    training.run(records.append)
    assert [record["iteration"] for record in records if "rho" in record] == [1, 2]
    assert records[0]["loss"] == pytest.approx(metrics["train_loss"], rel=0.2)


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_images_and_labels_of_different_data_sets(world, tmp_path):
    arrays = write_dataset(tmp_path, train=41, test=9)
    (tmp_path / TEST_LABELS).write_bytes(idx_bytes(arrays[TEST_LABELS][:-1].copy()))
    make = functools.partial(build, "fashion-mnist", data_dir=str(tmp_path), dtype=torch.float64)
    with pytest.raises(InvalidInput, match="fashion-mnist has 9 inputs but 8 targets in its test samples"):
        build_staged_problem(make, staged_options(world), world)


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_missing_labels_are_told_by_all(world, tmp_path):
    write_dataset(tmp_path)
    (tmp_path / TRAIN_LABELS).unlink()
    make = functools.partial(build, "fashion-mnist", data_dir=str(tmp_path), dtype=torch.float64)
    with pytest.raises(InvalidInput, match=f"has no {TRAIN_LABELS} or "):
        build_staged_problem(make, staged_options(world), world)


@pytest.mark.mpi
@pytest.mark.all_sizes
def test_what_is_made_for_all_is_kept_where_it_is_needed(world):
    chosen = staged_options(world, problem="digits")
    first, last = place_of(world, chosen)
    problem = build_staged_problem(functools.partial(build, "digits", dtype=torch.float64), chosen, world)
    assert held(problem) == [first * 1797 * 64 * 8, last * 1797 * 8]
    assert len(problem.train[0]) + len(problem.test[1]) == 1797
