"""Tests marked `mpi` run on every rank of an MPI job, and pass or fail on all of them together.

Only tests marked `processes` start other processes, so that those without it are the quick ones.
"""

import functools
import sys
import time

import pytest
import torch

PATIENCE = 30.0  # seconds that a rank which failed gives the others to come to the end of the same test

torch.set_num_threads(1)  # ranks share the cores

started = []  # what the test under way and its fixtures have started


def note_start(event, arguments, starts=("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system")):
    """A hook of Python's, for all that happens in the process; its own library asks uname for the processor."""
    if event in starts and arguments[:1] != ("uname",):
        started.append(f"{event} {arguments[:2]}")


sys.addaudithook(note_start)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    started.clear()
    return (yield from together(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from together(item, "call"))


def together(item, phase):
    """Run a phase of a test; if it fails on one rank, fail on all.

    A rank that went on alone would meet the others in the wrong collective from then on.
    """
    if item.get_closest_marker("mpi") is None:
        return (yield)
    error = None
    try:
        result = yield
    except (Exception, pytest.fail.Exception, pytest.skip.Exception) as caught:
        error = caught
    outcomes = exchange(item, error)
    if error is not None:
        raise error
    others = [f"rank {rank}: {outcome}" for rank, outcome in enumerate(outcomes) if outcome]
    if others:
        pytest.fail(f"the {phase} did not pass on another rank\n" + "\n".join(others), pytrace=False)
    return result


def exchange(item, error):
    """What happened on each rank, "" where nothing did; ends the job if a rank failed while others wait for it."""
    comm = private_world()
    description = "" if error is None else str(item.repr_failure(pytest.ExceptionInfo.from_exception(error)))
    deadline = time.monotonic() + PATIENCE
    # Not a blocking barrier: ranks that spin in it take the cores from those that still work.
    arrival = comm.Ibarrier()
    while not arrival.Test():
        if error is not None and time.monotonic() > deadline:
            with item.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(
                    f"\nrank {comm.rank} failed in {item.nodeid}, where others wait for it:\n{description}", flush=True
                )
            comm.Abort(1)
        time.sleep(0.001)
    return comm.allgather(description)


@functools.cache
def private_world():
    """A duplicate of the world, so that no message of a test is taken for one of these."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.Dup()


@pytest.fixture
def world():
    """All ranks of the job."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture(autouse=True)
def starts_no_process_without_the_marker(request):
    yield
    if started and request.node.get_closest_marker("processes") is None:
        pytest.fail(f"mark it `processes`: it has started {started[0]}", pytrace=False)


@pytest.fixture
def few_ranks(world):
    """Two ranks show what more would."""
    if world.size > 2:
        pytest.skip("for at most 2 ranks")
