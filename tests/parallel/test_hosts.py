"""Ranks on two hosts, whose messages cross a network interface: training, checkpoints, and a cable that is cut."""

import re
import time

import hosts
import pytest
import torch
from networks import problem
from processes import PROBLEM, SMALL, start
from run_files import arrays, history

pytestmark = pytest.mark.processes

ITERATIONS, STALL_TIMEOUT = 6, 8.0

# Staged, with a stage on each rank.
STAGED = ["--layout=staged", "--schwarz.variant=inexact", "--schwarz.local_data=full", "--subdomains=4"]

# Seconds that the launcher and the system may take to end processes, on a busy machine.
ENDING = 4.0


WAITED = r"rank 0 on 10\.231\.0\.1 has waited"

# Between passes through the pipeline the ranks wait as in the other layout, any of them first.
STAGE_WAITED = (
    r"rank [01] on 10\.231\.0\.1 has waited|"
    r"no sign of stage 2 \(modules 6 to 7\) on rank 2, stage 3 \(modules 8 to 10\) on rank 3"
)


@pytest.fixture
def two_hosts(tmp_path):
    reason = hosts.reason_against()
    if reason:
        pytest.skip(reason)
    made = hosts.Hosts(tmp_path)
    yield made
    made.remove()


@pytest.mark.slow
def test_training_and_checkpoints_over_two_hosts(tmp_path, two_hosts):
    """A run that is stopped and resumed on two hosts becomes, to the bit, the one that was never stopped on one."""
    arguments = [*SMALL, "--epochs=9"]
    before = two_hosts.sent()
    first = two_hosts.start(1, [*arguments, "--run-dir=run", f"--max-iterations={ITERATIONS // 2}"])
    assert first.wait(hosts.LIMIT) == 0, two_hosts.output()
    resumed = two_hosts.start(1, [PROBLEM, "--resume", "--run-dir=run", f"--max-iterations={ITERATIONS}"])
    assert resumed.wait(hosts.LIMIT) == 0, two_hosts.output()
    assert f"resumed after iteration {ITERATIONS // 2} " in two_hosts.output()
    network, *_ = problem()
    gradient = sum(parameter.numel() for parameter in network.parameters()) * torch.float64.itemsize
    # The rank on the first host sends the other its gradient and its corrections, which are half of one.
    assert two_hosts.sent() - before > 1.5 * ITERATIONS * gradient
    assert start(tmp_path, 2, [*arguments, "--run-dir=whole", f"--max-iterations={ITERATIONS}"]).returncode == 0
    assert history(tmp_path / "run") == history(tmp_path / "whole")
    assert arrays(tmp_path / "run") == arrays(tmp_path / "whole")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ([], WAITED),
        (STAGED, STAGE_WAITED),
    ],
    ids=["replicated", "staged"],
)
def test_cable_cut_for_good(two_hosts, layout, message):
    """All ranks on both hosts end within the stall time, with one message, and nobody is left."""
    arguments = [*SMALL, "--epochs=1000000", f"--stall-timeout={STALL_TIMEOUT}", *layout]
    job = two_hosts.start(2, arguments)
    assert hosts.wait_until(lambda: "epoch 3 " in two_hosts.output(), hosts.LIMIT), two_hosts.output()
    assert len(two_hosts.processes()) > 4
    two_hosts.cut()
    cut = time.monotonic()
    assert hosts.wait_until(lambda: not two_hosts.processes(), STALL_TIMEOUT + ENDING), two_hosts.output()
    assert time.monotonic() - cut > 0.5 * STALL_TIMEOUT  # not for another reason
    assert job.wait(hosts.LIMIT) == 1
    output = two_hosts.output()
    assert output.count("error:") == 1 and len(re.findall(message, output)) == 1, output
    assert f"stall_timeout is {STALL_TIMEOUT:g} s" in output and "Traceback" not in output
