"""Operator learning and language modelling."""

import numpy as np
import pytest
import torch

from apts_mpi import problems
from apts_mpi.errors import InvalidInput
from apts_mpi.problems import operators
from apts_mpi.problems.text import CONTEXT, character_gpt


def test_antiderivative_samples():
    """The target is the integral of the function at the sensors: compared with the trapezoidal rule."""
    inputs, targets = operators.antiderivative_samples(functions=30, points=4, seed=7)
    assert inputs.shape == (120, operators.SENSORS + 1) and targets.shape == (120, 1)
    x = np.linspace(0.0, 1.0, operators.SENSORS)
    fine = np.linspace(0.0, 1.0, 5001)
    modes = np.arange(1, operators.MODES + 1)
    for row, target in zip(inputs, targets, strict=True):
        coefficients = np.linalg.lstsq(np.sin(np.pi * np.outer(x, modes)), row[:-1], rcond=None)[0]
        v = np.sin(np.pi * np.outer(fine, modes)) @ coefficients
        integral = np.concatenate([[0.0], np.cumsum((v[1:] + v[:-1]) / 2) * (fine[1] - fine[0])])
        assert abs(np.interp(row[-1], fine, integral) - target[0]) < 1e-6


def test_deeponet_is_a_product_of_branch_and_trunk():
    problem = problems.build("deeponet-sine", dtype=torch.float64)
    inputs, targets = problem.test
    network = problem.network
    products = network.branch(inputs[:, :-1]) * network.trunk(inputs[:, -1:])
    outputs = network(inputs)
    torch.testing.assert_close(outputs.squeeze(1), products.sum(1) + network.bias)
    expected = (outputs - targets).norm() / targets.norm()
    assert problem.metrics["relative_l2_error"](network) == pytest.approx(expected.item(), rel=1e-12)
    assert not set(map(tuple, inputs.tolist())) & set(map(tuple, problem.train[0].tolist()))


def write(path, characters):
    path.write_text("".join(chr(ord("a") + i % 26) for i in range(characters)))
    return path


def test_text_windows(tmp_path):
    file = write(tmp_path / "letters.txt", 2000)
    problem = problems.build("text", data_dir=str(file))
    inputs, targets = problem.train
    assert inputs.shape == targets.shape == (1800 // (CONTEXT + 1), CONTEXT)
    assert problem.test[0].shape == (200 // (CONTEXT + 1), CONTEXT)
    assert inputs[0].tolist() == [i % 26 for i in range(CONTEXT)]
    assert targets[1].tolist() == [(CONTEXT + 2 + i) % 26 for i in range(CONTEXT)]
    assert problem.test[0][0, 0] == 1800 % 26
    assert problem.network(inputs[:2]).shape == (2, CONTEXT, 26)
    assert len(problems.build("text", data_dir=str(tmp_path), train_samples=3).train[0]) == 3


def test_text_network_size_and_layers(tmp_path):
    network = problems.build("text", data_dir=str(write(tmp_path / "a.txt", 2000))).network
    assert isinstance(network, torch.nn.Sequential) and len(network) == 7
    assert 0.7e6 < sum(parameter.numel() for parameter in network.parameters()) < 1.1e6


def test_text_network_is_causal():
    network = character_gpt(vocabulary=9, context=8, width=16, heads=2, blocks=2).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
    tokens = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    changed = tokens.clone()
    changed[0, 4] = 0
    before, after = network(tokens), network(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4], rtol=0, atol=1e-12)
    assert ((before - after)[0, 4:].abs().amax(dim=1) > 1e-6).all()


def test_attention_is_scaled_dot_product_attention():
    block = character_gpt(vocabulary=9, context=8, width=16, heads=2, blocks=1).double()[1]
    tokens = torch.randn(3, 8, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heads = [layer(tokens).view(3, 8, 2, 8).transpose(1, 2) for layer in (block.query, block.key, block.value)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
    expected = block.projection(expected.transpose(1, 2).reshape(3, 8, 16))
    torch.testing.assert_close(block._attention(tokens), expected)


def test_text_faults(tmp_path):
    with pytest.raises(InvalidInput, match="--data-dir: text needs one"):
        problems.build("text")
    with pytest.raises(InvalidInput, match="absent' does not exist"):
        problems.build("text", data_dir=str(tmp_path / "absent"))
    with pytest.raises(InvalidInput, match=r"holds 0 .txt files"):
        problems.build("text", data_dir=str(tmp_path))
    short = write(tmp_path / "a.txt", 649)
    with pytest.raises(InvalidInput, match="has 649 characters; give a text of at least 650"):
        problems.build("text", data_dir=str(short))
    write(tmp_path / "b.txt", 650)
    with pytest.raises(InvalidInput, match=r"holds 2 .txt files"):
        problems.build("text", data_dir=str(tmp_path))
    assert len(problems.build("text", data_dir=str(tmp_path / "b.txt")).test[0]) == 1
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe" * 500)
    with pytest.raises(InvalidInput, match=r"b.txt cannot be read as text in UTF-8"):
        problems.build("text", data_dir=str(tmp_path / "b.txt"))


def test_adam_lowers_the_text_loss(tmp_path):
    problem = problems.build("text", data_dir=str(write(tmp_path / "a.txt", 2000)))
    inputs, targets = (part[:8] for part in problem.train)
    optimizer = torch.optim.Adam(problem.network.parameters(), lr=1e-3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = problem.loss(problem.network(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - np.log(26)) < 0.1 and losses[-1] < 0.6 * losses[0]
