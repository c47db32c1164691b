"""Continual learning by other methods: their penalties against dense matrices, and the table."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apts_mpi.compare.__main__ import main
from apts_mpi.compare.continual.methods import METHODS
from apts_mpi.compare.continual.penalties import Diagonal, Kronecker
from apts_mpi.tools.status import USAGE


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def flat(values):
    return torch.cat([value.detach().flatten() for value in values])


def fisher(own, inputs):
    """By the definition: over samples and labels, of the log-likelihoods' gradients."""
    total = 0.0
    for sample in inputs:
        scores = torch.log_softmax(own(sample), dim=0)
        for score in scores:
            slope = flat(torch.autograd.grad(score, list(own.parameters()), retain_graph=True))
            total = total + score.exp().detach() * torch.outer(slope, slope)
    return total / len(inputs)


def test_the_diagonal_penalty_is_that_of_the_dense_matrices():
    own, penalty, expected = network(), Diagonal(2.0), 0.0
    found = []
    for seed in range(2):
        inputs = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        penalty.remember(own, cross_entropy, inputs, torch.zeros(40, dtype=torch.int64))
        found.append((flat(own.parameters()), fisher(own, inputs).diagonal()))
        with torch.no_grad():
            own[2].weight += 0.3
    for centre, diagonal in found:
        expected += (diagonal * (flat(own.parameters()) - centre).square()).sum()
    assert penalty.value(own).item() == pytest.approx(float(expected), rel=1e-10)


def test_the_kronecker_penalty_is_exact_for_the_last_layer_of_one_sample():
    """Of one sample the block of a linear layer is a Kronecker product, to rounding."""
    own, penalty = network(), Kronecker(2.0)
    inputs = torch.randn(1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    penalty.remember(own, cross_entropy, inputs, torch.zeros(1, dtype=torch.int64))
    before, matrix = flat(own.parameters()), fisher(own, inputs)
    with torch.no_grad():
        own[2].weight += torch.arange(12.0).view(3, 4).sin()
        own[2].bias -= torch.arange(3.0)
    way = flat(own.parameters()) - before
    assert penalty.value(own).item() == pytest.approx(float(way @ matrix @ way), rel=1e-10)


@pytest.mark.processes
def test_the_table_and_what_is_finished_is_kept(tmp_path, capsys, monkeypatch):
    for name, value in (("ewc", 10.0), ("fisher", 0.05)):
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], grid=(value,)))
    small = ["continual", "permuted-digits", "--seeds=1", "--epochs=1", "--train-samples=120", f"--out={tmp_path}"]
    for _ in range(2):
        main([*small, "--methods=plain,replay,ewc,fisher"])
    printed = capsys.readouterr().out
    table = (tmp_path / "permuted-digits" / "table.md").read_text()
    assert printed.count(table) == 2 and len(table.splitlines()) == 6
    path = tmp_path / "permuted-digits" / "plain-0-seed-0.json"
    score = {"accuracy": 0.125, "forgetting": 0.0, "recovery": 0.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"score": score}))
    main([*small, "--methods=plain"])
    assert "0.125 (0.125 to 0.125)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main([*small, "--methods=plain", "--train-samples=130"])
    assert ended.value.code == USAGE and "is of other options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--methods=none", "--methods: 'none' is not allowed"),
        ("--seeds=0", "--seeds: '0' is not allowed; give a whole number of 1 or more"),
        ("digits", "digits has no tasks; choose permuted-digits"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(tmp_path, capsys, argument, words):
    with pytest.raises(SystemExit) as ended:
        main(["continual", argument, f"--out={tmp_path}"])
    assert ended.value.code == USAGE and words in capsys.readouterr().err
