"""Programs of users on ranks: what goes wrong on one of them ends all, with its traceback, under a plain ``python``."""

import time

import pytest
from processes import needs_mpirun, start

pytestmark = [pytest.mark.processes, needs_mpirun]

# What a job may take that ends at once: most of it to import torch; and one that waits for a rank that has left.
AT_ONCE = 40.0

PROGRAM = """
import os, sys, time
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy
from apts_mpi import APTS, APTSOptions, StagedAPTS

rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
last = rank == size - 1
{before}
network, batch = classifier(), classified()
solver = {make}(network, cross_entropy, options=APTSOptions({options}))
for number in range({steps}):
    {during}
    solver.step(batch)
{after}
print("done", rank, flush=True)
"""


def run(directory, ranks, *, before="", make="APTS", options="", steps=3, during="pass", after=""):
    text = PROGRAM.format(before=before, make=make, options=options, steps=steps, during=during, after=after)
    (directory / "program.py").write_text(text)
    begun = time.monotonic()
    done = start(directory, ranks, [], module="program")
    return done, time.monotonic() - begun


FAULTS = {
    "label out of range": ("if last and number == 1: batch[1][:] = 99", "out of bounds"),
    "exception": ("if last and number == 1: raise ValueError('mine')", "ValueError: mine"),
    "out of memory": ("if last and number == 1: raise MemoryError('no more')", "MemoryError: no more"),
    "exception in a hook": (
        "if last and number == 1: network[3].register_forward_hook(lambda *_: 1 / 0)",
        "ZeroDivisionError",
    ),
    "interrupt": ("if last and number == 1: raise KeyboardInterrupt", "KeyboardInterrupt"),
    "end of the program": ("if last and number == 1: sys.exit(0)", "has come to the end of its program"),
    "end with a message": ("if last and number == 1: sys.exit('enough')", "has come to the end of its program"),
    "one step fewer": ("if last and number == 2: break", "has come to the end of its program"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_fault_of_one_rank_ends_all(tmp_path, fault, ranks):
    during, words = FAULTS[fault]
    # Shards: of whole batches another one on a rank is refused before.
    done, took = run(tmp_path, ranks, options='batch="shard"', during=during, steps=4)
    assert done.returncode != 0
    assert words in done.stderr, done.stderr
    assert f"rank {ranks - 1}" in done.stderr and took < AT_ONCE
    assert "done 0" not in done.stdout


def test_fault_of_a_stage_ends_all(tmp_path):
    """Of layout staged, whose waits have limits of their own."""
    during, words = FAULTS["exception"]
    done, took = run(tmp_path, 3, make="StagedAPTS", options="layout='staged'", during=during)
    assert done.returncode != 0 and words in done.stderr and took < AT_ONCE


def test_fault_before_the_first_step(tmp_path):
    done, took = run(tmp_path, 2, during="if last: raise ValueError('mine')")
    assert done.returncode != 0 and "ValueError: mine" in done.stderr and took < AT_ONCE


def test_rank_that_never_comes(tmp_path):
    """It failed before its first solver, where nothing of the package knows; the wait of the others has its limit."""
    done, took = run(tmp_path, 2, before="if last: time.sleep(1000)", options="stall_timeout=8.0")
    assert done.returncode != 0 and took < AT_ONCE
    assert "waited" in done.stderr and "all ranks to make a communicator" in done.stderr


def test_function_that_makes_a_stage(tmp_path):
    """It has a collective before that of the solver."""
    text = """
import sys
import torch
from mpi4py import MPI
from apts_mpi import APTSOptions, build_stage

def make():
    if MPI.COMM_WORLD.rank == 1:
        sys.exit("no")
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

build_stage(make, options=APTSOptions(layout="staged"))
"""
    (tmp_path / "program.py").write_text(text)
    done = start(tmp_path, 2, [], module="program")
    assert done.returncode != 0 and "has come to the end of its program" in done.stderr


def test_input_that_cannot_be_used_is_told_once(tmp_path):
    """All ranks raise the same, and end by themselves."""
    done, took = run(tmp_path, 3, options="subdomains=1000")
    assert done.returncode != 0 and took < AT_ONCE
    assert done.stderr.count("SharedInvalidInput: subdomains") == 1 and "subdomains: 1000 is too many" in done.stderr


def test_wait_has_a_limit(tmp_path):
    """A rank that stands still, which nobody can know, ends the job after ``stall_timeout``."""
    during = "if last and number == 1: time.sleep(1000)"
    done, took = run(tmp_path, 2, options="stall_timeout=8.0", during=during)
    assert done.returncode != 0 and took < AT_ONCE
    assert done.stderr.count("has waited") == 1 and "stall_timeout is 8 s" in done.stderr
    assert "apts_mpi: error:" in done.stderr


def test_program_that_ends_well(tmp_path):
    """Also where one rank works on for long after the last step, and another one catches what went wrong."""
    after = """
if last:
    time.sleep(6)
try:
    raise ValueError("caught")
except ValueError:
    pass
"""
    done, _ = run(tmp_path, 3, after=after)
    assert done.returncode == 0, done.stderr
    # Lines of several ranks may meet.
    assert done.stdout.count("done") == 3 and not done.stderr


def test_solvers_on_other_communicators_do_not_meet(tmp_path):
    """A rank that is done with its own group leaves; those of the other group work on."""
    text = """
import time
from mpi4py import MPI
from networks import classified, classifier, cross_entropy
from apts_mpi import APTS, APTSOptions

world = MPI.COMM_WORLD
color = int(world.rank > 1)
group = world.Split(color, world.rank)
solver = APTS(classifier(), cross_entropy, comm=group)
for number in range(3 + 6 * color):
    if color and group.rank == 0:
        time.sleep(1)
    solver.step(classified())
print("done", world.rank, flush=True)
"""
    (tmp_path / "program.py").write_text(text)
    done = start(tmp_path, 4, [], module="program")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 4


def test_freed_communicator_and_finished_mpi(tmp_path):
    """What ends before the program does is not told anything at its end."""
    text = """
from mpi4py import MPI
from networks import classified, classifier, cross_entropy
from apts_mpi import APTS

comm = MPI.COMM_WORLD.Dup()
solver = APTS(classifier(), cross_entropy, comm=comm)
solver.step(classified())
comm.Free()
again = APTS(classifier(), cross_entropy)
again.step(classified())
MPI.Finalize()
print("done", flush=True)
"""
    (tmp_path / "program.py").write_text(text)
    done = start(tmp_path, 2, [], module="program")
    assert done.returncode == 0 and done.stdout.count("done") == 2 and not done.stderr, done.stderr


def test_under_the_runner_of_mpi4py(tmp_path):
    """``python -m mpi4py program.py`` ends the job by itself; both go together."""
    done, _ = run(tmp_path, 2, during=FAULTS["exception"][0])
    assert done.returncode != 0
    arguments = [str(tmp_path / "program.py")]
    done = start(tmp_path, 2, arguments, module="mpi4py")
    assert done.returncode != 0 and "ValueError: mine" in done.stderr
