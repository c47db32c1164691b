"""``--layout staged``: records and checkpoints of a replicated run, and how it ends when a rank does."""

import json
import re
import time

import pytest
from processes import needs_mpirun, start

from apts_mpi.errors import InvalidInput
from apts_mpi.train.options import TrainingOptions

USAGE = 2

COMMON = (
    "--problem=networks:problem --dtype=float64 --device=cpu --batch-size=30 --subdomains=4 --local.solver=kfac "
    "--trust-region.initial_radius=0.2 --max-iterations=4"
).split()
STAGED = [*COMMON, "--layout=staged", "--micro-batches=3", "--stall-timeout=60"]
REPLICATED = [*COMMON, "--schwarz.variant=inexact", "--schwarz.local_data=full"]


def history(path):
    """Losses and accuracies of the records."""
    names = ("loss", "trial_loss", "rho", "radius", "train_loss", "test_loss", "test_accuracy")
    lines = (path / "history.jsonl").read_text().splitlines()
    return [[record[name] for name in names if name in record] for record in map(json.loads, lines)]


def flattened(records):
    return [value for record in records for value in record]


@pytest.mark.mpi
def test_records_are_those_of_the_replicated_layout(world, directory, trained):
    runs = {"replicated": REPLICATED, "staged": STAGED}
    if world.size % 2 == 0:
        runs["replicas"] = [*STAGED, "--replicas=2", "--schedule=gpipe"]
    for name, arguments in runs.items():
        trained(*arguments, f"--run-dir={name}")
    if world.rank > 0:
        return
    expected = history(directory / "replicated")
    assert len(expected) == 6
    parameters = [json.loads((directory / name / "summary.json").read_text())["parameters"] for name in runs]
    assert len(set(parameters)) == 1
    for name in runs:
        assert flattened(history(directory / name)) == pytest.approx(flattened(expected), rel=1e-10)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("layouts", "options"),
    [
        (("staged", "staged"), []),
        (("staged", "replicated"), ["--global-step.model=lsr1"]),
        (("replicated", "staged"), ["--global-step.model=lsr1"]),
    ],
)
def test_either_layout_goes_on_from_a_checkpoint_of_either(world, directory, trained_on, layouts, options):
    """On twice the ranks."""

    def arguments(layout, iterations, *more):
        own = STAGED if layout == "staged" else REPLICATED
        return [*own, *options, f"--max-iterations={iterations}", *more]

    first, then = layouts
    half = world.size // 2
    trained_on(half, *arguments(first, 6, "--run-dir=whole"))
    trained_on(half, *arguments(first, 3, "--run-dir=begun"))
    layout = [f"--layout={then}"] if then == "replicated" else []
    output = trained_on(2 * half, *arguments(then, 6, *layout, "--run-dir=resumed", "--resume=begun"))
    if world.rank > 0:
        return
    assert "resumed after iteration 3" in output and "note:" not in output
    expected = history(directory / "whole")
    # The records of the metrics at the end of the part differ; those of the iterations do not.
    steps = [[record for record in history(directory / name) if len(record) == 4] for name in ("resumed", "whole")]
    assert len(steps[1]) == 6 and flattened(steps[0]) == pytest.approx(flattened(steps[1]), rel=1e-10)
    assert flattened(history(directory / "resumed")[-1:]) == pytest.approx(flattened(expected[-1:]), rel=1e-10)


@pytest.mark.mpi(min_size=2)
@pytest.mark.usefixtures("few_ranks")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schwarz.variant=exact"], "schwarz.variant: 'exact' is not for layout staged"),
        (["--cuts=2,4"], "cuts: 2 names are given, but 2 stages need 1"),
        (["--micro-batches=31"], "batch_size: 30 is too small"),
        (["--problem=poisson-1d", "--batch-size=10"], "problem poisson-1d needs more; choose --layout replicated"),
    ],
)
def test_what_cannot_be_is_told_once(world, command, arguments, message):
    status, output, errors = command(*STAGED, "--subdomains=2", *arguments)
    assert status == USAGE and output == "" and "Traceback" not in errors
    assert errors.count("apts_mpi.train: error: ") == errors.count(message) == (world.rank == 0)


def test_other_optimizers_have_no_stages():
    with pytest.raises(InvalidInput, match="layout: 'staged' .* for optimizer apts; choose that, or --layout"):
        TrainingOptions(layout="staged", optimizer="adam")


FAULTS = """
import os
import time
from pathlib import Path

import networks
import torch
from mpi4py import MPI

calls = 0


class Fault(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, inputs):
        global calls
        calls += 1
        if calls == 40:
            Path("at").write_text(f"{time.time()} {os.getpid()}")
            if self.kind == "raise":
                raise RuntimeError("out of luck")
            if self.kind == "die":
                os.kill(os.getpid(), 9)
            if self.kind == "stall":
                time.sleep(1000)
        return inputs


def problem(kind):
    network, loss, data = networks.problem()
    modules = list(network)
    # Behind the third linear layer: of six on three stages, in the second.
    return torch.nn.Sequential(*modules[:5], Fault(kind), *modules[5:]), loss, data


def raises():
    return problem("raise")


def dies():
    return problem("die")


def stalls():
    return problem("stall")
"""


@pytest.mark.processes
@needs_mpirun
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"stage 1 (modules 4 to 8) on rank 1 failed in the forward pass of micro-batch"),
        ("stalls", "no sign of stage 1 (modules 4 to 8) on rank 1: stage"),
        # The launcher tells the number of a process, and the run told at its start which stage that is.
        ("dies", "stage 1 (modules 4 to 8) on rank 1: process {}"),
    ],
)
def test_all_ranks_stop_when_one_does(tmp_path, name, message):
    """Within ten seconds, and they say which stage it was."""
    (tmp_path / "faults.py").write_text(FAULTS)
    # Long enough for the others' work on a busy machine, short enough for the ten seconds.
    arguments = [
        *STAGED, f"--problem=faults:{name}", "--subdomains=3", "--max-iterations=1000", "--epochs=1000",
        "--stall-timeout=8", "--coarse=none",
    ]  # fmt: skip
    run = start(tmp_path, 3, arguments)
    ended = time.time()
    failed_at, number = (tmp_path / "at").read_text().split()
    assert run.returncode != 0
    assert ended - float(failed_at) < 10.0
    told = run.stderr + run.stdout
    assert message.format(number) in told, told
    if name == "dies":
        # Of a process that died and those that it ended for that, MPICH's launcher names any.
        processes = re.findall(r"^stage .*: process (\d+) on", told, re.MULTILINE)
        assert len(processes) == 3 and number in processes, told
        assert any(number in told.split("stage 2", 1)[1].split("\n", 1)[1] for number in processes), told
