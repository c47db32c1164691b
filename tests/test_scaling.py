"""The report of a scaling study, from records whose figures are known."""

import json

import pytest

from apts_mpi.scaling import main


def write_run(path, ranks, seconds, batch_size=100, **others):
    """A run of four iterations; the first is slow, as it is in truth."""
    path.mkdir()
    ends = [10.0 + number * seconds for number in range(4)]
    records = [{"iteration": number + 1, "seconds": end} for number, end in enumerate(ends)]
    records.append({"epoch": 1, "seconds": ends[-1], "train_loss": 0.5})
    (path / "history.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = {"problem": "digits", "optimizer": "apts", "parameters": 7, "train_loss": 0.5, "seconds": ends[-1]}
    summary |= {"ranks": ranks, "batch_size": batch_size, "seconds_in_communication": ends[-1] / 4} | others
    (path / "summary.json").write_text(json.dumps(summary))
    return str(path)


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["report", *arguments])
    return end.value.code


def sizes(tmp_path, *runs):
    assert call(*runs, f"--json={tmp_path}/report.json") == 0
    return json.loads((tmp_path / "report.json").read_text())["sizes"]


def test_strong(tmp_path):
    """Half the time at four ranks is a speed-up of two and an efficiency of a half; the first iteration is left out."""
    two, one = write_run(tmp_path / "b", 4, 0.25), write_run(tmp_path / "a", 1, 0.5)
    first, second = sizes(tmp_path, two, one)
    assert (first["ranks"], first["speed_up"], first["efficiency"]) == (1, 1.0, 1.0)
    assert (second["ranks"], second["speed_up"], second["efficiency"]) == (4, 2.0, 0.5)
    assert second["seconds"] == 0.25 and second["communication"] == 0.25


def test_weak(tmp_path):
    """Twice the samples on twice the ranks in 1.25 of the time: an efficiency of 0.8."""
    runs = write_run(tmp_path / "a", 2, 1.0, 200), write_run(tmp_path / "b", 4, 1.25, 400)
    second = sizes(tmp_path, *runs)[1]
    assert (second["speed_up"], second["efficiency"]) == (1.6, 0.8)


def test_repeated_runs_count_once(tmp_path):
    """The median one."""
    runs = [write_run(tmp_path / str(number), 2, seconds) for number, seconds in enumerate((3.0, 1.0, 2.0))]
    assert [size["seconds"] for size in sizes(tmp_path, *runs)] == [2.0]


def test_unfinished_run_is_named(tmp_path, capsys):
    assert call(write_run(tmp_path / "a", 1, 1.0), f"{tmp_path}/gone") == 1
    assert f"{tmp_path}/gone has no summary.json" in capsys.readouterr().out


def test_runs_that_do_not_belong_together(tmp_path, capsys):
    one = write_run(tmp_path / "a", 1, 1.0)
    assert call(one, write_run(tmp_path / "b", 2, 1.0, problem="burgers")) == 2
    assert "differ in problem: ['burgers', 'digits']" in capsys.readouterr().err
    assert call(one, write_run(tmp_path / "c", 1, 1.0, 50)) == 2
    assert "differ in batch_size" in capsys.readouterr().err
    assert call(f"{tmp_path}/gone") == 2
    assert "none came to its end" in capsys.readouterr().err
