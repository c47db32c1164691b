"""``python -m apts_mpi.plot`` on runs that took place."""

import json
import re
import shutil
from xml.etree import ElementTree

import matplotlib.image
import pytest
from hidden import hide_matplotlib
from processes import start

from apts_mpi.errors import InvalidInput
from apts_mpi.plot import __main__ as plot
from apts_mpi.plot import runs as run_plots
from apts_mpi.records.reading import group, read_run
from apts_mpi.train import __main__ as train

AXES = {"iterations", "gradient evaluations", "seconds", "loss", "accuracy", "ρ", "radius"}

# The first steps are far too long.
REJECTING = "--coarse=none --local.solver=sgd --trust-region.initial-radius=100 --subdomains=2 --epochs=3".split()
RUNS = {
    "plain-0": [*REJECTING, "--seed=0"],
    "plain-1": [*REJECTING, "--seed=1", "--monitor"],
    "adam": ["--optimizer=adam", "--learning-rate=1e-2", "--epochs=2"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory of finished runs."""
    path = tmp_path_factory.mktemp("runs")
    for name, arguments in RUNS.items():
        train.main([*arguments, "--problem=digits", "--train-samples=480", f"--run-dir={path / name}"])
    return path


def texts(svg):
    """What is written in a picture, which holds its letters as shapes, and as comments."""
    assert ElementTree.parse(svg).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    return set(re.findall(r"<!-- (.*?) -->", svg.read_text(encoding="utf-8")))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = run_plots.Figure.savefig
    monkeypatch.setattr(
        run_plots.Figure, "savefig", lambda self, *rest, **named: (figures.append(self), save(self, *rest, **named))
    )
    return figures


def crosses(axes):
    """Places of the marks of rejected steps."""
    return sorted(float(x) for line in axes.lines if line.get_marker() == "x" for x in line.get_xdata())


def rejected(path, name):
    records = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    return sorted(record[name] for record in records if not record.get("accepted", True))


def test_a_run(runs, tmp_path, drawn, capsys):
    """Both formats, all axes, a mark for each rejected step in each panel that has steps."""
    assert rejected(runs / "plain-0", "iteration")
    plot.main([str(runs / "plain-0"), "--out", str(tmp_path / "picture")])
    assert capsys.readouterr().out.split() == [str(tmp_path / f"picture.{end}") for end in ("png", "svg")]
    image = matplotlib.image.imread(tmp_path / "picture.png")
    assert image.shape[1] == 300 * run_plots.WIDTH and image.shape[0] > image.shape[1]  # dots an inch, for print
    words = texts(tmp_path / "picture.svg")
    assert AXES | {"digits, apts", "rejected step", "training", "test", "batch"} <= words
    panels = drawn[0].axes
    assert len(panels) == 12
    for row in (0, 2, 3):
        for column, name in enumerate(run_plots.COLUMNS):
            assert crosses(panels[3 * row + column]) == pytest.approx(rejected(runs / "plain-0", name))


def test_curves_are_those_of_the_records(runs, tmp_path, drawn):
    plot.main([str(runs / "adam"), "--out", str(tmp_path / "a.svg")])
    records = [json.loads(line) for line in (runs / "adam" / "history.jsonl").read_text().splitlines()]
    epochs = [record for record in records if "train_loss" in record]
    loss_panels, accuracy_panels = drawn[0].axes[:3], drawn[0].axes[3:]
    assert len(accuracy_panels) == 3  # neither ρ nor radius
    for panels, name in [(loss_panels, "train_loss"), (accuracy_panels, "train_accuracy")]:
        for axes, place in zip(panels, run_plots.COLUMNS, strict=True):
            curves = [[list(map(float, data)) for data in line.get_data()] for line in axes.lines]
            assert [[record[place] for record in epochs], [record[name] for record in epochs]] in curves
    assert not (tmp_path / "a.png").exists() and "ρ" not in texts(tmp_path / "a.svg")


def test_the_error_of_a_solution(tmp_path, drawn):
    """On a logarithmic axis, also of a run whose errors span decades and of one without any."""
    for seed in (0, 1):
        arguments = ["--problem=poisson-1d", "--epochs=3", "--dtype=float64", f"--seed={seed}"]
        train.main([*arguments, f"--run-dir={tmp_path / str(seed)}"])
    plot.main([str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "p.svg")])
    errors = [read_run(tmp_path / seed).column("epochs", "relative_l2_error") for seed in ("0", "1")]
    panels = [axes for axes in drawn[0].axes if axes.get_ylabel() == "relative L2 error"]
    (line,) = panels[0].lines
    assert list(line.get_ydata()) == [sum(pair) / 2.0 for pair in zip(*errors, strict=True)]
    assert panels[0].get_yscale() == "log" and "relative L2 error" in texts(tmp_path / "p.svg")
    assert len(drawn[0].axes) == 12  # loss, error, ρ, radius


def test_runs_compared(runs, tmp_path, drawn):
    """Seeds become one line with a band; what differs is in the legend; colours and line styles differ."""
    plot.main([*(str(runs / name) for name in RUNS), str(runs / "adam"), "--out", str(tmp_path / "all")])
    words = texts(tmp_path / "all.svg")
    assert any(word.startswith("apts") and word.endswith("(mean and range of 2 seeds)") for word in words)
    assert any(word.startswith("adam") and "learning rate 0.01" in word for word in words)
    loss = drawn[0].axes[0]
    assert len(loss.collections) == 2  # bands of training and test loss
    styles = {(line.get_color(), line.get_linestyle()) for line in loss.lines if line.get_linewidth() == 1.6}
    assert len(styles - {("0.2", "-")}) == 2 and len({style for _, style in styles - {("0.2", "-")}}) == 2


def test_means_over_seeds(runs):
    (seeds,) = group(read_run(runs / name) for name in ("plain-0", "plain-1"))
    columns = seeds.columns("epochs", "train_loss")
    assert [values[-1] for values in columns] == [run.epochs[-1]["train_loss"] for run in seeds.runs]
    lengths = {len(values) for values in seeds.columns("iterations", "rho")}
    assert lengths == {min(len(run.iterations) for run in seeds.runs)}


def test_a_run_under_way(runs, tmp_path):
    """No summary, and half of a line at the end; a step without a finite loss."""
    path = tmp_path / "run"
    shutil.copytree(runs / "plain-0", path)
    (path / "summary.json").unlink()
    lines = (path / "history.jsonl").read_text().splitlines(keepends=True)
    first = json.loads(lines[0]) | {"rho": None, "trial_loss": None, "accepted": False}
    (path / "history.jsonl").write_text(json.dumps(first) + "\n" + lines[1] + lines[2][: len(lines[2]) // 2])
    assert len(read_run(path).iterations) == 2
    plot.main([str(path), str(runs / "plain-1"), "--out", str(tmp_path / "p.svg")])
    assert {"not finished", "ranks 1"} <= texts(tmp_path / "p.svg")


def test_chosen_rows(runs, tmp_path, drawn):
    assert tuple(run_plots.ROWS) == plot.ROW_NAMES
    plot.main([str(runs / "plain-0"), "--rows", "radius", "loss", "--out", str(tmp_path / "p.svg")])
    (figure,) = drawn
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["loss", "radius"]
    one = group([read_run(runs / "adam")])
    with pytest.raises(InvalidInput, match="the runs have no radius"):
        run_plots.plot_runs(one, [], ["radius"])


def test_more_configurations_than_styles(runs):
    (one,) = group([read_run(runs / "adam")])
    with pytest.raises(InvalidInput, match="29 configurations"):
        run_plots.plot_runs([one] * 29, [])


def damaged(runs, tmp_path, file, text):
    path = tmp_path / "damaged"
    shutil.copytree(runs / "adam", path)
    (path / file).write_text(text)
    return path


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("history.jsonl", "", "no iteration"),
        ("history.jsonl", '{"iteration": 1', "no iteration"),
        ("history.jsonl", "epoch,loss\n1,2.3\n", "not those of a run"),
        ("history.jsonl", "3\n", "not those of a run"),
        ("config.yaml", "a: [", "not those of a run"),
        ("config.yaml", "text", "not those of a run"),
        ("summary.json", "{", "not those of a run"),
        ("summary.json", "[]", "not those of a run"),
    ],
)
def test_damaged_records(runs, tmp_path, capsys, file, text, words):
    path = damaged(runs, tmp_path, file, text)
    with pytest.raises(SystemExit) as ended:
        plot.main([str(path), "--out", str(tmp_path / "p")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.startswith("apts_mpi.plot: error: run: ")
    assert words in error and str(path) in error and not list(tmp_path.glob("p.*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["'nowhere' is no run directory", "config.yaml"]),
        (["{run}", "--out", "{tmp}/p.pdf"], ["p.pdf", "format", ".png or .svg"]),
        (["{run}", "--out", "{tmp}/nowhere/p"], ["cannot be written", "--out"]),
        ([], ["RUN"]),
        (["{run}", "--nonsense"], ["--nonsense"]),
    ],
)
def test_bad_input(runs, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        plot.main([argument.format(run=runs / "adam", tmp=tmp_path) for argument in arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and all(word in error for word in words) and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_names_with_dots(tmp_path):
    assert [path.name for path in plot.files_of(tmp_path / "rate-0.01")] == ["rate-0.01.png", "rate-0.01.svg"]


def test_without_matplotlib(runs, tmp_path, monkeypatch, capsys):
    hide_matplotlib(monkeypatch)
    with pytest.raises(SystemExit) as ended:
        plot.main([str(runs / "adam"), "--out", str(tmp_path / "p")])
    assert ended.value.code == 2 and "pip install apts_mpi[plot]" in capsys.readouterr().err


@pytest.mark.processes
def test_command_line(runs, tmp_path):
    run = start(tmp_path, None, [str(runs / "adam")], module="apts_mpi.plot")
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["plot.png", "plot.svg"]
    assert {path.name for path in tmp_path.iterdir()} == {"plot.png", "plot.svg"}
