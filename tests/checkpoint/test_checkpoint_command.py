"""``python -m apts_mpi.checkpoint``."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from thread_ranks import on_ranks

from apts_mpi.checkpoint import Checkpoint, CheckpointDirectory, __main__, split_evenly

STATE = {
    "0.weight": torch.arange(12.0).reshape(3, 4),
    "1.running_mean": torch.tensor([0.5, float("nan")], dtype=torch.float64),
    "1.num_batches_tracked": torch.tensor(7),
    "mask[bold]": torch.tensor([True, False]),
}


def arrays():
    prefixes = {"1.running_mean": "buffers/", "1.num_batches_tracked": "buffers/"}
    state = {prefixes.get(name, "parameters/") + name: tensor.numpy() for name, tensor in STATE.items()}
    return state | {"solver/radius": np.array(0.25)}


def save(path, step, changes=None, metadata=None):
    """A checkpoint of two ranks."""

    def run(comm):
        with CheckpointDirectory(path, comm, writer="parts") as checkpoints:
            return checkpoints.save(split_evenly(arrays() | (changes or {}), comm), metadata or {}, step)

    return on_ranks(2, run)[0]


@pytest.fixture
def command(capsys):
    """Call the command; gives status, output and errors."""

    def call(*arguments):
        with pytest.raises(SystemExit) as end:
            __main__.main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return end.value.code, output.out, output.err

    return call


def assert_error(result, message):
    """One line, as every error has it."""
    status, output, errors = result
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("apts_mpi.checkpoint: error: ") and message in errors


def test_info(command, tmp_path):
    path = save(tmp_path, 100, metadata={"iteration": 100, "history": list(range(1000))})
    for name in (tmp_path, tmp_path / "latest", path):
        status, output, errors = command("info", name)
        assert (status, errors) == (0, "")
        lines = output.splitlines()
        assert any("parameters/0.weight" in line and "(3, 4)" in line and "float32" in line for line in lines)
        assert any("parameters/mask[bold]" in line and "bool" in line for line in lines)
        assert "step 100" in lines[0] and "iteration: 100" in lines
        assert max(map(len, lines)) <= 160


def test_verify(command, tmp_path):
    paths = [save(tmp_path, step) for step in (1, 2)]
    assert command("verify", *paths) == (0, f"{paths[0]}: ok\n{paths[1]}: ok\n", "")
    part = tmp_path / "step-00000001.parts" / "0000.h5"
    part.write_bytes(part.read_bytes()[:-1])
    status, output, errors = command("verify", *paths)
    assert (status, errors) == (1, "")
    first, second = output.splitlines()
    assert str(part) in first and second == f"{paths[1]}: ok"


def test_diff(command, tmp_path):
    first = save(tmp_path / "a", 1)
    assert command("diff", first, save(tmp_path / "b", 2)) == (0, "", "")
    changes = {
        "parameters/0.weight": arrays()["parameters/0.weight"] + np.float32(0.5),
        "buffers/1.num_batches_tracked": np.array(7.0),
        "solver/radius": np.zeros(2),
        "solver/more": np.zeros(2),
    }
    second = save(tmp_path / "c", 1, changes)
    assert command("diff", first, second) == (
        1,
        "parameters/0.weight: largest difference 0.5\n"
        "buffers/1.num_batches_tracked: dtype int64 and float64\n"
        "solver/radius: shape () and (2,)\n"
        f"solver/more: not in {first}\n",
        "",
    )


def test_to_torch_and_back(command, tmp_path):
    save(tmp_path, 1)
    assert command("to-torch", tmp_path, tmp_path / "state.pt") == (0, f"{tmp_path}/state.pt: 4 tensors\n", "")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    torch.testing.assert_close(state, STATE, rtol=0, atol=0, equal_nan=True)
    status, _, errors = command("from-torch", tmp_path / "state.pt", tmp_path / "new.h5")
    assert (status, errors) == (0, "")
    with Checkpoint(tmp_path / "new.h5") as checkpoint:
        checkpoint.verify()
        assert set(checkpoint.names) == {f"parameters/{name}" for name in STATE}
        for name, tensor in STATE.items():
            assert checkpoint.read(f"parameters/{name}").tobytes() == tensor.numpy().tobytes()
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no torch file", "cannot be read as a state_dict"),
        ({"epoch": 3}, "holds more than tensors by name"),
        ([torch.zeros(1)], "holds more than tensors by name"),
        ({"a": torch.zeros(2, dtype=torch.bfloat16)}, "a is torch.bfloat16, which numpy lacks"),
    ],
)
def test_from_torch_of_something_else(command, tmp_path, content, message):
    source = tmp_path / "state.pt"
    source.write_bytes(content) if isinstance(content, bytes) else torch.save(content, source)
    assert_error(command("from-torch", source, tmp_path / "new.h5"), message)
    assert list(tmp_path.iterdir()) == [source]


def test_files_that_cannot_be_used(command, tmp_path):
    (tmp_path / "notes").write_text("notes")
    assert_error(command("info", tmp_path / "absent"), "absent cannot be read (No such file or directory)")
    assert_error(command("info", tmp_path), "has no checkpoint in it")
    assert_error(command("diff", tmp_path / "notes", tmp_path / "notes"), "notes is not a checkpoint of apts_mpi")
    save(tmp_path / "run", 1)
    assert_error(command("to-torch", tmp_path / "run", tmp_path / "notes" / "state.pt"), "notes' cannot be written (")
    assert_error(command("from-torch", tmp_path / "absent", tmp_path / "new.h5"), "absent cannot be read as")


def test_without_parameters(command, tmp_path):
    def run(comm):
        with CheckpointDirectory(tmp_path, comm) as checkpoints:
            return checkpoints.save(split_evenly({"solver/radius": np.ones(1)}, comm), {}, 1)

    assert_error(command("to-torch", *on_ranks(1, run), tmp_path / "state.pt"), "neither parameters nor buffers")


@pytest.mark.processes
def test_as_a_process(tmp_path):
    path = save(tmp_path, 1)
    arguments = [sys.executable, "-W", "error", "-m", "apts_mpi.checkpoint"]
    run = subprocess.run([*arguments, "verify", path], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (0, f"{path}: ok\n", "")
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "COMMAND" in run.stderr and "Traceback" not in run.stderr


def test_to_safetensors_and_back(command, tmp_path):
    """What the package itself reads, and what it has written, under the same names."""
    library = pytest.importorskip("safetensors.torch")
    save(tmp_path, 1)
    file = tmp_path / "model.safetensors"
    assert command("to-safetensors", tmp_path, file) == (0, f"{file}: 4 tensors\n", "")
    torch.testing.assert_close(library.load_file(file), STATE, rtol=0, atol=0, equal_nan=True)
    library.save_file(STATE, file)
    assert command("from-safetensors", file, tmp_path / "new.h5") == (0, f"{tmp_path}/new.h5: 4 arrays\n", "")
    with Checkpoint(tmp_path / "new.h5") as checkpoint:
        assert {name: checkpoint.read(f"parameters/{name}").tobytes() for name in STATE} == {
            name: tensor.numpy().tobytes() for name, tensor in STATE.items()
        }


def test_a_network_of_huggingface_reads_its_own_names(command, tmp_path):
    """Its parameters go through a checkpoint into the directory from which `from_pretrained` takes them."""
    pytest.importorskip("safetensors")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    network = transformers.GPT2Model(config)
    network.save_pretrained(tmp_path / "model")
    kept = tmp_path / "model" / "model.safetensors"
    assert command("from-safetensors", kept, tmp_path / "model.h5")[0] == 0
    kept.unlink()
    assert command("to-safetensors", tmp_path / "model.h5", kept)[0] == 0
    again = transformers.GPT2Model.from_pretrained(tmp_path / "model").state_dict()
    torch.testing.assert_close(dict(again), dict(network.state_dict()), rtol=0, atol=0)


def test_safetensors_that_cannot_be_used(command, tmp_path, monkeypatch):
    (tmp_path / "bad.safetensors").write_bytes(b"no safetensors")
    bad = ("from-safetensors", tmp_path / "bad.safetensors", tmp_path / "new.h5")
    assert_error(command(*bad), "cannot be read as safetensors (")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert_error(command(*bad), "safetensors is not installed; pip install safetensors")
    assert not (tmp_path / "new.h5").exists()
