"""What a cluster does to a run, done to real jobs: signals, a wall time, killed ranks, damaged files, full disks."""

import json
import os
import resource
import signal
import time

import pytest
from processes import SMALL, Job, needs_mpirun, start
from run_files import arrays, history

from apts_mpi.checkpoint import Checkpoint, resolve
from apts_mpi.train.options import TrainingOptions, as_seconds

FAILED, USAGE, REQUEUE = 1, 2, 75

# Learns on for ever, and saves after each iteration.
ENDLESS = [*SMALL, "--epochs=1000000", "--checkpoint-every=1", "--run-dir=run"]


def run(directory, ranks, *arguments, status=0):
    """Train to the end; ``status`` is what has to come of it."""
    done = start(directory, ranks, [*SMALL, *arguments])
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def assert_goes_on(directory, ranks):
    """The run in ``run``, resumed, becomes the one that was never stopped, to the bit."""
    iterations = len([record for record in history(directory / "run") if "rho" in record]) + 5
    with Checkpoint(resolve(directory / "run" / "checkpoints")) as checkpoint:
        assert 0 < checkpoint.step <= iterations - 5
    # The options are those of the checkpoint, but for the ones that are given.
    done = start(directory, ranks, ["--resume", "--run-dir=run", f"--max-iterations={iterations}"])
    assert done.returncode == 0 and "resumed after iteration" in done.stdout, done.stdout + done.stderr
    endless = [option for option in ENDLESS if not option.startswith("--run-dir")]
    assert start(directory, ranks, [*endless, "--run-dir=whole", f"--max-iterations={iterations}"]).returncode == 0
    assert history(directory / "run") == history(directory / "whole")
    assert arrays(directory / "run") == arrays(directory / "whole")


@pytest.mark.parametrize("ranks", [None, pytest.param(2, marks=needs_mpirun)])
def test_resumed_in_the_middle_of_an_epoch(tmp_path, ranks):
    """The batches are 2 an epoch; the configuration comes from the checkpoint."""
    run(tmp_path, ranks, "--run-dir=run", "--epochs=4", "--max-iterations=3")
    done = start(tmp_path, ranks, ["--resume", "--run-dir=run", "--max-iterations=7"], PYTHONWARNINGS="error")
    assert done.returncode == 0, done.stderr
    run(tmp_path, ranks, "--run-dir=whole", "--epochs=4", "--max-iterations=7")
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert arrays(tmp_path / "run") == arrays(tmp_path / "whole")
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "whole")]
    for name in ("iterations", "epochs", "train_loss", "accepted_steps", "gradient_evaluations"):
        assert summaries[0][name] == summaries[1][name]


@needs_mpirun
def test_other_ranks_go_on_with_as_many_subdomains(tmp_path):
    """Also where their number was left to the number of ranks."""
    alone = [option for option in SMALL if not option.startswith("--subdomains")]
    first = start(tmp_path, 2, [*alone, "--run-dir=run", "--epochs=9", "--max-iterations=3", "--checkpoint-every=2"])
    assert first.returncode == 0
    middle = "run/checkpoints/step-00000002.h5"
    assert start(tmp_path, 1, [f"--resume={middle}", "--run-dir=third", "--max-iterations=6"]).returncode == 0
    assert start(tmp_path, 3, ["--run-dir=run", "--resume", "--max-iterations=6"]).returncode == 0
    assert start(tmp_path, 2, [*alone, "--run-dir=whole", "--epochs=9", "--max-iterations=6"]).returncode == 0
    ends = [history(tmp_path / name)[-1]["train_loss"] for name in ("run", "whole", "third")]
    assert ends == pytest.approx([ends[0]] * 3, rel=1e-10)
    with Checkpoint(resolve(tmp_path / "third" / "checkpoints")) as checkpoint:
        assert len(checkpoint.metadata["solver"]["subdomains"]) == 2


