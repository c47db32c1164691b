"""Iterations to a loss by the number of subdomains: the command's table, and series that get nowhere."""

import json

import pytest

from apts_mpi.scaling.__main__ import main
from apts_mpi.scaling.subdomains import Series, deep_network


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["subdomains", *arguments])
    return end.value.code


def test_table(tmp_path, capsys):
    """The span of fewer columns is smaller, and so are first steps; more subdomains than layers are left out."""
    small = ["--layers", "4", "--subdomains", "2", "4", "8", "--largest", "2", "--width", "8"]
    assert call(*small, "--loss", "1.5", "--most", "30", f"--json={tmp_path / 'found.json'}") == 0
    free, bound = json.loads((tmp_path / "found.json").read_text())
    assert (free["network"], free["layers"], free["largest"], bound["largest"]) == ("residual", 4, None, 2)
    assert list(free["iterations"]) == ["2", "4"] and all(0 < steps <= 30 for steps in free["iterations"].values())
    assert free["growth"] == 1.0  # of four subdomains to four
    assert "iterations to a loss of 1.5" in capsys.readouterr().out


def test_a_loss_that_is_not_reached(capsys):
    assert call("--layers", "3", "--subdomains", "2", "--width", "4", "--loss", "1e-9", "--most", "1") == 0
    assert "more" in capsys.readouterr().out


def test_growth():
    assert Series("plain", 32, None, {2: 30, 4: 20, 8: 25}).growth == 1.25
    assert Series("plain", 32, None, {8: 20, 16: 30}).growth == 1.5
    assert Series("plain", 32, None, {4: 20, 8: None}).growth is None


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_networks_have_as_many_layers_as_asked_for(kind):
    network = deep_network(kind, 7, 5)
    assert sum(parameter.ndim == 2 for parameter in network.parameters()) == 7


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--layers", "2"], "--layers: '2' is not allowed; give a whole number of 3 or more"),
        (["--subdomains", "0"], "--subdomains: '0' is not allowed; give a whole number of 1 or more"),
        (["--largest", "1"], "--largest: '1' is not allowed; give a whole number of 2 or more"),
        (["--layers", "8", "--subdomains", "16"], "give one at least of 8 or less"),
        (["--loss", "0"], "--loss: '0' is not allowed; give a number above 0"),
    ],
)
def test_refusals(arguments, words, capsys):
    assert call(*arguments) == 2
    assert words in capsys.readouterr().err
