"""What needs a GPU: ``pytest -m gpu``. Ranks share the GPUs there are; MPI need not know of them."""

import functools
import json
import warnings

import pytest
import torch
from mpi4py import MPI
from networks import classified, classifier, cross_entropy
from processes import needs_mpirun, start
from run_files import arrays, history

from apts_mpi import APTS, APTSOptions, LocalOptions
from apts_mpi.parallel.communicator import Communicator
from apts_mpi.parallel.gpu_direct import try_direct
from apts_mpi.parallel.transport import Mirror, Staging, choose_device, transport_of
from apts_mpi.tools.events import Events

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.processes,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

# In the same order on every run; see docs/gpu.md.
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

DIGITS = ["--epochs=3", "--train-samples=600", "--subdomains=4", "--device=cuda", "--transport=staged"]
IN_STAGES = ["--layout=staged", "--subdomains=2", "--stall-timeout=100"]


@functools.cache
def direct_works():
    """Whether MPI works on memory of GPUs here."""
    return not try_direct(Communicator(MPI.COMM_SELF, Events()), "cuda")


def train(directory, name, ranks, *arguments):
    """A training run of its own name; its records without the times."""
    run = start(directory, ranks, [*DIGITS, f"--run-dir={name}", *arguments], **DETERMINISTIC)
    assert run.returncode == 0, run.stdout + run.stderr
    return history(directory / name)


def losses(device, dtype, options, steps=6):
    network = classifier().to(device, dtype)
    inputs, targets = classified()
    batch = inputs.to(device, dtype), targets.to(device)
    solver = APTS(network, cross_entropy, comm=MPI.COMM_SELF, options=options)
    return [solver.step(batch).schwarz.loss for _ in range(steps)]


@pytest.fixture
def device():
    return choose_device("cuda", 0)


def test_copies_are_in_pinned_memory_beside_the_computation(device):
    """What is still being computed is copied once it is there, and what is pulled is there for what follows."""
    assert isinstance(transport_of(device), Staging)
    factor = torch.full((2048, 2048), 1.0 / 2048, device=device)
    product = factor
    mirror = Mirror(torch.zeros(2048 * 2048, device=device))
    for _ in range(50):
        product = product @ factor
    mirror.tensor.copy_(2048.0 * product.view(-1))
    event = mirror.push(0, mirror.tensor.numel())
    event.synchronize()
    mirror.tensor.zero_()
    memory = mirror.memory(0, 3)
    assert mirror._memory.is_pinned() and memory.tolist() == pytest.approx([1.0] * 3, rel=1e-3)
    memory += 1.0
    mirror.pull(0, 3)
    assert (mirror.tensor[:3] * 2.0).tolist() == pytest.approx([4.0] * 3, rel=1e-3)


@pytest.mark.parametrize("solver", ["kfac", "muon", "adam", "tr", "lsr1"])
def test_iterates_are_those_of_the_cpu(device, solver):
    """float64: the same sums in another order."""
    options = APTSOptions(subdomains=3, local=LocalOptions(solver=solver, iterations=2))
    ours, theirs = (losses(place, torch.float64, options) for place in (device, torch.device("cpu")))
    assert ours == pytest.approx(theirs, rel=1e-6) and ours[-1] < ours[0]


def test_an_iteration_waits_for_the_device_three_times(device):
    """For the record, for the matrices of the coarse level, and for the length of its step."""
    network = classifier().to(device)
    inputs, targets = classified()
    batch = inputs.to(device), targets.to(device)
    solver = APTS(network, cross_entropy, comm=MPI.COMM_SELF, options=APTSOptions(subdomains=3))
    for _ in range(3):
        solver.step(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            solver.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [
        f"{warning.filename}:{warning.lineno}" for warning in caught if "called a synchronizing" in str(warning.message)
    ]
    assert 1 <= len(waits) <= 3, waits


@needs_mpirun
def test_digits_are_learnt(tmp_path):
    assert train(tmp_path, "run", 2, "--epochs=6")[-1]["test_accuracy"] > 0.9


@needs_mpirun
def test_runs_repeat_to_the_bit(tmp_path):
    assert train(tmp_path, "first", 2) == train(tmp_path, "second", 2)
    assert arrays(tmp_path / "first") == arrays(tmp_path / "second")


@needs_mpirun
@pytest.mark.parametrize("layout", [[], IN_STAGES], ids=["replicated", "staged"])
def test_staged_is_direct_to_the_bit(tmp_path, layout):
    if not direct_works():
        pytest.skip("MPI does not work on memory of GPUs here")
    staged, direct = (train(tmp_path, kind, 2, f"--transport={kind}", *layout) for kind in ("staged", "direct"))
    assert staged == direct
    assert arrays(tmp_path / "staged") == arrays(tmp_path / "direct")


@needs_mpirun
def test_checkpoint_of_a_gpu_goes_on_on_a_cpu(tmp_path):
    """In float64, where it stays near the run that never left the GPU."""
    whole = train(tmp_path, "whole", 2, "--dtype=float64", "--max-iterations=8")
    train(tmp_path, "run", 2, "--dtype=float64", "--max-iterations=4")
    resumed = start(tmp_path, 2, ["--resume", "--run-dir=run", "--device=cpu", "--max-iterations=8"])
    assert resumed.returncode == 0 and "resumed after iteration 4" in resumed.stdout, resumed.stderr
    ours = [record["loss"] for record in history(tmp_path / "run") if "rho" in record]
    assert ours == pytest.approx([record["loss"] for record in whole if "rho" in record], rel=1e-6)


@needs_mpirun
def test_stages_on_gpus(tmp_path):
    """The iterates in stages are those of the replicated layout."""
    same = ["--dtype=float64", "--max-iterations=6", "--schwarz.variant=inexact", "--schwarz.local_data=full"]
    stages = train(tmp_path, "stages", 2, *same, *IN_STAGES)
    replicated = train(tmp_path, "replicated", 2, *same, "--subdomains=2")
    pairs = zip(stages, replicated, strict=True)
    assert all(ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6) for ours, theirs in pairs if "rho" in ours)


@needs_mpirun
def test_bfloat16(tmp_path):
    assert train(tmp_path, "run", 2, "--autocast=bfloat16", "--epochs=6")[-1]["test_accuracy"] > 0.9


@needs_mpirun
def test_doctor(tmp_path):
    run = start(tmp_path, 2, ["--json"], module="apts_mpi.doctor")
    rows = {row["check"]: row for row in json.loads(run.stdout)["checks"]}
    assert "cuda:0" in rows["GPUs"]["found"]
    direct = rows["Iallreduce on GPUs"]
    words = "the tensors' own memory" if direct["values"]["works"] else "staging"
    assert direct["values"]["works"] == direct_works() and f"transport: {words}" in direct["found"]
