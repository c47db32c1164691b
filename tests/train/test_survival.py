"""What a cluster does to a run: signals, a wall time, killed ranks, damaged files, full disks.

To real jobs where it is done to processes; else within those of the tests.
"""

import itertools
import json
import os
import resource
import signal
import time

import networks
import pytest
import torch
from mpi4py import MPI
from processes import PROBLEM, SMALL, Job, needs_mpirun, start
from run_files import arrays, history

from apts_mpi.checkpoint import Checkpoint, resolve
from apts_mpi.train.__main__ import main
from apts_mpi.train.options import TrainingOptions, as_seconds

FAILED, USAGE, REQUEUE = 1, 2, 75

# Learns on for ever, and saves after each iteration.
ENDLESS = [*SMALL, "--epochs=1000000", "--checkpoint-every=1", "--run-dir=run"]


def assert_goes_on(directory, ranks):
    """The run in ``run``, resumed, becomes the one that was never stopped, to the bit."""
    iterations = len([record for record in history(directory / "run") if "rho" in record]) + 5
    with Checkpoint(resolve(directory / "run" / "checkpoints")) as checkpoint:
        assert 0 < checkpoint.step <= iterations - 5
    # The options are those of the checkpoint, but for the ones that are given.
    done = start(directory, ranks, [PROBLEM, "--resume", "--run-dir=run", f"--max-iterations={iterations}"])
    assert done.returncode == 0 and "resumed after iteration" in done.stdout, done.stdout + done.stderr
    endless = [option for option in ENDLESS if not option.startswith("--run-dir")]
    assert start(directory, ranks, [*endless, "--run-dir=whole", f"--max-iterations={iterations}"]).returncode == 0
    assert history(directory / "run") == history(directory / "whole")
    assert arrays(directory / "run") == arrays(directory / "whole")


@pytest.mark.mpi
def test_resumed_in_the_middle_of_an_epoch(world, directory, trained):
    """The batches are 2 an epoch; the configuration comes from the checkpoint."""
    trained(*SMALL, "--run-dir=run", "--epochs=4", "--max-iterations=3")
    trained(PROBLEM, "--resume", "--run-dir=run", "--max-iterations=7")
    trained(*SMALL, "--run-dir=whole", "--epochs=4", "--max-iterations=7")
    if world.rank == 0:
        assert history(directory / "run") == history(directory / "whole")
        assert arrays(directory / "run") == arrays(directory / "whole")
        summaries = [json.loads((directory / name / "summary.json").read_text()) for name in ("run", "whole")]
        for name in ("iterations", "epochs", "train_loss", "accepted_steps", "gradient_evaluations"):
            assert summaries[0][name] == summaries[1][name]


@pytest.mark.mpi(min_size=3)
@pytest.mark.all_sizes
def test_other_ranks_go_on_with_as_many_subdomains(world, directory, trained_on):
    """Also where their number was left to the number of ranks."""
    alone = [option for option in SMALL if not option.startswith("--subdomains")]
    trained_on(2, *alone, "--run-dir=run", "--epochs=9", "--max-iterations=3", "--checkpoint-every=2")
    trained_on(1, PROBLEM, "--resume=run/checkpoints/step-00000002.h5", "--run-dir=third", "--max-iterations=6")
    trained_on(3, PROBLEM, "--run-dir=run", "--resume", "--max-iterations=6")
    trained_on(2, *alone, "--run-dir=whole", "--epochs=9", "--max-iterations=6")
    if world.rank > 0:
        return
    ends = [history(directory / name)[-1]["train_loss"] for name in ("run", "whole", "third")]
    assert ends == pytest.approx([ends[0]] * 3, rel=1e-10)
    with Checkpoint(resolve(directory / "third" / "checkpoints")) as checkpoint:
        assert len(checkpoint.metadata["solver"]["subdomains"]) == 2


def test_resume_begins_anew_where_nothing_was_saved(directory, trained):
    """The same command line serves a batch job at first and after each requeue."""
    (directory / "run").mkdir()
    (directory / "run" / "history.jsonl").write_text("{}")  # of a job that was killed early
    output = trained(*SMALL, "--run-dir=run", "--resume")
    assert "has no checkpoint yet: a new run begins" in output
    assert "nothing" not in trained(*SMALL, "--run-dir=run", "--resume")
    assert len(history(directory / "run")) == 3


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
def test_stopped_in_every_way_and_gone_on_with(tmp_path):
    """A job that is signalled or at the end of its wall time saves and asks for requeue; each goes on from the last."""
    # Saved because it was asked to stop: the next save of its own would be in ten minutes.
    first = Job(tmp_path, 2, [argument for argument in ENDLESS if "checkpoint-every" not in argument])
    first.wait_for("epoch 3 ")
    assert_stops(first, signal.SIGTERM)

    second = Job(tmp_path, 2, [*ENDLESS, "--resume"])
    second.wait_for("\nepoch ")
    refused = start(tmp_path, 2, [*ENDLESS, "--resume"])
    assert refused.returncode == USAGE
    assert refused.stderr.count("another run saves checkpoints into it") == 1
    assert second.process.poll() is None
    assert_stops(second, signal.SIGUSR1)

    begun = time.monotonic()
    status, output = Job(tmp_path, 2, [*ENDLESS, "--resume", "--walltime=00:00:06"]).end()
    assert status == REQUEUE and "the wall time is nearly over" in output
    assert time.monotonic() - begun > 5.0
    assert_goes_on(tmp_path, 2)


