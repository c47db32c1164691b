"""``--log-view``, ``--trace``, ``--torch-profiler`` and ``--tensorboard`` of the command line."""

import gzip
import io
import json
import math
import signal
import sys
import time

import pytest
from networks import classifier
from processes import PROBLEM, SMALL, Job, needs_mpirun
from rich.console import Console

from apts_mpi.errors import InvalidInput
from apts_mpi.records.directory import RunDirectory
from apts_mpi.train.__main__ import main
from apts_mpi.train.log_view import COLUMNS, print_events

USAGE, REQUEUE = 2, 75

BASELINE = "--problem=networks:problem --dtype=float64 --device=cpu --epochs=1 --batch-size=30 --optimizer=adam".split()
STAGED = [
    *"--problem=networks:problem --dtype=float64 --device=cpu --epochs=1 --batch-size=30 --layout=staged".split(),
    *"--micro-batches=2 --local.solver=sgd".split(),
]


def events_of(path):
    return json.loads((path / "summary.json").read_text())["events"]


def trace_of(path):
    """Events by rank, after a look at what the format asks for."""
    content = json.loads((path / "trace.json").read_text())
    assert set(content) == {"traceEvents", "displayTimeUnit", "otherData"}
    names, spans = {}, {}
    for event in content["traceEvents"]:
        assert isinstance(event["pid"], int) and event["tid"] == 0
        if event["ph"] == "M":
            names[event["pid"]] = (*names.get(event["pid"], ()), event["name"])
        else:
            assert set(event) == {"name", "ph", "ts", "dur", "pid", "tid"} and event["ph"] == "X"
            assert event["ts"] >= 0.0 and event["dur"] >= 0.0
            # Nanoseconds: exact, as differences of the file's numbers are not.
            began = round(event["ts"] * 1000)
            spans.setdefault(event["pid"], []).append((began, began + round(event["dur"] * 1000), event["name"]))
    assert all(found == ("process_name", "process_sort_index", "thread_name") for found in names.values())
    assert set(names) == set(spans)
    return spans


def nest(spans):
    """Check that each event is within the one around it; how deep they go."""
    deepest, around = 0, []
    for began, stop, _ in sorted(spans, key=lambda span: (span[0], -span[1])):
        while around and around[-1] <= began:
            around.pop()
        assert not around or stop <= around[-1]
        around.append(stop)
        deepest = max(deepest, len(around))
    return deepest


def calls(spans, name):
    return sum(found == name for _, _, found in spans)


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_profile_of_torch(world, directory, trained):
    trained(*SMALL, "--run-dir=run", "--max-iterations=3", "--torch-profiler=1")
    folder = directory / "run" / "torch-profile"
    if world.rank == 0:
        assert sorted(file.name for file in folder.iterdir()) == [f"rank-{rank}.json.gz" for rank in range(world.size)]
        for file in folder.iterdir():
            names = [event["name"] for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]]
            assert sum(name.startswith("ProfilerStep#") for name in names) == 1
            assert any(name.startswith("aten::") for name in names)
    world.Barrier()
    # Too short for one, and what is there is another run's.
    output = trained(*SMALL, "--run-dir=run", "--overwrite", "--max-iterations=1", "--torch-profiler=1")
    if world.rank == 0:
        assert f"{world.size} of {world.size} ranks have no profile" in output and not folder.exists()


