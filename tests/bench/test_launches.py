"""What is counted of an iteration: operations that Python calls, and what a GPU was given."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from apts_mpi.bench import iteration
from apts_mpi.bench.launches import Launches, counted


def event(name, device, microseconds=0.0, parent=None, annotation=False):
    elapsed = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(
        name=name, device_type=device, cpu_parent=parent, time_range=elapsed, is_user_annotation=annotation
    )


def test_kernels_and_copies_of_a_gpu():
    linear = event("aten::linear", DeviceType.CPU)
    seen = [
        linear,
        event("aten::addmm", DeviceType.CPU, parent=linear),
        event("cudaLaunchKernel", DeviceType.CPU, parent=linear),
        event("aten::to", DeviceType.CPU, parent=event("MulBackward0", DeviceType.CPU)),
        event("gemm", DeviceType.CUDA, 30.0),
        event("Memcpy HtoD (Pinned -> Device)", DeviceType.CUDA, 10.0),
        event("iteration", DeviceType.CUDA, 50.0, annotation=True),
    ]
    assert counted(seen, 2) == Launches(1.0, 0.5, 0.5, pytest.approx(20e-6))


def test_figures_in_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(iteration, "BATCH", 8)
    monkeypatch.setattr(iteration, "COUNTED", 1)
    iteration.beside_passes(1, torch.device("cpu"), tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    names = ["bare passes", "plain sum, 1 subdomain", "default solver, 1 subdomain"]
    assert [row["iteration"] for row in found["one_rank"]] == names
    bare, *others = (row["operations"] for row in found["one_rank"])
    assert 0 < bare < min(others) and found["device"] == "cpu"
    assert all(row["seconds"] > 0.0 for row in found["one_rank"]) and found["all_ranks"]["default solver"] > 0.0
    assert "an iteration on cpu" in capsys.readouterr().out