def assert_stops(job, number):
    """A signal to mpirun stops the job, which says how to go on."""
    job.process.send_signal(number)
    status, output = job.end()
    assert status == REQUEUE, output
    assert output.count(f"{number.name} was received: go on with --resume --run-dir run {PROBLEM}") == 1
    assert not (job.path.parent / "run" / "summary.json").exists()


@pytest.mark.processes
def test_signal_to_a_run_without_mpirun(tmp_path):
    job = Job(tmp_path, None, ENDLESS)
    job.wait_for("epoch 2 ")
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == REQUEUE


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
def test_killed_rank_ends_the_job_and_the_run_goes_on(tmp_path):
    """SIGKILL during a step, or a save: the job saves after each iteration."""
    job = Job(tmp_path, 3, ENDLESS)
    job.wait_for("epoch 3 ")
    os.kill(job.ranks()[1], signal.SIGKILL)
    killed = time.monotonic()
    status, _ = job.end()
    assert status not in (0, REQUEUE)
    assert time.monotonic() - killed < 60.0
    assert_goes_on(tmp_path, 3)


def test_damaged_newest_checkpoint_is_told_and_the_one_before_used(directory, trained):
    trained(*SMALL, "--run-dir=run", "--epochs=9", "--max-iterations=6", "--checkpoint-every=2")
    newest = directory / "run" / "checkpoints" / "step-00000006.h5"
    contents = bytearray(newest.read_bytes())
    contents[len(contents) // 2] ^= 16
    newest.write_bytes(contents)
    output = trained(*SMALL, "--run-dir=run", "--resume", "--epochs=9", "--max-iterations=8")
    assert output.count("warning:") == 1 and "step-00000006.h5 is damaged" in output
    assert "resumed after iteration 4" in output
    trained(*SMALL, "--run-dir=whole", "--epochs=9", "--max-iterations=8")
    assert history(directory / "run") == history(directory / "whole")
    for damaged in (directory / "run" / "checkpoints").glob("step-*.h5"):
        damaged.write_bytes(b"not HDF5")
    output = trained(*SMALL, "--run-dir=run", "--resume", status=USAGE)
    assert "no checkpoint that can be used" in output and "Traceback" not in output


@pytest.mark.parametrize(
    "options, words",
    [
        (["--batch-size=20"], "batch_size: 20 differs from the 30 with which"),
        (["--dtype=float32"], "dtype: 'float32' differs from the 'float64'"),
        (["--optimizer=adam"], "optimizer: 'adam' differs from the 'apts'"),
        (["--seed=3"], "seed: 3 differs from the 0"),
        (["--resume=elsewhere"], "resume: 'elsewhere' does not exist"),
        (["--resume=run/checkpoints/latest", "--run-dir=other"], "run_dir: 'other' already holds a run"),
        (["--resume=foreign.h5"], "foreign.h5 is not a checkpoint of apts_mpi"),
        (["--walltime=90"], "walltime: '90'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_go_on_is_told(saved_run, monkeypatch, command, options, words):
    monkeypatch.chdir(saved_run)
    (saved_run / "foreign.h5").write_bytes(bytes(5000))
    resumed = ["--resume", "--run-dir=run", *options]
    if any(option.startswith("--resume=") for option in options):
        resumed = options
    status, _, errors = command(*SMALL, *resumed)
    assert status == USAGE
    assert errors.startswith("apts_mpi.train: error: ") and words in errors.replace("\n", " ")
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """Directory with a run and another one, which must not be touched."""
    directory = tmp_path_factory.mktemp("saved")
    main([*SMALL, f"--run-dir={directory}/run", "--epochs=9", "--max-iterations=3"])
    main([*SMALL, f"--run-dir={directory}/other"])
    return directory


@pytest.mark.processes
def test_failing_save_is_told_and_the_run_goes_on(tmp_path):
    """The process may write no file as large as a checkpoint, which has 360 kB: as with a quota, or a full disk."""
    job = Job(
        tmp_path,
        None,
        "--problem=digits --local.solver=adam --epochs=1000000 --checkpoint-every=2s --run-dir=run".split(),
    )
    job.wait_for("epoch 1 ")
    # The records of the run are not as large before five seconds, on a fast machine.
    resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (300_000, 300_000))
    job.wait_for("could not be saved, training goes on")
    job.process.send_signal(signal.SIGTERM)
    status, output = job.end()
    assert status == FAILED
    assert output.count("apts_mpi.train: error: the last checkpoint could not be saved") == 1
    assert "Traceback" not in output
    assert list((tmp_path / "run" / "checkpoints").glob("*step*")) == []


def drifting():
    """On rank 1 a weight changes by itself, after some iterations on any number of ranks."""
    network, _, data = networks.problem()
    calls = itertools.count(1)

    def loss(outputs, targets):
        if next(calls) == 60 and MPI.COMM_WORLD.rank == 1:
            with torch.no_grad():
                network[0].weight.data[0, 0] += 1e-12
        return networks.cross_entropy(outputs, targets)

    return network, loss, data


@pytest.mark.mpi(min_size=2)
@pytest.mark.all_sizes
def test_rank_that_drifts_is_named_and_its_state_not_saved(world, directory, command):
    status, _, errors = command(*ENDLESS, "--problem=test_survival:drifting", "--checkpoint-keep-last=100")
    assert status == FAILED
    if world.rank > 0:
        return
    assert errors.count("apts_mpi.train: error: after iteration") == 1 and "rank 1 has other parameters" in errors
    with Checkpoint(resolve(directory / "run" / "checkpoints")) as checkpoint:
        last = checkpoint.step
    assert 0 < last == len([record for record in history(directory / "run") if "rho" in record]) - 1


class Drifting(torch.nn.Linear):
    """Of the first stage; on rank 1, which is its second replica, it changes itself."""

    calls = 0

    def forward(self, inputs):
        self.calls += 1
        if self.calls == 20 and MPI.COMM_WORLD.rank == 1:
            self.bias.data[0] += 1e-12
        return super().forward(inputs)


def drifting_stage():
    network, loss, data = networks.problem()
    network[0] = Drifting(10, 16, dtype=network[0].weight.dtype)
    return network, loss, data


@pytest.mark.mpi(min_size=4)
def test_replica_of_a_stage_that_drifts_is_named(world, command):
    """The stages differ; each is compared among its replicas."""
    status, _, errors = command(
        *SMALL, "--epochs=1000000", "--problem=test_survival:drifting_stage", "--layout=staged", "--replicas=2",
        "--micro-batches=2",
        "--drift-check-every=1", "--stall-timeout=60", "--subdomains=2",
        "--schwarz.variant=inexact", "--schwarz.local_data=full",
    )  # fmt: skip
    assert status == FAILED
    if world.rank == 0:
        assert errors.count("apts_mpi.train: error: after iteration") == 1
        assert "rank 1 has other parameters or another solver state than rank 0" in errors


def test_saving_in_the_background(directory, trained):
    trained(*SMALL, "--run-dir=run", "--epochs=4", "--checkpoint-every=1", "--checkpoint-in-background")
    trained(*SMALL, "--run-dir=whole", "--epochs=4", "--checkpoint-keep-last=1", "--checkpoint-keep-every=3",
            "--checkpoint-every=1")  # fmt: skip
    assert arrays(directory / "run") == arrays(directory / "whole")
    kept = sorted(path.name for path in (directory / "whole" / "checkpoints").glob("step-*.h5"))
    assert kept == [f"step-{step:08d}.h5" for step in (3, 6, 8)]


def test_overwriting_a_run_removes_its_checkpoints(directory, trained):
    trained(*SMALL, "--run-dir=run", "--epochs=9")
    trained(*SMALL, "--run-dir=run", "--overwrite")
    assert [path.name for path in (directory / "run" / "checkpoints").glob("step-*.h5")] == ["step-00000002.h5"]


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_baselines_resume(directory, trained, optimizer):
    baseline = [*SMALL, "--epochs=4", f"--optimizer={optimizer}"]
    trained(*baseline, "--run-dir=run", "--max-iterations=3")
    trained(*baseline, "--run-dir=run", "--resume", "--max-iterations=7")
    trained(*baseline, "--run-dir=whole", "--max-iterations=7")
    assert history(directory / "run") == history(directory / "whole")
    assert arrays(directory / "run") == arrays(directory / "whole")


@pytest.mark.parametrize(
    "text, seconds",
    [("90s", 90.0), ("10min", 600.0), ("1.5h", 5400.0), ("01:30:00", 5400.0), ("2-00:00:01", 172801.0), ("10", None),
     ("1:70:00", None), ("", None)],
)  # fmt: skip
def test_times(text, seconds):
    assert as_seconds(text) == seconds


def test_default_times_are_valid():
    assert as_seconds(TrainingOptions().checkpoint_every) == 600.0
