"""Peak memory of steps in micro-batches, in a process of its own, beside Adam that accumulates gradients of as many."""

import os
import subprocess
import sys

import pytest

# Memory that is given back is no longer resident, so that what is resident is what is used.
PROGRAM = """
import gc, sys
import torch
from torch import nn
from apts_mpi import APTS, APTSOptions

torch.manual_seed(0)
convolutions = [layer for size in (1, 16, 16) for layer in (nn.Conv2d(size, 16, 3, padding=1), nn.ReLU())]
network = nn.Sequential(*convolutions, nn.AvgPool2d(16), nn.Flatten(), nn.Linear(16, 10))
inputs, targets = torch.randn(4000, 1, 16, 16), torch.randint(10, (4000,))

def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

def adam(inputs, targets, size):
    optimizer = torch.optim.Adam(network.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        for part in zip(inputs.split(size), targets.split(size)):
            (nn.functional.cross_entropy(network(part[0]), part[1]) * len(part[1]) / len(targets)).backward()
        optimizer.step()

def apts(inputs, targets, size):
    solver = APTS(network, nn.functional.cross_entropy, options=APTSOptions(micro_batch_size=size))
    for _ in range(2):
        solver.step((inputs, targets))

for method in (adam, apts):  # what torch imports and keeps in both
    method(inputs[:16], targets[:16], 8)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
{"adam": adam, "apts": apts}[sys.argv[1]](inputs, targets, int(sys.argv[2]))
print(status("VmHWM") - before)
"""


def peak(method, size):
    """Kilobytes that steps take beside what is there before."""
    given = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, method, str(size)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, **given},
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.processes
@pytest.mark.slow
def test_it_is_that_of_adam_with_as_many_samples_at_a_time():
    """With the default solver: curvature of the layers, and tangents for the coarse level."""
    accumulating, in_parts, whole = peak("adam", 500), peak("apts", 500), peak("apts", 4000)
    assert in_parts < 1.15 * accumulating
    assert whole > 4 * in_parts
