"""Ctrl-C, a closed terminal and signals at any moment; and what a user's code does to its own process."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import PROBLEM, SMALL, Job, needs_mpirun, start

FAILED, REQUEUE, INTERRUPTED = 1, 75, 130

ENDLESS = [*SMALL, "--epochs=1000000", "--run-dir=run"]

# What a second Ctrl-C may take, by the documentation, and what the system adds on a busy machine.
AT_ONCE, BUSY = 2.0, 3.0

pytestmark = pytest.mark.processes

# A problem whose loss does something at its 40th call on one rank, in the middle of an iteration.
PROGRAM = """
import multiprocessing, os, signal, sys, time
import networks
from mpi4py import MPI

def act():
    {action}

def problem():
    network, loss, data = networks.problem()
    calls = []
    def acting(outputs, targets):
        calls.append(1)
        if len(calls) == 40 and MPI.COMM_WORLD.rank == MPI.COMM_WORLD.size - 1:
            act()
        return loss(outputs, targets)
    return network, acting, data
"""


def write_program(directory, action):
    """Let ``--problem=program:problem`` do ``action``."""
    (directory / "program.py").write_text(PROGRAM.format(action=action))


def acting(*options):
    return [option for option in ENDLESS if "--problem" not in option] + ["--problem=program:problem", *options]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_stops_and_goes_on_without_mpirun(tmp_path, number):
    job = Job(tmp_path, None, ENDLESS)
    job.wait_for("epoch 2 ")
    job.process.send_signal(number)
    status, output = job.end()
    assert status == REQUEUE, output
    assert output.count(f"{number.name} was received: go on with --resume --run-dir run") == 1
    assert "Traceback" not in output and "KeyboardInterrupt" not in output
    done = start(tmp_path, None, [PROBLEM, "--resume", "--run-dir=run", "--max-iterations=3"])
    assert done.returncode == 0 and "resumed after iteration" in done.stdout, done.stderr


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("moment", [0.8, 1.7, 2.6, 3.9, 5.2])
def test_ctrl_c_to_mpirun_at_any_moment(tmp_path, moment):
    """While Python, torch and MPI are imported, the problem is made, or training is under way."""
    job = Job(tmp_path, 2, ENDLESS)
    time.sleep(moment)
    job.process.send_signal(signal.SIGINT)
    status, output = job.end()
    assert status == REQUEUE, output
    assert output.count("as SIGINT was received: ") == 1 and "Traceback" not in output


@needs_mpirun
def test_signal_to_one_rank_stops_all(tmp_path):
    job = Job(tmp_path, 3, ENDLESS)
    job.wait_for("epoch 2 ")
    os.kill(job.ranks()[2], signal.SIGHUP)
    status, output = job.end()
    assert status == REQUEUE and output.count("SIGHUP was received") == 1


@pytest.mark.parametrize("ranks", [None, pytest.param(2, marks=needs_mpirun)])
def test_second_ctrl_c_ends_a_run_that_stands_still(tmp_path, ranks):
    """The first one waits for the end of an iteration, which one rank never comes to."""
    write_program(tmp_path, "print('stands', flush=True); time.sleep(1000)")
    job = Job(tmp_path, ranks, acting())
    job.wait_for("stands")
    members = [job.process.pid] if ranks is None else job.ranks()
    for number in members:
        os.kill(number, signal.SIGINT)
    time.sleep(1.0)
    assert job.process.poll() is None
    pressed = time.monotonic()
    for number in members:
        os.kill(number, signal.SIGINT)
    status, output = job.end()
    assert time.monotonic() - pressed < AT_ONCE + BUSY
    assert status not in (0, REQUEUE)
    assert output.count("interrupted a second time: ended at once") == 1


def test_one_ctrl_c_that_comes_twice_counts_once(tmp_path):
    """From the terminal and from a launcher."""
    job = Job(tmp_path, None, ENDLESS)
    job.wait_for("epoch 2 ")
    job.process.send_signal(signal.SIGINT)
    job.process.send_signal(signal.SIGINT)
    assert job.end()[0] == REQUEUE


@needs_mpirun
@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("sys.exit(0)", "SystemExit: 0"),
        ("sys.exit('enough')", "SystemExit: enough"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("os._exit(0)", "called os._exit(0), which ends the run"),
        ("raise MemoryError", "MemoryError"),
    ],
)
def test_end_of_one_rank_ends_the_run_as_a_failure(tmp_path, action, words):
    """At once, and the rank is named: no wait, no word of the network."""
    write_program(tmp_path, action)
    begun = time.monotonic()
    done = start(tmp_path, 2, acting())
    assert time.monotonic() - begun < 60.0
    assert done.returncode not in (0, REQUEUE)
    assert words in done.stderr and "rank 1" in done.stderr and "program.py" in done.stderr
    assert "stall_timeout" not in done.stderr


def test_end_of_the_only_rank_is_a_failure(tmp_path):
    write_program(tmp_path, "os._exit(0)")
    done = start(tmp_path, None, acting())
    assert done.returncode not in (0, REQUEUE) and "called os._exit(0)" in done.stderr


POOL = """
    for _ in range(5):
        with multiprocessing.get_context('fork').Pool(2) as pool:
            pool.map(abs, range(4))
"""


@pytest.mark.parametrize("ranks", [None, pytest.param(2, marks=needs_mpirun)])
def test_pool_of_processes_in_a_problem(tmp_path, ranks):
    """Leaving the block sends SIGTERM to the children, which have to end by it."""
    write_program(tmp_path, POOL)
    done = start(tmp_path, ranks, acting("--max-iterations=60"))
    assert done.returncode == 0, done.stdout + done.stderr


CHILDREN = """
    child = os.fork()
    if child == 0:
        time.sleep(1000)
    for number in (signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        waiting = child if number == signal.SIGUSR1 else os.fork()
        if waiting == 0:
            time.sleep(1000)
        os.kill(waiting, number)
        status = os.waitpid(waiting, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number, status
"""


def test_signals_to_children_are_theirs(tmp_path):
    """They end by them at once, right after the fork as well, and the run does not take them for its own."""
    write_program(tmp_path, CHILDREN)
    done = start(tmp_path, None, acting("--max-iterations=60"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was received" not in done.stdout


def test_one_rank_that_stands_still_is_ended(tmp_path):
    write_program(tmp_path, "time.sleep(1000)")
    begun = time.monotonic()
    done = start(tmp_path, None, acting("--stall-timeout=8"))
    assert time.monotonic() - begun < 60.0
    assert done.returncode == FAILED
    assert "has done nothing with others for 8 s" in done.stderr and "time.sleep(1000)" in done.stderr


def test_handlers_are_those_from_before_after_a_run(tmp_path):
    """For programs that call the command as a function."""
    program = """
import os, signal, sys
from apts_mpi.train.__main__ import main
before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
leave = os._exit
main(sys.argv[1:])
after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)]
assert before == after and signal.set_wakeup_fd(-1) == -1 and os._exit is leave
print("as before")
"""
    (tmp_path / "calls.py").write_text(program)
    done = start(tmp_path, None, [*SMALL, "--run-dir=run"], module="calls")
    assert done.returncode == 0 and "as before" in done.stdout, done.stderr


def test_help_with_a_signal_handler_in_place():
    done = subprocess.run(
        [sys.executable, "-m", "apts_mpi.train", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "--batch_size" in done.stdout and not done.stderr
