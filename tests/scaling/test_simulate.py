"""The skeleton of an iteration in SimGrid, beside what the cost model predicts.

Where SimGrid is not installed these tests skip, unless the environment variable SIMGRID_REQUIRED is set.
"""

import json
import os
import shutil
from dataclasses import replace

import pytest
from scaling_runs import MACHINE, NETWORK, record_of, shape_of

from apts_mpi.errors import InvalidInput
from apts_mpi.scaling import simulate
from apts_mpi.scaling.__main__ import main
from apts_mpi.scaling.adding import REDUCED_MODELS
from apts_mpi.scaling.calls import Machine
from apts_mpi.scaling.collectives import LIBRARIES, choose
from apts_mpi.scaling.cost_fit import grown
from apts_mpi.scaling.cost_model import parts
from apts_mpi.scaling.network import read_network
from apts_mpi.scaling.simulate import Simulator, Step, compare, plan
from apts_mpi.scaling.studies import Studies, write_studies

# Seconds of work small enough that the network is most of an iteration.
VALUES = {
    "call": 1e-6,
    "gradient": 1e-7,
    "pass": 1e-6,
    "tangent": 1e-9,
    "statistics": 1e-9,
    "factorisation": 1e-4,
    "fixed": 1e-5,
    "column": 1e-7,
    "pair": 1e-9,
    "cube": 1e-12,
}

NETWORKS = ("fat-tree:12.5GB/s,1us", "dragonfly:12.5GB/s,1us")


@pytest.fixture
def simulator(tmp_path):
    """The compiled skeleton."""
    if shutil.which("smpicc") is None:
        if os.environ.get("SIMGRID_REQUIRED"):
            pytest.fail("SimGrid is not installed: no smpicc (Debian: apt-get install libsimgrid-dev)")
        pytest.skip("SimGrid is not installed: no smpicc (Debian: apt-get install libsimgrid-dev)")
    return Simulator(tmp_path)


COLLECTIVES = [
    *((operation, size) for operation in ("allreduce", "allgather") for size in (8192, 1 << 20)),
    *(("broadcast", size) for size in (64, 1 << 16, 1 << 20)),
    *(("reduction", size) for size in (64, 1 << 20)),
    *(("gather", 1 << 16), ("barrier", 0)),
]


@pytest.mark.processes
@pytest.mark.parametrize("ranks", [24, 32])
@pytest.mark.parametrize("library", LIBRARIES)
def test_rounds_of_each_algorithm(simulator, library, ranks):
    """The program sends what the formulas count, on a network where nothing meets: a tree whose links all are alike."""
    machine = Machine(read_network(NETWORKS[0]), library)
    steps = []
    for operation, size in COLLECTIVES:
        steps += [
            Step(f"{operation} {size}", choose(library, operation, ranks, size).name, size=size),
            # So that none waits for the one before.
            Step("between", "barrier"),
        ]
    found = simulator.seconds(steps, replace(shape_of("replicated", "weak", 1), ranks=ranks), machine)
    for operation, size in COLLECTIVES:
        expected = machine.network.seconds(choose(library, operation, ranks, size).rounds)
        # Ranks leave the barrier before at different times; and the parts of a scatter do not wait for each other.
        assert found[f"{operation} {size}"] == pytest.approx(expected, rel=0.25, abs=8e-6), operation


@pytest.mark.processes
@pytest.mark.parametrize("layout", ["replicated", "staged"])
@pytest.mark.parametrize("network", NETWORKS)
def test_predictions_are_near_simulations(simulator, layout, network):
    shapes = [grown(shape_of(layout, "weak", 8, subdomains=8), "weak", ranks) for ranks in (16, 64)]
    if layout == "staged":
        shapes = [replace(shape, subdomains=8) for shape in shapes]
    for one in compare({layout: shapes}, VALUES, [Machine(read_network(network))]):
        assert abs(one.error) < 0.25, (one.ranks, one.error)
        assert one.simulated["iteration"] > 0.0


def test_the_plan_has_what_the_record_counts():
    shape = grown(shape_of("replicated", "strong", 8), "strong", 64)
    steps = plan(shape, VALUES, MACHINE)
    (summed,) = (step for step in steps if step.term == "gradient sum")
    assert (summed.algorithm, summed.times, summed.size) == ("rabenseifner", 4, 1e6)
    calls = sum(call.times for term in parts(shape).values() for call in term.calls)
    assert sum(step.times for step in steps if step.algorithm != "compute") == calls
    staged = plan(shape_of("staged", "strong", 8), VALUES, MACHINE)
    pipelines = [step for step in staged if step.algorithm == "pipeline"]
    assert [step.term for step in pipelines] == ["gradient evaluations"] * 3 + ["Jacobian products"]


@pytest.mark.processes
def test_simulated_work_is_that_of_the_plan(simulator):
    (one,) = compare({"serial": [shape_of("replicated", "weak", 2)]}, VALUES | {"fixed": 1.0}, [MACHINE])
    assert one.simulated["fixed"] == pytest.approx(1.0, rel=1e-6)


def studies(path):
    records = [record_of("strong", shape_of("replicated", "strong", ranks), VALUES) for ranks in (1, 2, 4)]
    write_studies(path, Studies(tuple(records), {m: 1e-12 * m**3 for m in REDUCED_MODELS}))
    return str(path)


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["simulate", *arguments])
    return end.value.code


@pytest.mark.processes
def test_the_command(simulator, tmp_path, capsys):
    file = studies(tmp_path / "studies.h5")
    assert call(file, "--ranks", "16", "--network", *NETWORKS, f"--json={tmp_path / 'out.json'}") == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(one["network"], one["ranks"]) for one in found] == [(network, 16) for network in NETWORKS]
    assert all(abs(one["error"]) < 0.25 for one in found)
    assert "predicted and simulated" in capsys.readouterr().out


def test_without_simgrid(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert call(studies(tmp_path / "studies.h5"), "--network", NETWORK) == 2
    assert "simulate needs SimGrid, and there is no smpicc and no smpirun; install it" in capsys.readouterr().err


def test_sizes_that_cannot_be_simulated(tmp_path, capsys):
    assert call(studies(tmp_path / "studies.h5"), "--ranks", "1") == 2
    assert "--ranks: '1' is not allowed" in capsys.readouterr().err


@pytest.mark.processes
def test_a_compiler_that_fails(simulator, tmp_path, monkeypatch):
    broken = tmp_path / "broken.c"
    broken.write_text("int main(void) { return nothing; }\n")
    monkeypatch.setattr(simulate, "SKELETON", broken)
    with pytest.raises(InvalidInput, match="smpicc cannot compile the skeleton"):
        Simulator(tmp_path)
