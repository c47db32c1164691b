"""What becomes of a run whose directory is taken away, replaced or full while it trains: it goes on."""

import json
import resource
import shutil
import signal
import zlib

import pytest
from processes import PROBLEM, SMALL, Job, needs_mpirun, start
from run_files import history

from apts_mpi.checkpoint import Checkpoint, resolve

FAILED, REQUEUE = 1, 75

# Learns on for ever, and saves after each iteration.
ENDLESS = [*SMALL, "--epochs=1000000", "--checkpoint-every=1", "--run-dir=run"]

BACKGROUND = pytest.mark.parametrize("how", [[], ["--checkpoint-in-background"]], ids=["at once", "in the background"])


def delete(run):
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(run, ignore_errors=True)  # what came in meanwhile


def rename(run):
    run.rename(free(run, "elsewhere"))


def free(run, name):
    """A path beside the run that is not in use."""
    return next(path for path in (run.with_name(f"{name}{number}") for number in range(1000)) if not path.exists())


def put(run, built):
    """Put something in the place of the run, which makes its directory again as soon as it is gone."""
    while True:
        rename(run)
        try:
            built.rename(run)
            return
        except OSError:
            pass


def replace_by_directory(run):
    built = free(run, "built")
    built.mkdir()
    (built / "notes.txt").write_text("mine")
    put(run, built)


def replace_by_link_to_copy(run):
    """As one does to move a run to another disk."""
    built, copy = free(run, "built"), free(run, "copy")
    while not copy.exists():
        try:
            shutil.copytree(run, copy, symlinks=True)
        except shutil.Error:  # a file was removed meanwhile
            shutil.rmtree(copy)
    built.symlink_to(copy)
    put(run, built)


def replace_by_file(run):
    built = free(run, "built")
    built.write_text("a file")
    put(run, built)


def replace_by_dead_link(run):
    built = run.with_name("link")
    built.symlink_to(run.with_name("nowhere"))
    put(run, built)


def replace_by_other_run(run):
    built = free(run, "built")
    (built / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "history.jsonl", "summary.json", "checkpoints/step-00000001.h5"):
        (built / name).write_text("somebody else's")
    put(run, built)


def assert_whole_so_far(run):
    """Each iteration stands once in the records; return them and their number."""
    text = (run / "history.jsonl").read_bytes()
    complete = text[: text.rfind(b"\n") + 1]
    steps = [record["iteration"] for record in map(json.loads, complete.splitlines()) if "rho" in record]
    assert steps == list(range(1, len(steps) + 1))
    return text, len(steps)


def assert_whole(run):
    """Of a run that has ended: they do, in the file and in the checkpoint."""
    text, steps = assert_whole_so_far(run)
    with Checkpoint(resolve(run / "checkpoints")) as checkpoint:
        checkpoint.verify()
        # What the metrics at the end add comes after the last save.
        assert text.startswith(zlib.decompress(checkpoint.read("training/history").tobytes()))
        assert checkpoint.step == steps
    assert "seed: 0" in (run / "config.yaml").read_text()


def stopped(job, status):
    """Stop a job, which ends with a status and without a traceback; return what it printed."""
    job.process.send_signal(signal.SIGTERM)
    found, output = job.end()
    assert found == status, output[-3000:]
    assert "Traceback" not in output and "Exception ignored" not in output, output[-3000:]
    return output


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
@BACKGROUND
def test_directory_that_is_gone_is_made_again(tmp_path, how):
    """With all records, also those from before."""
    run = tmp_path / "run"
    job = Job(tmp_path, 2, [*ENDLESS, *how])
    job.wait_for("epoch 5 ")
    for harm in (delete, rename, replace_by_directory, replace_by_link_to_copy):
        harm(run)
        job.wait_for_more("'run/history.jsonl' was gone or replaced, and has been written anew", 1)
        job.wait_for_more("epoch ", 5)
    (run / "checkpoints" / ".lock").unlink()
    job.wait_for_more("epoch ", 5)
    output = stopped(job, REQUEUE)
    assert output.count("was gone or replaced") >= 4
    assert_whole(run)
    done = start(tmp_path, 2, [PROBLEM, "--resume", "--run-dir=run", "--max-seconds=0.01"])
    assert done.returncode == 0 and (run / "summary.json").exists(), done.stdout + done.stderr


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
@BACKGROUND
def test_directory_that_cannot_be_made_again(tmp_path, how):
    """Records wait; when what is in the way is taken away they are written, and a run that ends before that fails."""
    run, good, bad = (tmp_path / name for name in ("run", "good", "bad"))
    job = Job(tmp_path, 2, [*ENDLESS, *how, "--trace"])
    job.wait_for("epoch 5 ")
    for harm in (replace_by_file, replace_by_dead_link, replace_by_other_run):
        harm(run)
        job.wait_for_more("'run/history.jsonl' cannot be written", 1)
        job.wait_for_more("could not be saved, training goes on", 2)
        run.rename(bad)
        job.wait_for_more("'run/history.jsonl' can be written again, and has all that was kept in memory", 1)
        job.wait_for_more("epoch ", 5)
        assert_whole_so_far(run)
        if harm is not replace_by_other_run:
            bad.unlink()
    run.rename(good)
    bad.rename(run)
    job.wait_for_more("'run/history.jsonl' cannot be written", 1)
    output = stopped(job, FAILED)
    assert output.count("apts_mpi.train: error: the last checkpoint could not be saved") == 1
    assert output.count("'run/history.jsonl' lacks its last") == 1
    kept = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"]
    assert [path.read_text() for path in kept] == ["somebody else's"] * 4, kept


