"""The run directory, and the table at the end of a run."""

import io
import json
import math

import pytest
from rich.console import Console

from apts_mpi import InvalidInput
from apts_mpi.records.directory import RunDirectory, finite, print_summary


def test_records_are_lines_of_json(tmp_path):
    directory = RunDirectory(tmp_path / "a" / "run", "seed: 3\n", print, overwrite=False)
    directory.record({"iteration": 1, "loss": 0.1, "accepted": True})
    directory.record({"iteration": 2, "rho": -math.inf, "nested": {"loss": math.nan}})
    directory.flush()
    lines = (tmp_path / "a" / "run" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"iteration": 1, "loss": 0.1, "accepted": True},
        {"iteration": 2, "rho": None, "nested": {"loss": None}},
    ]
    directory.close()
    assert directory.write_summary({"train_loss": 0.5}) == ""
    assert json.loads((tmp_path / "a" / "run" / "summary.json").read_text()) == {"train_loss": 0.5}
    assert (tmp_path / "a" / "run" / "config.yaml").read_text() == "seed: 3\n"


@pytest.mark.parametrize("name", ["config.yaml", "history.jsonl", "summary.json"])
def test_directory_that_holds_a_run_is_refused_as_it_is(tmp_path, name):
    (tmp_path / name).write_text("earlier")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInput, match=rf"run_dir: .* already holds a run \({name}\); .* --overwrite"):
        RunDirectory(tmp_path, "", print, overwrite=False)
    assert (tmp_path / name).read_text() == "earlier" and len(list(tmp_path.iterdir())) == 2


def test_overwriting_replaces_the_records_and_nothing_else(tmp_path):
    for name in ("config.yaml", "history.jsonl", "summary.json", "notes.txt"):
        (tmp_path / name).write_text("earlier")
    RunDirectory(tmp_path, "", print, overwrite=True).close()
    assert (tmp_path / "notes.txt").read_text() == "earlier"
    assert (tmp_path / "history.jsonl").read_text() == "" and not (tmp_path / "summary.json").exists()


def test_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="run_dir: .* cannot be written .* give another one"):
        RunDirectory(tmp_path / "file" / "run", "", print, overwrite=False)


def test_numbers_that_json_cannot_hold():
    assert finite({"a": math.inf, "b": [1], "c": {"d": math.nan, "e": 2.0}}) == {
        "a": None, "b": [1], "c": {"d": None, "e": 2.0},
    }  # fmt: skip


def test_table_at_the_end():
    console = Console(file=io.StringIO(), width=80)
    print_summary(console, {"problem": "digits", "optimizer": "apts", "ranks": 2, "train_loss": 0.123456, "none": None})
    text = console.file.getvalue()
    assert "digits, apts, 2 ranks" in text and "train loss" in text and "0.1235" in text and "none" not in text
