"""The program of a frozen backbone with a new head, as users start it."""

import os

import pytest
from processes import TESTS, needs_mpirun, start


@needs_mpirun
@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [None, 2])
def test_a_head_and_then_all_layers(tmp_path, ranks):
    examples = TESTS.parent / "docs" / "examples"
    path = os.pathsep.join(map(str, (examples, TESTS.parent)))
    job = start(tmp_path, ranks, [], module="frozen_backbone", PYTHONPATH=path)
    assert job.returncode == 0, job.stderr
    head, whole = (float(line.split()[-1]) for line in job.stdout.splitlines())
    assert whole < 0.1 and whole < 0.5 * head < 0.3
