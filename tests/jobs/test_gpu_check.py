"""What jobs/gpu_check.sh makes of the parts that it has done."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "jobs" / "gpu_check_results.py"


def leave(directory, part, status, seconds, output="", **files):
    place = directory / part
    place.mkdir()
    (place / "output").write_text(output)
    (place / "status").write_text(f"{status} {seconds}\n")
    for ending, text in files.items():
        (directory / f"{part}.{ending}").write_text(text)


def results(directory, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu_check_results.py", str(directory), "cuda", str(tmp_path / "found.json")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return bool(end.value.code), json.loads((tmp_path / "found.json").read_text())


def doctor(works):
    checks = [{"check": "GPUs", "values": {}}, {"check": "Iallreduce on GPUs", "values": {"works": works}}]
    return json.dumps({"checks": checks}, indent=2)


@pytest.fixture
def directory(tmp_path):
    path = tmp_path / "results"
    path.mkdir()
    return path


def test_each_part_gives_what_it_found(directory, tmp_path, monkeypatch):
    leave(directory, "iteration", 0, 40, json='{"device": "cuda:0"}')
    suite = '<testsuites><testsuite tests="14" failures="0" errors="0" skipped="1"/></testsuites>'
    leave(directory, "tests", 0, 90, xml=suite)
    leave(directory, "staged-2", 0, 9)
    (directory / "staged-2" / "run").mkdir()
    (directory / "staged-2" / "run" / "summary.json").write_text('{"train_loss": 0.5, "problem": "digits"}')
    failed, found = results(directory, tmp_path, monkeypatch)
    assert not failed and (found["ok"], found["device"], found["seconds"]) == (True, "cuda", 139)
    assert found["parts"]["iteration"]["found"] == {"device": "cuda:0"}
    assert found["parts"]["tests"]["found"] == {"tests": 14, "failures": 0, "errors": 0, "skipped": 1}
    assert found["parts"]["staged-2"]["found"] == {"train_loss": 0.5}


@pytest.mark.parametrize(("works", "fails"), [(False, False), (True, True)])
def test_memory_of_gpus_that_mpi_cannot_use_is_no_failure(directory, tmp_path, monkeypatch, works, fails):
    leave(directory, "doctor", 0, 5, doctor(works))
    leave(directory, "direct-2", 139, 3, "a\nsegmentation fault")
    failed, found = results(directory, tmp_path, monkeypatch)
    assert failed == fails == (not found["ok"])
    part = found["parts"]["direct-2"]
    assert part["said"] == ["a", "segmentation fault"] if fails else "says the doctor" in part["left_out"]


def test_a_part_for_which_there_was_no_time(directory, tmp_path, monkeypatch, capsys):
    leave(directory, "tests", 124, 0)
    failed, found = results(directory, tmp_path, monkeypatch)
    assert failed and found["parts"]["tests"]["said"] == ["not done: no time was left"]
    assert "tests failed" in capsys.readouterr().out
