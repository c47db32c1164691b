"""What those who watch a run see of its progress: lines of epochs, the time that is left, and the live line."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from apts_mpi.train import progress as progress_of_runs
from apts_mpi.train import reporter as reporters
from apts_mpi.train.options import TrainingOptions
from apts_mpi.train.progress import Pace, Progress, shares_of_limits
from apts_mpi.train.reporter import Reporter, console_for, is_live

ITERATION = {"loss": 2.5, "rho": 0.9, "next_radius": 1.0, "accepted": True}
EPOCH = {"train_loss": 2.0, "test_loss": 2.1, "test_accuracy": 0.5}


@pytest.fixture
def clock(monkeypatch):
    """What takes the place of the clock: a time that a test sets."""
    clock = SimpleNamespace(now=100.0)
    for module in (progress_of_runs, reporters):
        monkeypatch.setattr(module, "seconds", lambda: clock.now)
    return clock


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        # In 10 s: of 40 batches 8, 10 iterations, 5 seconds of iterations and 4 of the processor.
        ({}, 40.0),
        ({"max_iterations": 20}, 10.0),
        ({"max_seconds": 20.0}, 30.0),
        ({"max_cpu_seconds": 5.0}, 2.5),
        ({"max_iterations": 20, "max_seconds": 6.0}, 2.0),
        ({"max_iterations": 1000, "max_seconds": 1000.0}, 40.0),
    ],
    ids=str,
)
def test_the_first_limit_ends_the_run(clock, limits, left):
    options, progress = TrainingOptions(**limits), Progress()
    pace = Pace(lambda: shares_of_limits(options, progress, epochs=4, batches=10))
    assert pace.seconds_left() is None and pace.share() == 0.0
    clock.now += 10.0
    progress.batch, progress.iteration, progress.seconds, progress.cpu_seconds = 8, 10, 5.0, 4.0
    assert pace.seconds_left() == pytest.approx(left)
    assert pace.share() == pytest.approx(10.0 / (10.0 + left))


def test_a_run_that_goes_on_has_the_pace_of_what_it_does_itself(clock):
    done = [0.5, 0.0]
    pace = Pace(lambda: tuple(done))
    clock.now += 10.0
    done[:] = [0.6, 0.0]
    assert pace.seconds_left() == pytest.approx(40.0) and pace.share() == 0.6
    done[:] = [0.6, 1.2]
    assert pace.seconds_left() == 0.0 and pace.share() == 1.0


class Records:
    """Stands for a run directory."""

    def record(self, values):
        pass

    def flush(self):
        pass


def told(clock, live, width=80):
    """What a run of two epochs prints, once a second."""
    console = Console(file=io.StringIO(), force_terminal=live, width=width, color_system=None)
    done = [0.0]
    with Reporter(Pace(lambda: tuple(done)), Records(), console, live, False, None) as reporter:
        for epoch in (1, 2):
            for iteration in (1, 2):
                clock.now += 1.0
                done[0] += 0.25
                totals = {"epoch": epoch, "iteration": 2 * epoch + iteration - 2, "seconds": 0.5}
                reporter.record(ITERATION | totals)
            reporter.record(EPOCH | totals)
    return console.file.getvalue()


def screen(output):
    """The lines that a terminal is left with."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b\[\?25[lh]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith(("\x1b", "\r")):
            lines[row] += part
    return lines


def test_lines_of_epochs_alone(clock):
    output = told(clock, live=False)
    assert "\x1b" not in output and "\r" not in output
    heading, *lines = output.splitlines()
    assert heading.split()[:2] == ["seconds", "left"] and len(lines) == 2
    assert lines[0].split()[:4] == ["epoch", "1", "0.5", "0:00:02"] and lines[1].split()[3] == "0:00:00"


@pytest.mark.parametrize("width", [80, 140])
def test_live_line(clock, width):
    """It stands below the last line, fits the width, and leaves nothing behind."""
    output = told(clock, live=True, width=width)
    drawn = [part for part in re.split(r"\r|\n", output) if "iteration" in part and "left" in part]
    assert any(re.search(r"epoch 1, iteration 2, loss 2.5 .* 50% 0:00:02 left", part) for part in drawn)
    lines = screen(output)
    assert all(len(line) <= width for line in lines)
    assert [line for line in lines if line.strip()] == told(clock, live=False, width=width).splitlines()


def test_it_is_drawn_a_few_times_a_second(clock, monkeypatch):
    monkeypatch.setattr(reporters, "INTERVAL", 1.5)
    assert "iteration 1," not in told(clock, live=True) and "iteration 2," in told(clock, live=True)


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("progress", "file", "live"),
    [
        ("auto", Terminal, True),
        ("auto", io.StringIO, False),
        ("never", Terminal, False),
        ("always", io.StringIO, True),
    ],
)
def test_where_it_is_shown(monkeypatch, progress, file, live):
    """Colours that the environment forces do not make a terminal of a pipe."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file=file(), force_terminal=None)
    assert is_live(progress, console_for(progress, console)) == live