@pytest.mark.processes
@pytest.mark.slow
@needs_mpirun
@BACKGROUND
def test_folder_of_checkpoints_that_is_gone_or_in_the_way(tmp_path, how):
    job = Job(tmp_path, 2, [*ENDLESS, *how])
    job.wait_for("epoch 5 ")
    place = tmp_path / "run" / "checkpoints"
    delete(place)
    job.wait_for_more("epoch ", 20)
    place.rename(tmp_path / "saved")
    place.write_text("a file")
    job.wait_for("could not be saved, training goes on")
    place.unlink()
    job.wait_for_more("epoch ", 20)
    stopped(job, REQUEUE)
    assert_whole(tmp_path / "run")


@pytest.mark.processes
def test_records_wait_for_room(tmp_path):
    """No file may be larger than the records are, as with a quota or a full disk; then there is room again."""
    job = Job(tmp_path, None, [*SMALL, "--epochs=1000000", "--checkpoint-every=1h", "--run-dir=run", "--tensorboard"])
    job.wait_for("epoch 30 ")
    size = (tmp_path / "run" / "history.jsonl").stat().st_size + 5000
    resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    job.wait_for("'run/history.jsonl' cannot be written (File too large)")
    job.wait_for_more("epoch ", 20)
    text = (tmp_path / "run" / "history.jsonl").read_text()
    assert text.endswith("}\n") and len(text) <= size  # the last record is whole
    resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    job.wait_for("'run/history.jsonl' can be written again")
    output = stopped(job, REQUEUE)
    for words in ("'run/history.jsonl' cannot be written", "'run/history.jsonl' can be written again"):
        assert output.count(words) == 1
    assert_whole(tmp_path / "run")
    assert_events_are_whole(tmp_path / "run")


def assert_events_are_whole(run):
    """Each epoch stands once in the event file."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    expected = [record["iteration"] for record in history(run) if "train_loss" in record]
    assert [event.step for event in shown.Scalars("epoch/train_loss")] == expected


@pytest.mark.processes
def test_summary_that_cannot_be_written_is_a_failure(tmp_path):
    """Told once, after the last checkpoint, with which the run can be brought to its end again."""
    job = Job(tmp_path, None, [*SMALL, "--epochs=1000000", "--max-seconds=3", "--run-dir=run", "--trace"])
    job.wait_for("epoch 5 ")
    (tmp_path / "run" / "summary.json").mkdir()
    status, output = job.end()
    assert status == FAILED and "Traceback" not in output
    words = (
        "error: 'run/summary.json' cannot be written (Is a directory); the last checkpoint holds the trained network"
    )
    assert output.count(words) == 1
    assert_whole(tmp_path / "run")
    assert (tmp_path / "run" / "trace.json").exists()
    (tmp_path / "run" / "summary.json").rmdir()
    assert start(tmp_path, None, [PROBLEM, "--resume", "--run-dir=run"]).returncode == 0
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.processes
@needs_mpirun
def test_runs_of_one_second_have_directories_of_their_own(tmp_path):
    jobs = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "runs").symlink_to(tmp_path)
        jobs.append(Job(tmp_path / str(number), 2, SMALL))
    outputs = [job.end() for job in jobs]
    assert [status for status, _ in outputs] == [0, 0, 0], outputs
    assert len(list(tmp_path.glob("networks.problem-apts-*/summary.json"))) == 3