def test_resume_begins_anew_where_nothing_was_saved(tmp_path):
    """The same command line serves a batch job at first and after each requeue."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "history.jsonl").write_text("{}")  # of a job that was killed early
    output = run(tmp_path, None, "--run-dir=run", "--resume")
    assert "has no checkpoint yet: a new run begins" in output
    assert "nothing" not in run(tmp_path, None, "--run-dir=run", "--resume")
    assert len(history(tmp_path / "run")) == 3


@needs_mpirun
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_mpirun_saves_and_asks_for_requeue(tmp_path, number):
    job = Job(tmp_path, 2, [argument for argument in ENDLESS if "checkpoint-every" not in argument])
    job.wait_for("epoch 3 ")
    job.process.send_signal(number)
    status, output = job.end()
    assert status == REQUEUE
    assert output.count(f"{number.name} was received: go on with --resume --run-dir run") == 1
    assert not (tmp_path / "run" / "summary.json").exists()
    assert_goes_on(tmp_path, 2)


def test_signal_to_a_run_without_mpirun(tmp_path):
    job = Job(tmp_path, None, ENDLESS)
    job.wait_for("epoch 2 ")
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == REQUEUE


@needs_mpirun
def test_wall_time_stops_before_it_is_over(tmp_path):
    begun = time.monotonic()
    status, output = Job(tmp_path, 2, [*ENDLESS, "--walltime=00:00:06"]).end()
    assert status == REQUEUE and "the wall time is nearly over" in output
    assert time.monotonic() - begun > 5.0
    assert_goes_on(tmp_path, 2)


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


def test_damaged_newest_checkpoint_is_told_and_the_one_before_used(tmp_path):
    run(tmp_path, None, "--run-dir=run", "--epochs=9", "--max-iterations=6", "--checkpoint-every=2")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006.h5"
    contents = bytearray(newest.read_bytes())
    contents[len(contents) // 2] ^= 16
    newest.write_bytes(contents)
    output = run(tmp_path, None, "--run-dir=run", "--resume", "--epochs=9", "--max-iterations=8")
    assert output.count("warning:") == 1 and "step-00000006.h5 is damaged" in output
    assert "resumed after iteration 4" in output
    run(tmp_path, None, "--run-dir=whole", "--epochs=9", "--max-iterations=8")
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    for damaged in (tmp_path / "run" / "checkpoints").glob("step-*.h5"):
        damaged.write_bytes(b"not HDF5")
    output = run(tmp_path, None, "--run-dir=run", "--resume", status=USAGE)
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
def test_what_cannot_go_on_is_told(tmp_path, saved_run, options, words):
    (saved_run / "foreign.h5").write_bytes(bytes(5000))
    resumed = ["--resume", "--run-dir=run", *options]
    if any(option.startswith("--resume=") for option in options):
        resumed = options
    done = start(saved_run, None, [*SMALL, *resumed])
    assert done.returncode == USAGE
    assert done.stderr.startswith("apts_mpi.train: error: ") and words in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory):
    """Directory with a run and another one, which must not be touched."""
    directory = tmp_path_factory.mktemp("saved")
    run(directory, None, "--run-dir=run", "--epochs=9", "--max-iterations=3")
    run(directory, None, "--run-dir=other")
    return directory


@needs_mpirun
def test_second_run_in_one_directory_is_refused(tmp_path):
    job = Job(tmp_path, 2, ENDLESS)
    job.wait_for("epoch 1 ")
    output = run(tmp_path, 2, "--run-dir=run", "--resume", status=USAGE)
    assert output.count("another run saves checkpoints into it") == 1
    assert job.process.poll() is None
    job.process.send_signal(signal.SIGTERM)
    assert job.end()[0] == REQUEUE
    assert_goes_on(tmp_path, 2)


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


DRIFTING = """
import networks
import torch
from mpi4py import MPI

calls = 0
network = None


def drifting_loss(outputs, targets):
    global calls
    calls += 1
    if calls == 12 and MPI.COMM_WORLD.rank == 1:
        with torch.no_grad():
            network[0].weight.data[0, 0] += 1e-12
    return networks.cross_entropy(outputs, targets)


def problem():
    global network
    network, _, data = networks.problem()
    return network, drifting_loss, data
