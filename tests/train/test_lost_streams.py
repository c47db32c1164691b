"""Runs whose output nobody takes any more: a pipe that was closed, a full disk, no stream at all."""

import json
import os
import subprocess

import pytest
from processes import LIMIT, SMALL, command, needs_mpirun, start, surroundings
from run_files import history

USAGE, UNREAD = 2, 141

# Some seconds of lines.
TALKATIVE = [*SMALL, "--epochs=100", "--monitor", "--log-view", "--run-dir=run"]


# A problem that notes where the descriptors 0, 1 and 2 lead.
LOOKING = """
import json, os
from pathlib import Path
from networks import problem as known

def problem():
    Path("leads.json").write_text(json.dumps([os.path.realpath(f"/proc/self/fd/{number}") for number in range(3)]))
    return known()
"""


def run(directory, arguments, module="apts_mpi.train", ranks=None, **streams):
    """Start a job with streams of its own; gives its process."""
    return subprocess.Popen(
        command(ranks, arguments, module),
        cwd=directory,
        env=surroundings(directory),
        stdin=subprocess.DEVNULL,
        **streams,
    )


def read_a_line(stream):
    """As ``head -1`` does."""
    line = stream.readline()
    stream.close()
    return line


def assert_trained(directory):
    """The run came to its end: with all records, the summary, and the last checkpoint."""
    epochs = [record for record in history(directory / "run") if "train_loss" in record]
    assert len(epochs) == 100
    for name in ("summary.json", "config.yaml", "checkpoints/latest"):
        assert (directory / "run" / name).exists()


@pytest.mark.processes
@pytest.mark.parametrize("lost", ["stdout", "stderr"])
def test_closed_pipe_does_not_end_a_run(tmp_path, lost):
    """Of standard output after a line, of standard error before the first; nothing is said on the other one."""
    with run(tmp_path, TALKATIVE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if lost == "stdout":
            assert read_a_line(process.stdout).startswith(b"iteration 1")
            assert process.stderr.read() == b""
        else:
            process.stderr.close()
            assert b"records: run" in process.stdout.read()
        assert process.wait(LIMIT) == 0
    assert_trained(tmp_path)


@pytest.mark.processes
@pytest.mark.parametrize("lost", [("stdout",), ("stdout", "stderr")], ids=" and ".join)
def test_full_log_does_not_end_a_run(tmp_path, lost):
    with open("/dev/full", "wb") as full:
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | dict.fromkeys(lost, full)
        process = run(tmp_path, TALKATIVE, **streams)
        outputs = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    assert not outputs[1]
    assert_trained(tmp_path)


@pytest.mark.processes
@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)], ids=str)
def test_stream_that_was_never_open(tmp_path, closed):
    """What is opened later must not get its number, or MPI's and HDF5's own words would go into it."""
    (tmp_path / "looking.py").write_text(LOOKING)
    arguments = [*TALKATIVE, "--problem=looking:problem"]
    closing = " ".join(f"{number}>&-" for number in closed)
    process = subprocess.run(
        ["sh", "-c", f'exec "$@" {closing}', "sh", *command(None, arguments)],
        cwd=tmp_path, env=surroundings(tmp_path), capture_output=True, timeout=LIMIT,
    )  # fmt: skip
    assert process.returncode == 0 and process.stderr == b""
    leads = json.loads((tmp_path / "leads.json").read_text())
    assert [leads[number] for number in closed] == ["/dev/null"] * len(closed)
    assert_trained(tmp_path)


@pytest.mark.processes
def test_terminal_that_goes_away(tmp_path):
    """With the bar that is shown on one, drawn by another thread."""
    ours, theirs = os.openpty()
    process = run(tmp_path, TALKATIVE, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 100)
    os.close(ours)
    assert process.wait(LIMIT) == 0
    assert_trained(tmp_path)


@pytest.mark.processes
def test_status_of_a_refusal_that_nobody_reads(tmp_path):
    with open("/dev/full", "wb") as full:
        process = run(tmp_path, [*SMALL, "--seed=x"], stdout=full, stderr=full)
        assert process.wait(LIMIT) == USAGE


@pytest.mark.processes
@needs_mpirun
def test_ranks_go_on_without_a_stream(tmp_path):
    """Each rank's own: what mpirun does with its streams is its own matter."""
    shell = 'exec "$0" -m apts_mpi.train "$@" >/dev/full 2>&-'
    launched = command(2, TALKATIVE)
    python = launched.index("-m") - 1
    launcher, arguments = launched[:python], launched[python + 3 :]
    done = subprocess.run(
        [*launcher, "sh", "-c", shell, launched[python], *arguments],
        cwd=tmp_path, env=surroundings(tmp_path), stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == b"" and done.stderr == b""
    assert_trained(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained")
    assert start(directory, None, [*SMALL, "--run-dir=run"]).returncode == 0
    return directory


@pytest.mark.processes
@pytest.mark.parametrize("words", ["checkpoint info run/checkpoints", "plot run", "compare --help"])
def test_other_commands_end_with_their_reader(trained, words):
    """Quietly, as commands of a shell do; a full disk is told in a line."""
    module, *arguments = words.split()
    module = f"apts_mpi.{module}"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed, open("/dev/full", "wb") as full:
        process = run(trained, arguments, module, stdout=closed, stderr=subprocess.PIPE)
        assert process.communicate(timeout=LIMIT)[1] == b""
        assert process.returncode == UNREAD
        process = run(trained, arguments, module, stdout=full, stderr=subprocess.PIPE)
        errors = process.communicate(timeout=LIMIT)[1]
        assert errors == b"error: standard output cannot be written (No space left on device); free some space\n"
        assert process.returncode == 1
