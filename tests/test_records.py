"""The run directory, and the one place for clock, environment and random state."""

import io
import json
import math
import time

import pytest
import torch
from rich.console import Console

from apts_mpi import InvalidInput
from apts_mpi.records.directory import RunDirectory, finite, print_summary
from apts_mpi.tools import environment
from apts_mpi.tools.events import Events


def test_records_are_lines_of_json(tmp_path):
    directory = RunDirectory(tmp_path / "a" / "run", overwrite=False)
    directory.write_config("seed: 3\n")
    directory.record({"iteration": 1, "loss": 0.1, "accepted": True})
    directory.record({"iteration": 2, "rho": -math.inf, "nested": {"loss": math.nan}})
    directory.flush()
    lines = (tmp_path / "a" / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"iteration": 1, "loss": 0.1, "accepted": True},
        {"iteration": 2, "rho": None, "nested": {"loss": None}},
    ]
    directory.close({"train_loss": 0.5})
    assert json.loads((tmp_path / "a" / "run" / "summary.json").read_text()) == {"train_loss": 0.5}
    assert (tmp_path / "a" / "run" / "config.yaml").read_text() == "seed: 3\n"


@pytest.mark.parametrize("name", ["config.yaml", "history.jsonl", "summary.json"])
def test_directory_that_holds_a_run_is_refused_as_it_is(tmp_path, name):
    (tmp_path / name).write_text("earlier")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match=rf"run_dir: .* already holds a run \({name}\); .* --overwrite"):
        RunDirectory(tmp_path, overwrite=False)
    assert (tmp_path / name).read_text() == "earlier" and len(list(tmp_path.iterdir())) == 2


def test_overwriting_replaces_the_records_and_nothing_else(tmp_path):
    for name in ("config.yaml", "history.jsonl", "summary.json", "notes.txt"):
        (tmp_path / name).write_text("earlier")
    RunDirectory(tmp_path, overwrite=True).close({})
    assert (tmp_path / "notes.txt").read_text() == "earlier"
    assert (tmp_path / "history.jsonl").read_text() == "" and not (tmp_path / "config.yaml").exists()


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="run_dir: .* cannot be written .* give another one"):
        RunDirectory(tmp_path / "file" / "run", overwrite=False)


def test_numbers_that_json_cannot_hold():
    assert finite({"a": math.inf, "b": [1], "c": {"d": math.nan, "e": 2.0}}) == {
        "a": None, "b": [1], "c": {"d": None, "e": 2.0},
    }  # fmt: skip


def test_table_at_the_end():
    console = Console(file=io.StringIO(), width=80)
    print_summary(console, {"problem": "digits", "optimizer": "apts", "ranks": 2, "train_loss": 0.123456, "none": None})
    text = console.file.getvalue()
    assert "digits, apts, 2 ranks" in text and "train loss" in text and "0.1235" in text and "none" not in text


CPU = torch.device("cpu")


def test_streams_are_equal_for_equal_keys_alone():
    draws = []
    for key in ((0, 1, 2), (0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1), (0, 1, 2, 0)):
        environment.seed_stream(CPU, *key)
        draws.append(torch.rand(4).tolist())
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws[1:]}) == 5


def test_streams_of_neighbouring_keys_are_not_alike():
    """As generators seeded with neighbouring numbers may be."""
    draws = []
    for key in range(200):
        environment.seed_stream(CPU, 0, key)
        draws.append(torch.rand(50))
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(200)
    assert correlation.diagonal(1).mean().abs() < 0.05  # of 199 correlations of 50 numbers: 0.14 / 14


def test_random_state_is_preserved_through_an_error():
    torch.manual_seed(4)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), environment.preserved_random_state(CPU):
        torch.rand(3)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_launcher_tells_size_and_rank(monkeypatch):
    for name, number in environment.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(number, raising=False)
    assert environment.launcher() is None
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert environment.launcher() is None  # one of two
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert environment.launcher() == (4, 3)
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setenv("PMI_RANK", "1")
    assert environment.launcher() == (2, 1)


def test_events_add_up():
    events = Events()
    for _ in range(2):
        with events.timed("sleep"):
            time.sleep(0.01)
    with pytest.raises(KeyError), events.timed("sleep"):
        raise KeyError
    assert events.totals["sleep"].calls == 3 and 0.02 <= events.totals["sleep"].seconds < 1.0
    events.message("sum", 8)
    events.message("sum", 4)
    assert (events.operations["sum"].messages, events.operations["sum"].bytes) == (2, 12)
    events.count_work(10, 0.5, 1.0 / 3.0)
    assert events.work == pytest.approx(5.0 / 3.0)