"""


@needs_mpirun
def test_rank_that_drifts_is_named_and_its_state_not_saved(tmp_path):
    (tmp_path / "drifting.py").write_text(DRIFTING)
    arguments = [*ENDLESS, "--problem=drifting:problem", "--checkpoint-keep-last=100"]
    status, output = Job(tmp_path, 3, arguments).end()
    assert status == FAILED
    assert output.count("apts_mpi.train: error: after iteration") == 1 and "rank 1 has other parameters" in output
    with Checkpoint(resolve(tmp_path / "run" / "checkpoints")) as checkpoint:
        last = checkpoint.step
    assert 0 < last == len([record for record in history(tmp_path / "run") if "rho" in record]) - 1


DRIFTING_STAGE = """
import networks
import torch
from mpi4py import MPI

calls = 0


class Drifting(torch.nn.Linear):
    \"\"\"Of the first stage; on rank 1, which is its second replica, it changes itself.\"\"\"

    def forward(self, inputs):
        global calls
        calls += 1
        if calls == 20 and MPI.COMM_WORLD.rank == 1:
            self.bias.data[0] += 1e-12
        return super().forward(inputs)


def problem():
    network, loss, data = networks.problem()
    network[0] = Drifting(10, 16, dtype=network[0].weight.dtype)
    return network, loss, data
"""


@needs_mpirun
def test_replica_of_a_stage_that_drifts_is_named(tmp_path):
    """The stages differ; each is compared among its replicas."""
    (tmp_path / "drifting_stage.py").write_text(DRIFTING_STAGE)
    arguments = [
        *SMALL, "--epochs=1000000", "--problem=drifting_stage:problem", "--layout=staged", "--replicas=2",
        "--micro-batches=2",
        "--drift-check-every=1", "--stall-timeout=60", "--subdomains=2",
        "--schwarz.variant=inexact", "--schwarz.local_data=full",
    ]  # fmt: skip
    status, output = Job(tmp_path, 4, arguments).end()
    assert status == FAILED, output
    assert output.count("apts_mpi.train: error: after iteration") == 1
    assert "rank 1 has other parameters or another solver state than rank 0" in output


def test_saving_in_the_background(tmp_path):
    run(tmp_path, None, "--run-dir=run", "--epochs=4", "--checkpoint-every=1", "--checkpoint-in-background")
    run(tmp_path, None, "--run-dir=whole", "--epochs=4", "--checkpoint-keep-last=1", "--checkpoint-keep-every=3",
        "--checkpoint-every=1")  # fmt: skip
    assert arrays(tmp_path / "run") == arrays(tmp_path / "whole")
    kept = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").glob("step-*.h5"))
    assert kept == [f"step-{step:08d}.h5" for step in (3, 6, 8)]


def test_overwriting_a_run_removes_its_checkpoints(tmp_path):
    run(tmp_path, None, "--run-dir=run", "--epochs=9")
    run(tmp_path, None, "--run-dir=run", "--overwrite")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*.h5")] == ["step-00000002.h5"]


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_baselines_resume(tmp_path, optimizer):
    run(tmp_path, None, "--run-dir=run", "--epochs=4", "--max-iterations=3", f"--optimizer={optimizer}")
    run(tmp_path, None, "--run-dir=run", "--resume", "--epochs=4", "--max-iterations=7", f"--optimizer={optimizer}")
    run(tmp_path, None, "--run-dir=whole", "--epochs=4", "--max-iterations=7", f"--optimizer={optimizer}")
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert arrays(tmp_path / "run") == arrays(tmp_path / "whole")


@pytest.mark.parametrize(
    "text, seconds",
    [("90s", 90.0), ("10min", 600.0), ("1.5h", 5400.0), ("01:30:00", 5400.0), ("2-00:00:01", 172801.0), ("10", None),
     ("1:70:00", None), ("", None)],
)  # fmt: skip
def test_times(text, seconds):
    assert as_seconds(text) == seconds


def test_default_times_are_valid():
    assert as_seconds(TrainingOptions().checkpoint_every) == 600.0