@pytest.mark.mpi
@pytest.mark.all_sizes(arguments=SMALL)
@pytest.mark.parametrize("arguments", [SMALL, BASELINE, STAGED], ids=["replicated", "baseline", "staged"])
def test_table_and_trace(world, tmp_path, monkeypatch, capfd, arguments):
    if arguments is STAGED and world.size > len(list(classifier().parameters())) // 2:
        pytest.skip("for at most as many ranks as layers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    main([*arguments, "--run-dir=run", "--log-view", "--trace"])
    printed, errors = capfd.readouterr()
    assert errors == ""
    if world.rank > 0:
        assert printed == "" and list(tmp_path.iterdir()) == []
        return
    events, spans = events_of(tmp_path / "run"), trace_of(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert math.fsum(event["share"] for event in events.values()) == pytest.approx(1.0, rel=1e-12)
    assert all(event["ratio"] is None or event["ratio"] >= 1.0 for event in events.values())
    table = printed[printed.index(f"events of {world.size} rank(s)") :]
    for name, event in events.items():
        lines = [line for line in table.splitlines() if line.startswith(f"│ {name} ")]
        assert len(lines) == 2 and lines[0].split("│")[2].strip() == str(event["calls"])
        assert f"{event['share']:.1%}" in lines[0] and "…" not in lines[0] + lines[1]
    assert all(len(line) <= 80 for line in table.splitlines())
    # The outermost event has all of the time, and of the memory what was there before the first iteration.
    others = [event for name, event in events.items() if name != "other"]
    assert all(event["seconds_inclusive"] >= event["seconds_max"] for event in events.values())
    assert events["other"]["seconds_inclusive"] > max(event["seconds_inclusive"] for event in others)
    if events["other"]["memory"] is not None:  # a process of another one's size does not know its own
        assert events["other"]["memory"] > 10**8 and sum(event["memory"] for event in others) < 10**9
    # Sums of shares of a batch, rounded.
    assert events["global evaluation"]["gradient_evaluations"] >= 2.0 - 1e-12
    assert events["metrics"]["calls"] == events["checkpoint"]["calls"] == events["other"]["calls"] == 1
    # Every rank has its events, nested, at the same time.
    assert set(spans) == set(range(world.size))
    for of_rank in spans.values():
        assert nest(of_rank) >= 3
        for name in events:
            assert 0 < calls(of_rank, "training" if name == "other" else name) <= events[name]["calls"]
    outermost = [max(of_rank, key=lambda span: span[1] - span[0]) for of_rank in spans.values()]
    assert {name for _, _, name in outermost} == {"training"}
    assert max(start for start, _, _ in outermost) < min(stop for _, stop, _ in outermost)
    if arguments is STAGED:
        # Two iterations, and the gradient beside the first point that finds the radius.
        assert calls(spans[0], "backward 0") == calls(spans[0], "backward 1") == 3


@pytest.mark.parametrize(("width", "tables"), [(30, 10), (80, 2), (140, 1)])
def test_tables_fit_where_they_can(width, tables):
    """Every heading stands in one table, and no cell is cut."""
    numbers = {"calls": 123456, "seconds_max": 1234.5, "seconds_inclusive": 2345.6, "share": 1.0, "ratio": 12.34}
    numbers |= {"overlap": 0.99, "messages": 1234567, "bytes": 1, "gradient_evaluations": 98765.43, "memory": 10**12}
    console = Console(file=io.StringIO(), width=width)
    print_events({"global evaluation": numbers, "other": numbers | {"ratio": None}}, 4, console)
    printed = console.file.getvalue()
    headings = [line.split("┃")[2:-1] for line in printed.splitlines() if line.startswith("┃ event ")]
    assert len(headings) == tables and [name.strip() for names in headings for name in names] == [
        heading for heading, _, _ in COLUMNS
    ]
    assert all(len(line) <= max(width, 35) for line in printed.splitlines()) and "…" not in printed
    assert printed.count("events of 4 rank(s)") == 1 and printed.count("1.0 TB") == printed.count("98765.43") == 2
    # Numbers that there are not have no column.
    console = Console(file=io.StringIO(), width=width)
    print_events({"other": numbers | {"memory": None, "overlap": None}}, 1, console)
    assert "│ memory" not in console.file.getvalue() and "┃ overlap" not in console.file.getvalue()


def scalars_of(path):
    """What TensorBoard shows: by tag, iterations and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def records_of(path):
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


# What the package itself warns of is not ours to mend.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.mpi
def test_event_files_and_resumed_runs(world, directory, trained):
    """The run goes on from the iteration before the last: that one is done again, and shown once."""
    pytest.importorskip("tensorboard")
    run = directory / "run"
    asked = "--epochs=9 --max-iterations=3 --checkpoint-every=2 --tensorboard --trace --run-dir=run".split()
    trained(*SMALL, *asked)
    if world.rank == 0:
        assert [step for step, _ in scalars_of(run / "tensorboard")["iteration/loss"]] == [1, 2, 3]
        assert calls(trace_of(run)[0], "judge") == 3
    time.sleep(1.0)  # event files are read in the order of their names, which begin with the second
    trained(
        PROBLEM, "--resume=run/checkpoints/step-00000002.h5", "--run-dir=run", "--max-iterations=6", "--tensorboard",
        "--trace",
    )  # fmt: skip
    if world.rank > 0:
        return
    # The events are those since the run was resumed.
    assert events_of(run)["judge"]["calls"] == calls(trace_of(run)[world.size - 1], "judge") == 4
    shown = scalars_of(run / "tensorboard")
    records = records_of(run)
    for tag, kind in (("loss", "iteration"), ("rho", "iteration"), ("train_loss", "epoch"), ("test_accuracy", "epoch")):
        of_kind = [record for record in records if ("train_loss" in record) == (kind == "epoch")]
        steps, values = zip(*shown[f"{kind}/{tag}"], strict=True)
        assert list(steps) == [record["iteration"] for record in of_kind]
        assert list(values) == pytest.approx([record[tag] for record in of_kind], rel=1e-6)  # kept in single precision
    assert "iteration/epoch" not in shown and "iteration/iteration" not in shown


@pytest.mark.processes
@needs_mpirun
def test_stopped_run_leaves_a_trace_and_prints_its_events(tmp_path):
    job = Job(tmp_path, 2, [*SMALL, "--epochs=1000000", "--run-dir=run", "--trace", "--log-view"])
    job.wait_for("epoch 2 ")
    job.process.send_signal(signal.SIGTERM)
    status, output = job.end()
    assert status == REQUEUE, output
    assert "events of 2 rank(s)" in output and "was received: go on with" in output
    spans = trace_of(tmp_path / "run")
    assert set(spans) == {0, 1} and all(calls(of_rank, "checkpoint") == 1 for of_rank in spans.values())
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.mpi
@pytest.mark.usefixtures("few_ranks")
def test_missing_package_is_told_before_the_work(world, directory, command, monkeypatch):
    (directory / "tensorboard.py").write_text("raise ImportError('no tensorboard here')\n")
    monkeypatch.syspath_prepend(directory)
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    status, output, errors = command(*SMALL, "--tensorboard", "--run-dir=run")
    assert status == USAGE and output == "" and not (directory / "run").exists()
    if world.rank == 0:
        assert errors.count("apts_mpi.train: error: ") == 1 and "Traceback" not in errors
        assert "no tensorboard here" in errors and "pip install apts_mpi[tensorboard]" in errors


def test_trace_that_cannot_be_written(directory, command):
    """Told before the work where the file of an earlier run cannot be replaced."""
    (directory / "run" / "trace.json").mkdir(parents=True)
    status, output, errors = command(*SMALL, "--trace", "--run-dir=run")
    assert status == USAGE and "epoch" not in output
    assert "run_dir: 'run' cannot be written" in errors and "Traceback" not in errors


def test_a_new_run_takes_away_what_was_written_of_an_earlier_one(tmp_path):
    (tmp_path / "history.jsonl").touch()

    def kept(**how):
        (tmp_path / "trace.json").touch()
        (tmp_path / "tensorboard").mkdir(exist_ok=True)
        try:
            RunDirectory(tmp_path, "", print, **how).close()
        except InvalidInput as error:
            assert "already holds a run" in str(error)
        return [name for name in ("trace.json", "tensorboard") if (tmp_path / name).exists()]

    assert kept(overwrite=False) == ["trace.json", "tensorboard"]
    assert kept(overwrite=True, in_place=True) == ["tensorboard"]
    assert kept(overwrite=True) == []
