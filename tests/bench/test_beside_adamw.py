"""Iterations beside steps of AdamW: each case is there, and the parts of an iteration make all of it."""

import pytest
import torch

from apts_mpi.bench import beside_adamw
from apts_mpi.bench.__main__ import PROBLEMS, main, parse
from apts_mpi.bench.beside_adamw import AdamW, Iterations
from apts_mpi.bench.cases import CASES


def test_the_command_knows_the_cases():
    assert set(CASES) == set(PROBLEMS)
    assert parse(["iteration"]).problems == PROBLEMS
    assert parse(["iteration", "--problems", "none"]).problems == ()
    assert parse(["iteration", "--problems", "text-64,mlp-256"]).problems == ("text-64", "mlp-256")


@pytest.mark.parametrize("text", ["mlp", "mlp-256,", "", "mlp-256 cnn-250"])
def test_cases_that_are_not_known(text, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["iteration", "--problems", text])
    assert ended.value.code == 2
    assert "choose one of mlp-256, mlp-2000" in capsys.readouterr().err


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    """Networks and batches go together, without files; as many subdomains as there are layers, at most."""
    case = CASES[name]
    assert case.subdomains() == ([1, 2, 3] if name == "wide-1024" else [1, 2, 3, 6])
    batches = case.batches()
    assert {len(inputs) for inputs, _ in batches} == {case.batch_size} == {int(name.partition("-")[2])}
    assert not torch.equal(batches[0][0], batches[1][0])
    inputs, targets = batches[0]
    assert case.loss(case.make()(inputs[:2]), targets[:2]).isfinite()


def test_parts_make_the_whole(monkeypatch):
    monkeypatch.setattr(beside_adamw, "TOGETHER", 2)
    iterations = Iterations(CASES["mlp-256"], 2)
    iterations()
    iterations.forget()
    iterations()
    shares = iterations.shares()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert all(share >= 0.0 for share in shares.values()) and shares["global evaluation"] > 0.05


def test_adamw_takes_steps(monkeypatch):
    monkeypatch.setattr(beside_adamw, "TOGETHER", 2)
    adamw = AdamW(CASES["mlp-256"])
    adamw()
    first = next(iter(adamw._optimizer.state.values()))
    assert first["step"] == 2 and adamw._network[0].weight.grad is not None


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(beside_adamw, "TOGETHER", 1)
    beside_adamw.beside_adamw(["mlp-256"], rounds=2)
    lines = capsys.readouterr().out.splitlines()
    assert "mlp-256" in lines[0] and "a step of AdamW: " in lines[-1]
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [row[0] for row in cells] == ["none"] * 4 + ["batches"] * 4
    assert [int(row[1]) for row in cells] == [1, 2, 3, 6] * 2
    for row in cells:
        total, *parts = map(float, row[3:])
        assert sum(parts) == pytest.approx(total, abs=0.04)
